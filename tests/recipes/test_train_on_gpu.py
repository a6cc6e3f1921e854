"""A run on an accelerator, launched as a user does: it trains, resumes bit by bit, and is measured alike afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from few_digits import save_few_digits

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SHORT = (
    "--epochs 3 --imbalance two_group --majority 2 --ratio 4 --batch_size 32 --eval_batch_size 64 --probe_every 1 "
    "--lr 0.1 --hflip 0.5 --crop_pad 2"
).split()


def start(recipe, *words, precision="bf16"):
    launcher = f"accelerate.commands.launch --quiet --num_processes 1 --num_machines 1 --mixed_precision {precision}"
    command = [sys.executable, "-m", *launcher.split(), "--dynamo_backend", "no", f"recipes/{recipe}.py", *words]
    settings = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, start_new_session=True, **pipes)


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


def metrics(folder):
    """What a run recorded, without its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(save_few_digits(tmp_path_factory.mktemp("data") / "few", train=80, test=20))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_resumes_and_is_measured_again(images, tmp_path, precision):
    words = ["--dataset", images, *SHORT]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    finish(start("train", *words, "--output", str(straight), precision=precision))
    process = start("train", *words, "--output", str(stopped), precision=precision)
    recorded = stopped / "metrics.jsonl"
    while process.poll() is None and not (recorded.exists() and recorded.read_text().count("\n") >= 2):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # in the midst of it
    finish(start("train", *words, "--output", str(stopped), "--resume", "auto", precision=precision))
    assert metrics(stopped) == metrics(straight)
    weights = "checkpoint/model.safetensors"
    assert (stopped / weights).read_bytes() == (straight / weights).read_bytes()

    results = json.loads((straight / "results.json").read_text())
    assert results["device"].startswith("cuda")
    again = tmp_path / "again"
    batches = ["--eval_batch_size", "64"]  # in others, kernels round differently
    finish(start("evaluate", str(straight), *batches, "--output", str(again), precision=precision))
    points = json.loads((again / "results.json").read_text())["points"]
    assert [point["accuracy"] for point in points] == [pytest.approx(results["test"])]
