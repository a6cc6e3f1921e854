"""The pictures show the numbers they are given."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from nc_probe import ClassMoments, measure
from recipes.figures import residual_figure, save_figures, training_figure

GROUPS = ("majority", "minority")


def records(groups=GROUPS):
    def collapse(epoch):
        return {"nc1": 10.0**-epoch, "nc2_etf": 0.5, "nc3": None if epoch == 0 else 0.1 * epoch}

    made = []
    for epoch in range(5):
        record = {"epoch": epoch, "val": {name: 0.1 * epoch for name in ("overall", *groups)}}
        if epoch % 2 == 0:
            record["collapse"] = collapse(epoch) | {"groups": {name: collapse(epoch) for name in groups}}
            record["train"] = {name: math.nan if name == "minority" else 0.2 * epoch for name in ("overall", *groups)}
        made.append(record)
    return made


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_training_figure_shows_accuracy_and_collapse_against_epochs():
    accuracy, nc1, nc2, nc3 = training_figure(records(), title="t").axes
    assert nc1.get_yscale() == "log"
    shown = lines(accuracy)
    assert set(shown) == {f"{name}, {split}" for name in ("overall", *GROUPS) for split in ("val", "train")}
    np.testing.assert_allclose(shown["minority, val"], [(e, 10 * e) for e in range(5)])
    np.testing.assert_allclose(shown["overall, train"], [(e, 20 * e) for e in (0, 2, 4)])
    np.testing.assert_allclose(lines(nc1)["majority"], [(e, 10.0**-e) for e in (0, 2, 4)])
    np.testing.assert_allclose(lines(nc2)["overall"], [(e, 0.5) for e in (0, 2, 4)])
    np.testing.assert_allclose(lines(nc3)["overall"], [(0, np.nan), (2, 0.2), (4, 0.4)])


def test_training_figure_without_groups_or_validation():
    bare = [{key: value for key, value in record.items() if key != "val"} for record in records(groups=())]
    assert set(lines(training_figure(bare, title="t").axes[0])) == {"overall, train"}


def test_residual_figure_shows_median_band_and_tolerance():
    trace = np.logspace(0, -4, 6)[:, None] * np.linspace(1, 3, 101)
    (axes,) = residual_figure(trace, tol=1e-3, title="t").axes
    assert axes.get_yscale() == "log"
    np.testing.assert_allclose(lines(axes)["median image"], [(i + 1, 2 * 10 ** (-0.8 * i)) for i in range(6)])
    band = axes.collections[0].get_paths()[0].vertices
    for i, factor in ((0, 1.2), (5, 2.8)):
        assert np.isclose(band, [i + 1, factor * 10 ** (-0.8 * i)]).all(1).any()
    assert "tolerance 0.001" in lines(axes)


@pytest.mark.parametrize("samples", [0, 7])
def test_save_figures_writes_pictures_with_residuals_only_for_a_solver(tmp_path, samples):
    torch.manual_seed(0)
    moments = ClassMoments(3, 4)
    moments.update(torch.randn(30, 4), torch.arange(30) % 3)
    report = measure(moments, torch.randn(3, 4), groups={"majority": [0], "minority": [1, 2]})
    log = type("Log", (), {"trace": torch.rand(6, samples), "__len__": lambda self: samples})()
    save_figures(tmp_path / "f", records(), report, log, tol=1e-3, class_names=("a", "b", "c"), title="t")
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert names == {"training.png", "gram.png"} | ({"residual.png"} if samples else set())
    for name in names:
        picture = np.asarray(Image.open(tmp_path / "f" / name).convert("L"))
        assert min(picture.shape) > 400 and picture.std() > 10
