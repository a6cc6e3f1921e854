"""Pictures come after numbers: names of any kind, and pictures that fail."""

import json

import datasets
import numpy as np
import pytest
from few_digits import save_few_digits

from recipes import evaluate, probe
from recipes.results import class_figures, figures
from recipes.train import main
from recipes.training import evaluation, probing

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

NAMES = [r"$\frac$", "_hidden", "\u732b", "a name that nobody would give, but for a folder of many words"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags of a run of one update on a few digits whose classes have such names, as have the folder and the groups."""
    folder = tmp_path_factory.mktemp("data")
    splits = datasets.load_from_disk(save_few_digits(folder / "few", train=8, test=4))
    splits = splits.cast_column("label", datasets.ClassLabel(names=NAMES))
    splits.save_to_disk(folder / r"$\frac$")
    data = ["--dataset", str(folder / r"$\frac$"), *"--imbalance two_group --majority 2 --ratio 2".split()]
    model = "--model deq_resnet8_cifar --model_args.channels [4,4,8,8] --model_args.stem_width 4"
    model += " --model_args.num_groups 2 --model_args.max_steps 4 --img_size 16 --epochs 1 --max_updates 1"
    return [*data, *model.split()]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["--output", str(folder), *words]) == 0
    return folder


def pictures(folder):
    assert not list(folder.glob(".*"))
    return {path.stem for path in folder.glob("*.png")}


def test_names_of_any_kind_are_drawn(run, tmp_path, capsys):
    assert list(json.loads((run / "results.json").read_text())["test_per_class"]) == NAMES
    assert pictures(run / "figures") == {"training", "gram", "residual", "steps"}
    assert evaluate.main([str(run), "--output", str(tmp_path / "e")]) == 0
    assert pictures(tmp_path / "e") == {"confusion", "reliability", "anytime"}
    groups = ["--groups", r"$\frac$=0-1", "_few=2-3"]
    assert probe.main([str(run), *groups, "--iterates", "--layers", "stages", "--output", str(tmp_path / "p")]) == 0
    assert pictures(tmp_path / "p") == {"gram", "angles", "classes", "depth", "iterates", "tsne"}
    assert "warning" not in capsys.readouterr().err


def failing(results, drawn):
    """Stands for a function that draws: fails, having seen whether the numbers are on the disk."""

    def draw(*_, **__):
        drawn.append(json.loads(results.read_text()))
        raise RuntimeError("no\nglyph")

    return draw


def test_a_picture_that_fails_is_a_warning(run, words, tmp_path, capsys, monkeypatch):
    drawn, e, p = [], tmp_path / "e", tmp_path / "p"
    monkeypatch.setattr(figures, "training_figure", failing(tmp_path / "x" / "results.json", drawn))
    monkeypatch.setattr(evaluation, "confusion_figure", failing(e / "results.json", drawn))
    monkeypatch.setattr(probing, "plot_grams", failing(p / "collapse.json", drawn))
    commands = {
        tmp_path / "x" / "figures" / "training.png": lambda: main(["--output", str(tmp_path / "x"), *words]),
        e / "confusion.png": lambda: evaluate.main([str(run), "--output", str(e)]),
        p / "gram.png": lambda: probe.main([str(run), "--no-tsne", "--output", str(p)]),
    }
    for path, command in commands.items():
        assert command() == 0
        assert f"warning: {path} is not drawn: RuntimeError: no glyph" in capsys.readouterr().err.splitlines()
        assert path.stem not in pictures(path.parent) and len(pictures(path.parent)) > 0
    assert len(drawn) == 3 and list(drawn[0]["test_per_class"]) == NAMES


@pytest.mark.parametrize(("classes", "cells"), [(100, 100), (1000, 125), (1003, 112)])
def test_many_classes_are_confused_in_blocks(classes, cells):
    """Each class is right by 60 %, and else taken for the next; the first class has no image, the last block less."""
    confusion = 6 * np.eye(classes, dtype=int) + 4 * np.roll(np.eye(classes, dtype=int), 1, axis=1)
    confusion[0] = 0
    axes, bar = class_figures.confusion_figure(confusion, [str(k) for k in range(classes)], title="t").axes
    image = axes.get_images()[0]
    shown, block = np.asarray(image.get_array()), -(-classes // cells)
    assert shown.shape == (cells, cells) and bar.get_ylabel() == "% of the class"
    for i in range(1, cells):
        inside = min(block, classes - i * block)
        np.testing.assert_allclose(shown[i, i], 60 + 40 * (inside - 1) / inside)
        np.testing.assert_allclose(shown[i, (i + 1) % cells], 40 / inside)
    assert list(image.get_extent()) == [-0.5, cells * block - 0.5, cells * block - 0.5, -0.5]
    assert image.norm(5.0) - image.norm(0.0) > 0.2  # 5 % can be told from nothing
    assert 5 <= len(axes.get_xticks()) <= 12
