"""Every preset on stand-ins for its data, for 2 updates: few classes and a small network, and in the slow tests the
classes and the network of the preset."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from recipes.settings.config import parse
from recipes.train import main
from recipes.training.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

PRESETS = sorted((Path(__file__).parents[2] / "recipes" / "presets").glob("*.yaml"))
SHORT = "--epochs 2 --warmup_epochs 1 --max_updates 2 --probe_every 0 --workers 0"
QUICK = f"--model test_resnet --img_size 32 {SHORT}"


def noise(rng, size):
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


def save_pictures(folder, classes, counts):
    """Classes of 32 x 32 pixels, in columns like those of CIFAR-100, and so many of each in the splits."""
    rng, splits = np.random.default_rng(0), {}
    names = datasets.ClassLabel(names=[str(k) for k in range(classes)])
    for split, count in zip(("train", "test"), counts, strict=True):
        labels = [k for k in range(classes) for _ in range(count)]
        content = {"img": [noise(rng, 32) for _ in labels], "fine_label": labels}
        features = datasets.Features(img=datasets.Image(), fine_label=names)
        splits[split] = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def save_photographs(folder, classes, counts, size):
    """A folder of JPEG files by split and class, like that of ImageNet."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val"), counts, strict=True):
        for k in range(classes):
            (folder / split / f"n{k:04d}").mkdir(parents=True)
            for i in range(count):
                noise(rng, size).save(folder / split / f"n{k:04d}" / f"{i}.JPEG")
    return folder


@pytest.fixture(scope="module")
def small_pictures(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("data") / "small", 4, (115, 5))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return save_photographs(tmp_path_factory.mktemp("data") / "photographs", 3, (45, 3), 40)


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


AS_IS = "--imbalance as_is --ratio null --alpha null --largest null --class_order null"

# Classes of the preset, images of each in the splits, what makes up for their number, and training images in all.
SHAPES = {
    "cifar10_two_group": (10, (24, 2), "", 3 * 22 + 7 * 2),
    "cifar10_lt": (10, (24, 2), "--ratio 20", 71),
    "cifar100_lt": (100, (3, 1), "--ratio 2 --batch_size 32", 101),
    "imagenet_lt": (1000, (1, 1), AS_IS, 1000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_presets_train_at_their_own_shape(name, tmp_path, capsys):
    classes, counts, flags, images = SHAPES[name]
    path = PRESETS[0].with_name(f"{name}.yaml")
    if name == "imagenet_lt":  # one image of a class is enough, and so are few pixels of it
        flags += " --val_fraction 0 --img_size 64 --batch_size 4 --model_args.max_steps 1"
        data = save_photographs(tmp_path / "data", classes, counts, 64)
    else:
        data = save_pictures(tmp_path / "data", classes, counts)
    folder = tmp_path / "run"
    words = ["--output", str(folder), "--config", str(path), *SHORT.split(), "--dataset", str(data), *flags.split()]
    assert main(words) == 0, capsys.readouterr().err
    results = json.loads((folder / "results.json").read_text())
    assert sum(Manifest.load(folder / "manifest.json").counts) == images and len(results["test_per_class"]) == classes
    saved = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert saved["architecture"] == yaml.safe_load(path.read_text())["model"] and saved["num_classes"] == classes


def test_the_long_tailed_folder_can_be_taken_as_it_is():
    (path,) = (path for path in PRESETS if path.stem == "imagenet_lt")
    assert AS_IS in " ".join(path.read_text().split())
    assert parse(["--config", str(path), "--output", "x", *AS_IS.split()]).profile_parameters == {}
