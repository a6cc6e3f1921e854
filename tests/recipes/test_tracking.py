"""Metrics that go to a tracker are those of metrics.jsonl, in a run that was interrupted too."""

import json
import math
import shutil

import pytest

from recipes.train import main
from recipes.training.tracking import scalars

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

FLAGS = "--model test_resnet --img_size 32 --crop_pct 1 --epochs 2 --max_updates 14 --probe_every 2".split()
TENSORBOARD = ["--tracker", "tensorboard", "--keep_checkpoints", "9"]


def numbers(value, path=""):
    """Path and value of every number in nested dictionaries."""
    if isinstance(value, dict):
        return [pair for key in value for pair in numbers(value[key], f"{path}/{key}")]
    return [(path[1:], value)] if type(value) in (int, float) else []


def logged(folder):
    """Steps and values of every curve, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_numbers_of_metrics_and_each_once_after_an_interruption(tmp_path):
    folder = tmp_path / "run"
    assert main(["--output", str(folder), *FLAGS, *TENSORBOARD]) == 0

    def expected():
        results, curves = json.loads((folder / "results.json").read_text()), {}
        for step, line in zip((0, 12, 14), (folder / "metrics.jsonl").read_text().splitlines(), strict=True):
            for path, value in numbers(json.loads(line)):
                curves.setdefault(path, []).append((step, pytest.approx(value, rel=1e-6)))
        return curves | {path: [(14, pytest.approx(value))] for path, value in numbers({"test": results["test"]})}

    first = logged(folder)
    assert first == expected() and len(first["val/overall"]) == 3 and len(first["collapse/nc1"]) == 2
    # Cut off after the last epoch was logged, and before its checkpoint was there.
    shutil.rmtree(folder / "states" / "00000014")
    (folder / "results.json").unlink()
    assert main(["--output", str(folder), *FLAGS, *TENSORBOARD, "--resume", "auto"]) == 0
    assert logged(folder) == expected()


def test_scalars_are_finite_numbers_by_their_path():
    record = {"epoch": 1, "lr": None, "val": {"overall": 0.5, "groups": {"few": math.nan, "many": 1}}, "name": "x"}
    assert scalars(record) == {"epoch": 1.0, "val/overall": 0.5, "val/groups/many": 1.0}
