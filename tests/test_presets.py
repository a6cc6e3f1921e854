"""Every preset on stand-ins for its data: few classes of random pixels, a small network, 2 updates."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from recipes.config import parse
from recipes.longtail import Manifest
from recipes.train import main

PRESETS = sorted((Path(__file__).parent.parent / "recipes" / "presets").glob("*.yaml"))
QUICK = "--model test_resnet --img_size 32 --epochs 2 --warmup_epochs 1 --max_updates 2 --probe_every 0 --workers 0"


@pytest.fixture(autouse=True)
def one_cpu_and_no_network(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def noise(rng, size):
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def small_pictures(tmp_path_factory):
    """Four classes of 32 x 32 pixels, in columns like those of CIFAR-100."""
    folder, rng, splits = tmp_path_factory.mktemp("data") / "small", np.random.default_rng(0), {}
    names = datasets.ClassLabel(names=list("abcd"))
    for split, count in (("train", 115), ("test", 5)):
        labels = [k for k in range(4) for _ in range(count)]
        content = {"img": [noise(rng, 32) for _ in labels], "fine_label": labels}
        features = datasets.Features(img=datasets.Image(), fine_label=names)
        splits[split] = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of JPEG files by split and class, like that of ImageNet."""
    folder, rng = tmp_path_factory.mktemp("data") / "photographs", np.random.default_rng(0)
    for split, count in (("train", 45), ("val", 3)):
        for name in ("n01", "n02", "n03"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise(rng, 40).save(folder / split / name / f"{i}.JPEG")
    return folder


# Flags that make up for the size of the stand-in, and the training images of each class.
CASES = {
    "digits_balanced": ("", "digits", [104] * 10),
    "cifar10_two_group": ("", "small_pictures", [103, 103, 103, 10]),
    "cifar10_lt": ("", "small_pictures", [103, 22, 4, 1]),
    "cifar100_lt": ("", "small_pictures", [103, 22, 4, 1]),
    "imagenet_lt": ("--ratio 10 --largest 40", "photographs", [40, 16, 4]),
}


def test_every_preset_is_tried():
    assert set(CASES) == {path.stem for path in PRESETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_train(path, request, tmp_path, capsys):
    flags, data, sizes = CASES[path.stem]
    if data != "digits":
        data = request.getfixturevalue(data)
    folder = tmp_path / "run"
    words = ["--output", str(folder), "--config", str(path), *QUICK.split(), "--dataset", str(data), *flags.split()]
    assert main(words) == 0, capsys.readouterr().err
    assert sorted(Manifest.load(folder / "manifest.json").counts) == sorted(sizes)
    state = max((folder / "states").iterdir())
    assert json.loads((state / "state.json").read_text())["progress"]["updates"] == 2
    written, given = yaml.safe_load((folder / "config.yaml").read_text()), yaml.safe_load(path.read_text())
    changed = {word[2:] for word in words if word.startswith("--")}
    assert {key: written[key] for key in given if key not in changed} == {k: given[k] for k in given.keys() - changed}
    assert ("workers: as asked" if path.stem == "imagenet_lt" else "resident: ") in capsys.readouterr().out


def test_the_long_tailed_folder_can_be_taken_as_it_is():
    (path,) = (path for path in PRESETS if path.stem == "imagenet_lt")
    flags = "--imbalance as_is --ratio null --alpha null --largest null --class_order null"
    assert flags in " ".join(path.read_text().split())
    assert parse(["--config", str(path), "--output", "x", *flags.split()]).profile_parameters == {}
