"""The grid: its cells, each run once, whatever happens, with a stub in place of training."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import stub_grid
import yaml

from recipes.grid import main
from recipes.results.page import build
from recipes.settings.grid import PRESETS, Grid, read_grid
from recipes.training import cells

GRID = {
    "base": {"epochs": 1, "model_args": {"tol": 0.01}},
    "axes": {"ratio": [10, 20]},
    "arms": {"deq": {}, "twin": {"model_args.equilibrium": False}},
    "seeds": [0, 1],
}


def write(path, **changes):
    path.write_text(yaml.safe_dump(GRID | changes))
    return str(path)


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """A stub in place of training; gives the file that has a line for each start of a run."""
    monkeypatch.setattr(cells, "command", cells.command)
    monkeypatch.setattr(build, "as_svg", build.as_svg)
    stub_grid.stub(str(tmp_path / "starts"), "0")
    return tmp_path / "starts"


def test_every_combination_is_a_cell():
    found = Grid(**GRID).cells()
    assert [cell.name for cell in found[:4]] == [
        "deq-ratio=10-seed=0",
        "twin-ratio=10-seed=0",
        "deq-ratio=20-seed=0",
        "twin-ratio=20-seed=0",
    ]
    assert len(found) == 8 and found[-1].seed == 1
    assert found[0].settings == {"epochs": 1, "model_args": {"tol": 0.01}, "ratio": 10}
    assert found[1].settings == {"epochs": 1, "model_args": {"tol": 0.01, "equilibrium": False}, "ratio": 10}


def test_settings_besides_the_axes():
    grid = Grid(**GRID | {"base": {"imbalance": "two_group"}, "also": [{"imbalance": "balanced"}], "seeds": [0]})
    grid.check_cells()
    assert [cell.setting for cell in grid.cells()[::2]] == ["ratio = 10", "ratio = 20", "imbalance = balanced"]
    assert grid.cells()[4].name == "deq-imbalance=balanced-seed=0"
    assert [cell.settings["imbalance"] for cell in grid.cells()[::2]] == ["two_group", "two_group", "balanced"]
    alone = Grid(**GRID | {"axes": {}, "also": [{"ratio": 5}, {"ratio": 7}], "seeds": [0]})
    assert [cell.settings["ratio"] for cell in alone.cells()] == [5, 5, 7, 7]


def test_the_page_of_a_grid_says_what_is_missing(tmp_path, stubbed, capsys):
    changes = {"arms": {"good": {}, "bad": {"lr": 0.666}}, "seeds": [0, 1], "reference": "bad", "tested": "good"}
    folder = tmp_path / "out"
    assert main([write(tmp_path / "grid.yaml", **changes), "--output", str(folder)]) == 1
    page = (folder / "report.html").read_text()
    assert "Is good more accurate on all classes than bad, seed by seed?" in page
    assert "it cannot be said: no seed in common" in page and "4 of 8 runs are missing" in page
    assert page.count("error: training has diverged") == 4 and "bad-ratio=20-seed=1" in page
    # Another reference makes another page of the same runs.
    starts, changes["tested"], changes["reference"] = stubbed.read_text(), "bad", "good"
    assert main([write(tmp_path / "grid.yaml", **changes), "--output", str(folder)]) == 1
    assert "Is bad more accurate on all classes than good" in (folder / "report.html").read_text()
    assert [line for line in stubbed.read_text()[len(starts) :].split() if line.startswith("good")] == []


def test_cells_run_once_and_the_same_grid_goes_on(tmp_path, stubbed, capsys):
    grid, folder = write(tmp_path / "grid.yaml"), tmp_path / "out"
    assert main([grid, "--output", str(folder), "--jobs", "3"]) == 0
    names = [cell.name for cell in Grid(**GRID).cells()]
    assert sorted(stubbed.read_text().split()) == sorted(names)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == sorted(names)
    runs = folder / "runs"
    commands = [f"--paired {runs}/deq-ratio={R}-seed=* {runs}/twin-ratio={R}-seed=*" for R in (10, 20)]
    expected = [*(f"python recipes/compare.py {each}" for each in commands), str(folder / "report.html")]
    assert capsys.readouterr().out.splitlines() == expected
    (folder / "runs" / names[3] / "results.json").unlink()
    assert main([grid, "--output", str(folder)]) == 0
    assert stubbed.read_text().split()[8:] == [names[3]]
    # Another grid does not go there.
    assert main([write(tmp_path / "other.yaml", seeds=[0]), "--output", str(folder)]) == 2
    assert "holds another grid" in capsys.readouterr().err


def test_cells_are_launched_in_the_precision_of_the_grid(tmp_path, stubbed):
    stub_grid.LAUNCHED.clear()
    main([write(tmp_path / "grid.yaml", mixed_precision="bf16", seeds=[0]), "--output", str(tmp_path / "out")])
    assert len(stub_grid.LAUNCHED) == 4
    for words in stub_grid.LAUNCHED:
        at = words.index("--mixed_precision")
        assert words[at + 1] == "bf16" and at < words.index(str(cells.TRAIN)) < words.index("--config")


def test_a_failed_cell_is_told_and_the_others_run(tmp_path, stubbed, capsys):
    grid = write(tmp_path / "grid.yaml", arms={"bad": {"lr": 0.666}, "good": {}}, axes={}, seeds=[0, 1, 2])
    assert main([grid, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("failed: bad-seed=") == 3 and "error: training has diverged" in error
    assert [path.name for path in sorted((tmp_path / "out" / "runs").iterdir())] == [f"good-seed={s}" for s in range(3)]


def test_each_arm_is_tuned_on_validation_and_then_fixed(tmp_path, stubbed):
    changes = {"tune": {"lr": [0.1, 0.19, 0.666]}, "tune_seeds": [7], "axes": {}, "seeds": [0]}
    folder = tmp_path / "out"
    assert main([write(tmp_path / "grid.yaml", **changes), "--output", str(folder)]) == 1  # 0.666 diverges
    assert yaml.safe_load((folder / "chosen.yaml").read_text()) == {"deq": {"lr": 0.19}, "twin": {"lr": 0.19}}
    assert yaml.safe_load((folder / "runs" / "deq-seed=0" / "config.yaml").read_text())["lr"] == 0.19
    starts = stubbed.read_text().split()
    assert len(starts) == 8 and "tune-deq-lr=0.1-seed=7" in starts
    # What has been chosen is not chosen again.
    assert main([write(tmp_path / "grid.yaml", **changes), "--output", str(folder)]) == 0
    assert stubbed.read_text().split() == starts


def test_runs_of_another_choice_are_refused(tmp_path, stubbed, capsys):
    changes = {"tune": {"lr": [0.1, 0.19]}, "tune_seeds": [7], "axes": {}, "seeds": [0, 1]}
    folder, grid = tmp_path / "out", write(tmp_path / "grid.yaml", **changes)
    assert main([grid, "--output", str(folder)]) == 0
    starts, record = stubbed.read_text(), (folder / "cells" / "twin-seed=0.yaml").read_text()
    (folder / "chosen.yaml").write_text(yaml.safe_dump({"deq": {"lr": 0.19}, "twin": {"lr": 0.1}}))
    (folder / "runs" / "twin-seed=1" / "results.json").unlink()  # neither is an unfinished one resumed
    for name in ("twin-seed=0", "twin-seed=1"):
        capsys.readouterr()
        assert main([grid, "--output", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"cell {name} has run with lr 0.19, and lr is 0.1 now; allowed: " in error and error.count("\n") == 1
        assert f"no '{folder / 'runs' / name}'" in error
        assert stubbed.read_text() == starts and (folder / "cells" / "twin-seed=0.yaml").read_text() == record
        shutil.rmtree(folder / "runs" / name)
    assert main([grid, "--output", str(folder)]) == 0
    assert stubbed.read_text()[len(starts) :].split() == ["twin-seed=0", "twin-seed=1"]
    assert yaml.safe_load((folder / "runs" / "twin-seed=1" / "config.yaml").read_text())["lr"] == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_grid_goes_on_and_repeats_nothing(how, tmp_path):
    """Cells that a killed grid has left running are waited for, not started twice."""
    grid, folder, starts = write(tmp_path / "grid.yaml"), tmp_path / "out", tmp_path / "starts"
    command = [sys.executable, stub_grid.__file__, str(starts), "1", grid, "--output", str(folder), "--jobs", "2"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (starts.exists() and len(starts.read_text().split()) >= 3):  # two have finished
        time.sleep(0.05)
    first.send_signal(how)
    assert first.wait(30) == (-9 if how == signal.SIGKILL else 143)
    before = {path.parent.name for path in folder.glob("runs/*/results.json")}
    page = (folder / "report.html").read_text() if how == signal.SIGTERM else ""
    command[3] = "0"
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    counts = [starts.read_text().split().count(cell.name) for cell in Grid(**GRID).cells()]
    if how == signal.SIGTERM:
        assert "runs are missing" in page
    assert 2 <= len(before) < 8 and len(list(folder.glob("runs/*/results.json"))) == 8
    assert all(starts.read_text().split().count(name) == 1 for name in before)
    if how == signal.SIGKILL:
        assert counts == [1] * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"ration": [1]}}, "axes is 'ration'; allowed: a setting of recipes/train.py (did you mean 'ratio'?)"),
        ({"base": {"seed": 3}}, "base is 'seed'; allowed: any setting but"),
        ({"arms": {"deq": {"ratio": 5}}}, "ratio is 'axes and arms.deq'; allowed: a value in one place"),
        ({"axes": {"model_args.tol": [0.1]}}, "model_args.tol is 'axes and base'"),
        ({"axes": {"ratio": 10}}, "axes.ratio is 10; allowed: a list"),
        ({"axes": {"ratio": [10, 10]}}, "axes.ratio is [10, 10]; allowed: each value once"),
        ({"axes": {"ratio": ["a b", "a_b"]}}, "have one name, 'deq-ratio=a_b-seed=0'"),
        ({"axes": {"epochs": ["many"]}, "base": {}}, "cell deq-epochs=many-seed=0: epochs"),
        ({"base": {"imbalance": "balanced"}}, "cell deq-ratio=10-seed=0: ratio"),
        ({"arms": {}}, "arms is {}; allowed: one or more"),
        ({"arms": {"a/b": {}}}, "arms is 'a/b'; allowed: names of letters"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]; allowed: a list of whole numbers"),
        ({"mixed_precision": "bf61"}, "mixed_precision is 'bf61'; allowed: 'no', 'bf16', 'fp16'"),
        ({"mixed_precision": False}, "mixed_precision is False; allowed: 'no', 'bf16', 'fp16'"),  # a bare `no` in YAML
        ({"reference": "dqe"}, "reference is 'dqe'; allowed: one of the arms deq, twin"),
        ({"tested": "deq"}, "tested is 'deq'; allowed: an arm other than the reference"),
        ({"also": {"ratio": 5}}, "also is {'ratio': 5}; allowed: a list of mappings"),
        (
            {"also": [{"ration": 5}]},
            "also[0] is 'ration'; allowed: a setting of recipes/train.py (did you mean 'ratio'?)",
        ),
        ({"also": [{"imbalance": "balanced", "ratio": 5}]}, "cell deq-imbalance=balanced-ratio=5-seed=0: ratio"),
        ({"also": [{"ratio": 10}]}, "have one name, 'deq-ratio=10-seed=0'"),
        ({"seeds": 3}, "seeds is 3; allowed: a list of whole numbers"),
        ({"tune": {"lr": [1]}}, "tune_seeds is []; allowed: some with tune"),
        ({"tune": {"lr": [1]}, "tune_seeds": [1]}, "tune_seeds is [1]; allowed: none of seeds"),
        ({"sedes": [1]}, "grid is 'sedes'; allowed: arms, seeds, base"),
    ],
)
def test_bad_grids(changes, message, tmp_path, capsys, stubbed):
    assert main([write(tmp_path / "grid.yaml", **changes), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_flags(tmp_path, capsys):
    grid = write(tmp_path / "grid.yaml")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "broken.yaml").write_text("a: [")
    for words, message in (
        (["nowhere", "--output", "x"], "grid is 'nowhere'; allowed: a YAML file, or one of paper_"),
        ([grid, "--output", str(tmp_path / "full")], "exists and has no grid.yaml"),
        ([grid, "--output", "x", "--jobs", "0"], "jobs is 0; allowed: 1 or more"),
        ([str(tmp_path / "broken.yaml"), "--output", "x"], "broken.yaml': "),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


LARGE = pytest.mark.slow  # hundreds of cells


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[LARGE] if path.stem in ("paper_cifar10", "paper_cifar100") else [])
        for path in sorted(PRESETS.glob("*.yaml"))
    ],
)
def test_presets_are_grids(path):
    grid, _ = read_grid(path.stem)
    grid.check_cells()
