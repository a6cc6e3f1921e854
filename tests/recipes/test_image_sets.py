"""Data sets as people have them, from the command line to results: splits, classes by name, corrupt images."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from recipes import evaluate, probe, train
from recipes.training.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

NAMES = ["blue", "green", "red"]
SMALL = "--model test_resnet --img_size 32 --crop_pct 1 --crop_pad 0 --batch_size 8 --imbalance as_is --lr 0.02".split()


def picture(name, number):
    """An image of a colour, unlike all others."""
    pixels = np.random.default_rng(number).integers(0, 60, (32, 32, 3), dtype=np.uint8)
    pixels[..., 2 - NAMES.index(name)] += 190
    return Image.fromarray(pixels)


def rows(numbers, names=NAMES):
    """Rows of which row i is of class `NAMES[number % 3]`, numbered as in `names`."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    labels = [names.index(NAMES[number % 3]) for number in numbers]
    pictures = [picture(NAMES[number % 3], number) for number in numbers]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def save(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder)
    return ["--dataset", str(folder)]


def results(folder, name="results.json"):
    return json.loads((Path(folder) / name).read_text())


def run(output, *words):
    assert train.main(["--output", str(output), *SMALL, *map(str, words)]) == 0
    return output


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Drawing takes longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.training.measurement.save_figures", lambda *_, **__: None)
        for module in ("evaluation", "probing"):
            patch.setattr(f"recipes.training.{module}.figures", lambda *_: {})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def trained(folder):
    """A run that tells the three colours apart."""
    data = save(folder / "colours", train=rows(range(45)), test=rows(range(100, 124)))
    return run(folder / "trained", *data, "--epochs", 8)


@pytest.fixture(scope="module")
def turned(folder):
    """The same images in the same order, with the classes in another."""
    names = ["red", "unused", "blue", "green"]
    return save(folder / "turned", train=rows(range(45), names), test=rows(range(100, 124), names))


def test_the_run_stores_the_names_of_its_classes(trained):
    assert results(trained)["test"]["overall"] == 1
    assert Manifest.load(trained / "manifest.json").class_names == NAMES
    assert results(trained / "checkpoint", "config.json")["label_names"] == NAMES


@pytest.mark.parametrize("model", ["{run}", "local-dir:{run}/checkpoint"])
def test_evaluation_compares_classes_by_name(trained, turned, tmp_path, model):
    assert evaluate.main([model.format(run=trained), *turned, "--output", str(tmp_path / "x"), "--img_size", "32"]) == 0
    (point,) = results(tmp_path / "x")["points"]
    assert point["accuracy"]["overall"] == 1 and set(point["per_class"]) == set(NAMES)


def test_other_labels_of_the_same_names(trained, tmp_path):
    """Folders by class; and strings in a table, of two of the three classes."""
    for number in range(100, 112):
        for root in (tmp_path / "folders" / "test" / NAMES[number % 3], tmp_path / "table" / "images"):
            root.mkdir(parents=True, exist_ok=True)
            picture(NAMES[number % 3], number).save(root / f"{number}.png")
    listed = [number for number in range(100, 112) if number % 3]
    table = "".join(f"images/{number}.png,{NAMES[number % 3]}\n" for number in listed)
    (tmp_path / "table" / "test.csv").write_text(f"file,label\n{table}")
    for name, images in (("folders", 12), ("table", len(listed))):
        words = ["--dataset", str(tmp_path / name), "--output", str(tmp_path / f"{name} results")]
        assert evaluate.main([str(trained), *words]) == 0
        found = results(tmp_path / f"{name} results")
        assert found["images"] == images and found["points"][0]["accuracy"]["overall"] == 1


def test_other_names_are_refused(trained, tmp_path, capsys):
    data = save(tmp_path / "data", test=rows(range(6)).cast_column("label", datasets.ClassLabel(names=["b", "g", "r"])))
    for command in (evaluate, probe):
        assert command.main([str(trained), *data, "--split", "test"]) == 2
        assert "error: split 'test' has classes 'b', 'g', 'r' in 6 of 6 images; allowed: those of model" in (
            capsys.readouterr().err
        )


