"""Two launched ranks: every sampler over an interruption, and what else has to come out as in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recipes.data import digits
from recipes.longtail import Manifest
from recipes.train import main

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
SETTINGS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
SIZES = np.array([30, 16, 9, 5])
LABELS = np.repeat(np.arange(4), 34)  # of the train split


@pytest.fixture(autouse=True, scope="module")
def one_cpu_and_no_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags of digits of four classes, with the number of each image in its first pixel."""
    folder, splits = tmp_path_factory.mktemp("data") / "few", {}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("0123")))
    for split, rows in digits().items():
        labels, count = np.array(rows["label"]), {"train": len(LABELS) // 4, "test": 9}[split]
        rows = rows.select(np.concatenate([np.flatnonzero(labels == k)[:count] for k in range(4)]))
        images = [image.resize((32, 32)) for image in rows["image"]]
        for i, image in enumerate(images):
            image.putpixel((0, 0), i)
        content = {"image": images, "label": list(rows["label"])}
        splits[split] = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)
    data = f"--dataset {folder} --val_fraction 0.1 --img_size 32 --crop_pct 1 --eval_batch_size 20 --batch_size 16"
    data += f" --imbalance explicit --counts {' '.join(map(str, SIZES))}"
    return data.split()


def launch(folder, runs, *, sharded=False):
    """What each of two ranks has seen of runs, which are flags, and where a signal comes; one run after the other."""
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps([{"words": words, "stop": stop} for words, stop in runs]))
    device = "--use_fsdp --fsdp_version 2" if sharded else "--multi_gpu"
    launcher = f"accelerate.commands.launch {device} --quiet --num_processes 2 --num_machines 1"
    defaults = "--mixed_precision no --dynamo_backend no tests/launched_runs.py"
    command = [sys.executable, "-m", *launcher.split(), *defaults.split(), str(folder / "runs.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [[json.loads((folder / f"{i}-{rank}.json").read_text()) for rank in (0, 1)] for i in range(len(runs))]


# A sampler, and how often it draws each class in 3 epochs of 60 images, 4 updates each.
SAMPLERS = {
    "instance": 3 * SIZES,
    "square_root": 180 * np.sqrt(SIZES) / np.sqrt(SIZES).sum(),
    "class_balanced": np.full(4, 45),
    "class_aware --gradient_accumulation_steps 2": np.full(4, 45),
    "reverse": 180 / SIZES / (1 / SIZES).sum(),
    "progressively_balanced --gradient_accumulation_steps 2": 1.5 * SIZES + 1.5 * 15,
    "repeat_factor --gradient_accumulation_steps 2": 3 * SIZES * np.maximum(1, np.sqrt(15 / SIZES)),
    "class_balanced --defer 1": SIZES + 2 * 15,
}
TRAINED = "--model test_resnet --model_args.drop_rate 0.3 --lr 0.05 --ema_decay 0.5 --clip_grad 1 --crop_pad 0"
TRAINED += " --epochs 3 --probe_every 0 --log_every 3"


@pytest.fixture(scope="module")
def resumed(words, tmp_path_factory):
    """By sampler: the folders of a run and of one that was stopped in its second epoch and resumed, and what two ranks
    have seen of the first, and of the second before and after the stop."""
    folder = tmp_path_factory.mktemp("resumed")
    runs, folders = [], {}
    for i, sampler in enumerate(SAMPLERS):
        flags = [*words, *TRAINED.split(), "--sampler", *sampler.split()]
        folders[sampler] = [folder / f"straight{i}", folder / f"stopped{i}"]
        straight, stopped = (["--output", str(path), *flags] for path in folders[sampler])
        runs += [(straight, None), (stopped, [1, 5]), ([*stopped, "--resume", "auto"], None)]
    seen = launch(folder / "launch", runs)
    return {sampler: (*folders[sampler], seen[3 * i : 3 * i + 3]) for i, sampler in enumerate(SAMPLERS)}


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder):
    """All that a finished run of two ranks has measured and learnt, but for times."""
    read = [*records_of(folder), json.loads((folder / "results.json").read_text())]
    last = max((folder / "states").iterdir(), key=lambda path: path.name)
    files = [folder / "checkpoint" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    assert len(files) == 4
    return [each | {"seconds": None} for each in read], [file.read_bytes() for file in files]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ranks_that_are_stopped_go_on_to_the_same_numbers(resumed, sampler):
    straight, stopped, runs = resumed[sampler]
    assert [[rank["code"] for rank in run] for run in runs] == [[0, 0], [143, 143], [0, 0]]
    assert numbers(stopped) == numbers(straight)
    for whole, before, after in zip(*runs, strict=True):
        assert 0 < len(before["seen"]) < len(whole["seen"]) == len(before["seen"]) + len(after["seen"])
        assert before["seen"] + after["seen"] == whole["seen"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ranks_share_out_what_the_sampler_asks_for(resumed, sampler):
    straight, _, (ranks, *_) = resumed[sampler]
    chosen = np.array(Manifest.load(straight / "manifest.json").indices)
    start, *records = records_of(straight)
    total = np.zeros(len(LABELS), dtype=int)
    forwards = [np.array_split(np.array(rank["seen"], dtype=object), len(records)) for rank in ranks]
    for record, *parts in zip(records, *forwards, strict=True):
        for forward in np.concatenate(parts):
            assert LABELS[forward["images"]].tolist() == forward["labels"]
        mine, yours = ([image for forward in part for image in forward["images"]] for part in parts)
        times = np.bincount(mine + yours, minlength=len(LABELS))
        assert record["draws"] == np.bincount(LABELS, times).tolist()
        if sampler == "instance":
            assert not set(mine) & set(yours) and sorted(mine + yours) == sorted(chosen)
        total += times
        for k in range(4):  # so that no image is drawn by both ranks before every other of its class by one
            mates = chosen[LABELS[chosen] == k]
            assert np.ptp(times[mates]) <= 1 and np.ptp(total[mates]) <= 1
    assert start["draws"] == [0] * 4 and total[chosen].sum() == total.sum()
    draws = np.array(list(json.loads((straight / "results.json").read_text())["draws_per_class"].values()))
    assert draws.tolist() == np.bincount(LABELS, total).tolist()
    assert np.abs(draws - SAMPLERS[sampler]).max() < 2
