"""The pictures show the numbers they are given."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from nc_probe import ClassMoments, measure
from recipes.results.figures import convergence_figure, residual_figure, run_figures, save_figures, training_figure
from timm_deq import Equilibrium, Picard, SolveLog

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


class Halving(torch.nn.Module):
    def forward(self, z, x):
        return torch.where(x > 1, torch.inf, z / 2 + x)  # fails for some


def log_of(x, *, backward=False):
    """From zero z = x, 1.5 x: residuals 1, 1/3, 1/7; backward, which starts from the gradient, 1/3, 1/7."""
    layer = Equilibrium(Halving(), solver=Picard(0.3, 4))
    with SolveLog(layer) as log:
        if len(x):
            z = layer(x.requires_grad_(backward))
        if backward:
            z.sum().backward()
    return log


def bars(axes):
    """Height and extent of every bar that shows, by legend entry."""
    found = {}
    for patch in axes.patches:
        heights, edges, _ = patch.get_data()
        shown = zip(heights, edges[:-1], edges[1:], strict=True)
        found[patch.get_label()] = [bar for bar in shown if bar[0]]
    assert list(found) == [text.get_text() for text in axes.get_legend().get_texts()]
    return found


@pytest.mark.parametrize("backward", [False, True])
def test_convergence_figure_counts_samples(backward):
    x = torch.ones(5, 1)
    x[0] = 2  # fails at the first evaluation, and has no residual
    log = log_of(x[1:], backward=True) if backward else log_of(x)
    steps, residuals = (bars(axes) for axes in convergence_figure(log, title="t").axes)
    assert convergence_figure(log, title="t").axes[1].get_xscale() == "log"
    if backward:
        assert steps == {"forward, mean 3.0": [(4, 2.5, 3.5)], "backward, mean 2.0": [(4, 1.5, 2.5)]}
        assert list(residuals) == ["forward, 100.0% of 4 converged", "backward, 100.0% of 4 converged"]
    else:
        assert steps == {"forward, mean 2.6": [(1, 0.5, 1.5), (4, 2.5, 3.5)]}
        assert list(residuals) == ["forward, 80.0% of 5 converged"]
    for ((count, low, high),) in residuals.values():
        assert count == 4 and low < 1 / 7 < high


def test_convergence_figure_of_exact_and_of_failed_solves():
    exact, failed = log_of(torch.zeros(3, 1)), log_of(torch.full((2, 1), 2.0))
    assert list(bars(convergence_figure(exact, title="t").axes[1])) == ["forward, 100.0% of 3 converged"]
    ((count, low, _),) = bars(convergence_figure(exact, title="t").axes[1])["forward, 100.0% of 3 converged"]
    assert count == 3 and low > 0
    assert bars(convergence_figure(failed, title="t").axes[1]) == {"forward, 0.0% of 2 converged": []}


@pytest.mark.parametrize("samples", [0, 7])
def test_save_figures_writes_pictures_with_residuals_only_for_a_solver(tmp_path, samples):
    torch.manual_seed(0)
    moments = ClassMoments(3, 4)
    moments.update(torch.randn(30, 4), torch.arange(30) % 3)
    report = measure(moments, torch.randn(3, 4), groups={"majority": [0], "minority": [1, 2]})
    log = log_of(torch.rand(samples, 1))
    figures = run_figures(records(), report, log, tol=1e-3, class_names=("a", "b", "c"), title="t")
    save_figures(tmp_path / "f", figures)
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert names == {"training.png", "gram.png"} | ({"residual.png", "steps.png"} if samples else set())
    for name in names:
        picture = np.asarray(Image.open(tmp_path / "f" / name).convert("L"))
        assert min(picture.shape) > 400 and picture.std() > 10