def test_the_probe_compares_classes_by_name(trained, turned, tmp_path):
    found = []
    for name, words in (("same", []), ("turned", turned)):
        assert probe.main([str(trained), *words, "--no-tsne", "--output", str(tmp_path / name)]) == 0
        found.append(results(tmp_path / name, "collapse.json"))
    assert found[0]["collapse"] == found[1]["collapse"] and found[0]["classes"] == found[1]["classes"] == NAMES
    assert found[0]["collapse"]["accuracy"] == 1 and found[0]["images"] == found[1]["images"]


@pytest.mark.parametrize("stage", ["crt", "lws", None])
def test_a_run_that_goes_on_from_a_model_keeps_its_classes(trained, turned, tmp_path, stage):
    words = ["--model", trained, "--epochs", 0, *turned, *(["--stage", stage] if stage else [])]
    run(tmp_path / "x", *words)
    assert results(tmp_path / "x" / "checkpoint", "config.json")["label_names"] == NAMES
    if stage != "crt":  # whose classifier is drawn anew
        assert results(tmp_path / "x")["test"]["overall"] == 1


def test_a_manifest_is_about_the_names_of_its_classes(trained, turned, tmp_path, capsys):
    manifest = ["--manifest", str(trained / "manifest.json")]
    words = [word for word in SMALL if word not in ("--imbalance", "as_is")]
    command = ["--output", str(tmp_path / "x"), *words, *turned, *manifest, "--epochs", "0"]
    assert train.main(command) == 0
    assert Manifest.load(tmp_path / "x" / "manifest.json") == Manifest.load(trained / "manifest.json")
    renamed = rows(range(45, 90)).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    other = save(tmp_path / "other", train=renamed)
    capsys.readouterr()
    assert train.main(["--output", str(tmp_path / "y"), *words, *other, *manifest, "--test_fraction", "0.2"]) == 2
    assert "split 'train' has classes 'a', 'b', 'c' in 45 of 45 images; allowed: those of the manifest" in (
        capsys.readouterr().err
    )


def test_a_stage_on_other_classes_is_refused(trained, tmp_path, capsys):
    other = rows(range(9)).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    data = save(tmp_path / "data", train=other, test=other)
    words = ["--model", str(trained), "--stage", "crt", "--imbalance", "as_is"]
    assert train.main(["--output", str(tmp_path / "x"), *words, *data]) == 2
    assert "allowed: one of the same classes with a stage, as model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    run(tmp_path / "y", "--model", trained, "--epochs", 0, *data)  # without a stage, the classes are new ones
    assert "classes          of other names than those of model" in capsys.readouterr().out


def test_a_test_part_is_carved_and_used_by_every_command(tmp_path, capsys):
    data = save(tmp_path / "data", train=rows(range(60)))
    words = [*data, "--epochs", "0", "--val_fraction", "0.25"]
    assert train.main(["--output", str(tmp_path / "x"), *SMALL, *words]) == 2
    assert (
        "test_split is 'test'; allowed: none, or --test_fraction 0.2 to take the test images from the train split"
        in (capsys.readouterr().err)
    )
    run(tmp_path / "x", *words, "--test_fraction", 0.2)
    manifest = Manifest.load(tmp_path / "x" / "manifest.json")
    parts = manifest.indices, manifest.validation, manifest.test
    assert [len(part) for part in parts] == [36, 12, 12] and sorted(sum(parts, [])) == list(range(60))
    assert np.bincount(np.array(manifest.test) % 3).tolist() == [4, 4, 4]
    assert results(tmp_path / "x")["images"] == {"train": 36, "val": 12, "test": 12}
    assert "test images      12, taken from split 'train'" in capsys.readouterr().out
    assert evaluate.main([str(tmp_path / "x"), "--output", str(tmp_path / "e")]) == 0
    found = results(tmp_path / "e")
    assert found["images"] == 12
    assert found["points"][0]["accuracy"]["overall"] == results(tmp_path / "x")["test"]["overall"]
    assert probe.main([str(tmp_path / "x"), "--no-tsne", "--split", "test", "--output", str(tmp_path / "p")]) == 0
    assert results(tmp_path / "p", "collapse.json")["images"] == 12
    other = save(tmp_path / "other", train=rows(range(1, 61)))
    assert evaluate.main([str(tmp_path / "x"), *other]) == 2
    assert "is not what 'test' was taken from" in capsys.readouterr().err


