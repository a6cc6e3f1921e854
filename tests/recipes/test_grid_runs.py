"""A grid of real, tiny runs on digits: killed at random moments, two at a time, it comes to what it comes to alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import direct_grid
import pytest
import yaml
from test_page import read

from recipes.grid import main
from recipes.results.page import build
from recipes.training import cells

GRID = {
    "base": {"epochs": 1, "batch_size": 96, "probe_every": 0, "eval_batch_size": 298, "checkpoint_every": 1},
    "arms": {
        "plain": {"model_args": {"equilibrium": False}},
        "deq": {"model_args": {"max_steps": 3, "backward_max_steps": 3}},
    },
    "seeds": [0],
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def grids(tmp_path_factory, one_cpu_and_no_network):
    """Folders of one grid, run through with one job, and with two and killed; and what had finished then."""
    tmp = tmp_path_factory.mktemp("grids")
    (tmp / "grid.yaml").write_text(yaml.safe_dump(GRID))
    whole, cut = tmp / "whole", tmp / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(cells, "command", cells.command)
        patch.setattr(build, "_theory", build._theory)
        direct_grid.direct()
        assert main([str(tmp / "grid.yaml"), "--output", str(whole)]) == 0
    process = start(tmp / "grid.yaml", cut, "--jobs", "2")
    wait_for_a_run(cut, process, random.uniform(2, 12))
    for pid in [process.pid, *children(process.pid)]:  # as when the machine loses power
        os.kill(pid, signal.SIGKILL)
    process.wait(60)
    finished = {path: path.stat() for path in cut.glob("runs/*/results.json")}
    assert start(tmp / "grid.yaml", cut, "--jobs", "2").wait(120) == 0
    return whole, cut, finished


def start(*words):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, direct_grid.__file__, *map(str, words[:1]), "--output", *map(str, words[1:])]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_a_run(folder, process, seconds):
    """Until a process of a cell has begun, and some seconds more."""
    until = time.monotonic() + 60
    while not list(folder.glob("logs/*.log")) and time.monotonic() < until:
        time.sleep(0.05)
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)


def children(pid):
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def tables(folder):
    """Rows of the page, without the time that runs took."""
    found = []
    for row in read((folder / "report.html").read_text()).rows:
        timed = "seconds" in row or (row and row[0] in ("plain-seed=0", "deq-seed=0"))
        found.append(row[:-1] if timed else row)
    return found


def test_tables_are_the_same_to_the_last_digit(grids):
    whole, cut, _ = grids
    assert len(tables(whole)) > 20 and tables(whole) == tables(cut)
    for name in ("plain-seed=0", "deq-seed=0"):
        first, second = (json.loads((folder / "runs" / name / "results.json").read_text()) for folder in (whole, cut))
        for key in ("test", "test_per_class", "collapse", "solver", "calibration_error"):
            assert first[key] == second[key] and first[key] is not None
        weights = [
            (folder / "runs" / name / "checkpoint" / "model.safetensors").read_bytes() for folder in (whole, cut)
        ]
        assert weights[0] == weights[1]


def test_no_finished_cell_is_repeated(grids):
    _, cut, finished = grids
    for path, before in finished.items():
        after = path.stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert len(list(cut.glob("runs/*/results.json"))) == 2


def test_the_page_has_what_models_show_again(grids):
    whole, _, _ = grids
    page = (whole / "report.html").read_text()
    assert "could not be looked at" not in page and "Not drawn" not in page
    assert "Features in the plane (t-SNE)" in page and "Collapse along the solve" in page
    looks = {name: json.loads((whole / "looks" / f"{name}-seed=0.json").read_text())["look"] for name in GRID["arms"]}
    assert looks["plain"]["one_update"] == {} and looks["plain"]["iterates"] == {}
    assert set(looks["deq"]["one_update"]) == {"overall", "majority", "minority"}
    assert len(looks["deq"]["iterates"]) == 4  # H0, two updates, and what is returned
    for look in looks.values():
        assert len(look["points"]) == len(look["labels"]) > 100 and set(look["labels"]) == set(range(10))
    # The last iterate is what the solver returns, or nearly: the collapse of the run itself.
    results = json.loads((whole / "runs" / "deq-seed=0" / "results.json").read_text())
    last = [*looks["deq"]["iterates"].values()][-1]
    assert last["nc1"] == pytest.approx(results["collapse"]["nc1"], rel=0.5)