def test_a_validation_split_of_its_own(tmp_path, capsys):
    data = save(tmp_path / "data", train=rows(range(12)), validation=rows(range(20, 26)), test=rows(range(30, 39)))
    run(tmp_path / "x", *data, "--epochs", 1, "--val_split", "validation", "--select", "best")
    assert results(tmp_path / "x")["images"] == {"train": 12, "val": 6, "test": 9}
    for words, message in (
        (["--val_split", "test"], "test_split is 'test'; allowed: 'validation'"),
        (["--val_split", "dev"], "val_split is 'dev'; allowed: 'validation', 'test'"),
        (["--test_fraction", "0.5"], "test_fraction is 0.5; allowed: not given, with a split 'test'"),
    ):
        assert train.main(["--output", str(tmp_path / "y"), *SMALL, *data, *words]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "y").exists()


def test_images_in_two_splits_are_told_before_training(tmp_path, capsys):
    data = save(tmp_path / "data", train=rows(range(12)), test=rows([3, 100, 7]))
    run(tmp_path / "x", *data, "--epochs", 0, "--val_fraction", 0)
    out = capsys.readouterr().out
    assert "warning          2 of 3 test images are among the train images too, such as image 0 of split 'test'" in out


@pytest.fixture(scope="module")
def damaged(folder):
    """Class folders with two images that cannot be decoded, one to train on and one to test on."""
    for number in (*range(30), *range(100, 106)):
        path = folder / "damaged" / ("train" if number < 100 else "test") / NAMES[number % 3] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(NAMES[number % 3], number).save(path)
        if number in (4, 104):
            path.write_bytes(path.read_bytes()[:-300])
    return ["--dataset", str(folder / "damaged")]


@pytest.mark.parametrize("pipeline", ["resident", "workers"])
def test_a_corrupt_image_is_named_by_its_path_and_leaves_nothing(damaged, tmp_path, capsys, pipeline):
    for skip in (0, 1):
        words = ["--val_fraction", "0", "--pipeline", pipeline, "--skip_corrupt", str(skip)]
        assert train.main(["--output", str(tmp_path / "x"), *SMALL, *damaged, *words]) == 2
        assert f"{damaged[1]}/train/green/004.png) cannot be decoded: " in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_corrupt_images_are_skipped_and_listed(damaged, tmp_path, capsys):
    words = ["--val_fraction", 0, "--epochs", 1, "--skip_corrupt", 2]
    run(tmp_path / "x", *damaged, *words)
    out = capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "x" / "manifest.json")
    assert manifest.counts == [10, 9, 10] and len(manifest.indices) == 29
    assert results(tmp_path / "x")["images"] == {"train": 29, "val": 0, "test": 5}
    for message, path in zip(manifest.skipped, ("train/green/004.png", "test/red/104.png"), strict=True):
        assert path.split("/")[-1] in message and f"skipped          {message}" in out
    assert evaluate.main([str(tmp_path / "x"), "--output", str(tmp_path / "e")]) == 0
    assert results(tmp_path / "e")["images"] == 5
    assert evaluate.main([str(tmp_path / "x"), "--skip_corrupt", "0"]) == 2
    assert "104.png) cannot be decoded: " in capsys.readouterr().err
    assert probe.main([str(tmp_path / "x"), "--no-tsne", "--output", str(tmp_path / "p")]) == 0
    assert results(tmp_path / "p", "collapse.json")["images"] == 29
