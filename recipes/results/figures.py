"""Pictures of a run. They are drawn on figures of their own; pyplot and its global state are left alone."""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from nc_probe import CollapseReport
from nc_probe.output.labels import label
from nc_probe.plots import plot_grams
from recipes.results.calibration import calibration_error
from timm_deq import SolveLog, Status

# Okabe & Ito (2008): told apart by readers of any colour vision.
COLORS = {"overall": "#000000", "majority": "#0072B2", "minority": "#D55E00"}
_CLASS_COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #F0E442 #000000 #999999 #882255".split()
COLORS |= {"many": "#0072B2", "medium": "#009E73", "few": "#D55E00"}
_STYLE: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
_FLOOR = 1e-16  # where a residual of 0 is drawn on a logarithmic axis


Drawing = Callable[[], Figure]
"""A figure yet to be drawn."""


FORMATS = ("png", "svg", "pdf")


def save_figures(
    folder: Path, figures: Mapping[str, Drawing], *, format: str = "png", dpi: int = 150, **settings: Any
) -> None:
    """Draw figures, by name, into a folder, each as NAME.png or of another of the FORMATS, complete or absent.

    One that fails is left out with a warning, as the numbers that it shows are on the disk before. `settings` are those
    of matplotlib's `savefig`.
    """
    for name, draw in figures.items():
        path, draft = folder / f"{name}.{format}", folder / f".{name}.{format}.draft"
        try:
            folder.mkdir(exist_ok=True)
            draw().savefig(draft, format=format, dpi=dpi, **settings)
            os.replace(draft, path)
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            message = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: {path} is not drawn: {message}", file=sys.stderr)


def run_figures(
    records: Sequence[dict[str, Any]],
    report: CollapseReport,
    log: SolveLog,
    *,
    tol: float | None,
    class_names: Sequence[str],
    title: str,
    anytime: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Drawing]:
    """Figures of a run, by name, yet to be drawn: training, gram and, for a model that solves, residual and steps.

    Args:
        records: lines of metrics.jsonl.
        report: of the training images.
        log: of the solves of the test images.
        tol: residual at which the solver stops.
        class_names: K names.
        title: the run in words.
        anytime: points for `anytime_figure`; none for no such figure.
    """
    found: dict[str, Drawing] = {
        "training": partial(training_figure, records, title=title),
        "gram": partial(plot_grams, report, class_names=class_names, title=f"{title}: cosines between classes"),
    }
    if len(log):
        found["residual"] = partial(
            residual_figure, log.trace.numpy(), tol=tol, title=f"{title}: residual on test images"
        )
        found["steps"] = partial(convergence_figure, log, title=f"{title}: solves of test images")
    if anytime:
        found["anytime"] = partial(anytime_figure, anytime, title=title)
    return found


def training_figure(records: Sequence[dict[str, Any]], *, title: str) -> Figure:
    """Accuracy and NC1..NC3 against epochs.

    Args:
        records: lines of metrics.jsonl. Accuracies are under 'val' and 'train', measurements of collapse under
            'collapse'.
        title: above all.
    """
    figure = Figure(figsize=(10, 6.8), layout="constrained")
    figure.suptitle(label(title, most=90), fontsize=13)
    panels = figure.subplots(2, 2, sharex=True).flat
    _accuracy_panel(panels[0], records)
    _collapse_panel(panels[1], records, "nc1", "NC1: spread within classes, relative to between")
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panels[1].yaxis.set_major_formatter("{x:.2g}")
    panels[1].yaxis.set_minor_formatter(NullFormatter())
    _collapse_panel(panels[2], records, "nc2_etf", "NC2: distance of class means to a simplex ETF")
    _collapse_panel(panels[3], records, "nc3", "NC3: distance of classifier to class means")
    for axes in panels[2:]:
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
    return figure


def _accuracy_panel(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for split, dashes, marker in (("val", "-", ""), ("train", ":", "o")):
        measured = [record for record in records if record.get(split)]
        for group in measured[0][split] if measured else ():
            epochs = [record["epoch"] for record in measured]
            values = [100 * record[split][group] for record in measured]
            axes.plot(
                epochs,
                values,
                color=COLORS.get(group),
                linestyle=dashes,
                marker=marker,
                markersize=3,
                label=f"{label(group)}, {split}",
            )
    _finish(axes, "Accuracy on validation and training images", "%")
    axes.set_ylim(top=102)


def _collapse_panel(axes: Axes, records: Sequence[dict[str, Any]], key: str, title: str) -> None:
    measured = [record for record in records if record.get("collapse")]
    epochs = [record["epoch"] for record in measured]
    for group in ["overall", *(measured[0]["collapse"]["groups"] if measured else ())]:
        reports = [r["collapse"] if group == "overall" else r["collapse"]["groups"][group] for r in measured]
        values = [math.nan if report[key] is None else report[key] for report in reports]
        axes.plot(epochs, values, color=COLORS.get(group), label=label(group), **_STYLE)
    _finish(axes, title, "")


def residual_figure(trace: np.ndarray, *, tol: float | None, title: str) -> Figure:
    """Residual of the fixed point against evaluations, over samples.

    Args:
        trace: relative residual of each sample after each evaluation, (T, N).
        tol: residual at which the solver stops.
        title: above the picture.
    """
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(trace) + 1)
    low, median, high = np.nanpercentile(trace, [10, 50, 90], axis=1)
    axes.fill_between(steps, low, high, color=COLORS["majority"], alpha=0.2, linewidth=0, label="10 to 90 % of images")
    axes.plot(steps, median, color=COLORS["majority"], label="median image", **_STYLE)
    if tol is not None:
        axes.axhline(tol, color=COLORS["minority"], linestyle="--", linewidth=1.4, label=f"tolerance {tol:g}")
    axes.set_yscale("log")
    axes.set_xlabel("evaluations of f")
    _finish(axes, title, "‖f(z) − z‖ / ‖f(z)‖")
    return figure


def convergence_figure(log: SolveLog, *, title: str) -> Figure:
    """Histograms over samples of the evaluations that their solves took and of the residuals they ended with.

    Args:
        log: of a model that solves; forward and, where there were any, backward solves are shown.
        title: above all.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(label(title, most=90), fontsize=13)
    left, right = figure.subplots(1, 2)
    solves = {"forward": (log.steps, log.residual, log.status, COLORS["majority"])}
    if len(log.backward_steps):
        solves["backward"] = (log.backward_steps, log.backward_residual, log.backward_status, COLORS["minority"])
    longest = max(int(steps.max()) for steps, *_ in solves.values())
    finite = {name: residual[residual.isfinite()].clamp_min(_FLOOR) for name, (_, residual, *_) in solves.items()}
    known = torch.cat(list(finite.values())).log10()
    low, high = (math.floor(known.min()), math.floor(known.max()) + 1) if len(known) else (-3, 0)
    bins = np.logspace(low, high, 10 * (high - low) + 1)  # ten a decade
    for name, (steps, _, status, color) in solves.items():
        counts, edges = np.histogram(steps.numpy(), np.arange(0.5, longest + 1))
        # Outlines, as forward and backward solves lie over one another.
        left.stairs(counts, edges, color=color, linewidth=1.8, label=f"{name}, mean {steps.double().mean():.1f}")
        share = (status == Status.CONVERGED).double().mean()
        counts, edges = np.histogram(finite[name].numpy(), bins)
        ended = f"{name}, {share:.1%} of {len(status)} converged"
        right.stairs(counts, edges, color=color, linewidth=1.8, label=ended)
    left.margins(y=0.25)  # room for the legends
    right.margins(y=0.25)
    left.set_xlabel("evaluations of f")
    right.set_xlabel("‖f(z) − z‖ / ‖f(z)‖")
    _finish(left, "Evaluations until a sample was done", "samples")
    _finish(right, "Residual at the end", "samples")
    right.set_xscale("log")  # after _finish, whose ticks are whole numbers
    return figure


def anytime_figure(points: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Accuracy against the budget of the solver, overall and by group.

    Args:
        points: one for each budget, in rising order: 'max_steps' and, by group, 'accuracy' (NaN where there is none).
        title: above the picture.
    """
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    budgets = [point["max_steps"] for point in points]
    for group in points[0]["accuracy"]:
        values = [100 * point["accuracy"][group] for point in points]
        axes.plot(budgets, values, color=COLORS.get(group), label=label(group), **_STYLE)
    _finish(axes, title, "accuracy, %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, labels=[str(budget) for budget in budgets])
    axes.set_xlabel("evaluations of f, at most")
    axes.set_ylim(0, 102)
    return figure


def reliability_figure(bins: np.ndarray, *, title: str) -> Figure:
    """Accuracy against confidence, with the part of the images in each bin beside it.

    Args:
        bins: table of `recipes.results.calibration`, (K, M, 3).
        title: above the picture.
    """
    images, right, confidence = bins.sum(0).T
    edges = np.linspace(0, 1, len(images) + 1)
    known, error = images > 0, calibration_error(bins)
    figure = Figure(figsize=(5.5, 5.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    accuracy = np.divide(right, images, out=np.zeros(len(images)), where=known)
    upper.bar(edges[:-1], accuracy, np.diff(edges), align="edge", color=COLORS["majority"], alpha=0.6, label="accuracy")
    upper.plot(
        confidence[known] / images[known], accuracy[known], "o", color=COLORS["minority"], label="mean confidence"
    )
    upper.plot([0, 1], [0, 1], "--", color=COLORS["overall"], linewidth=1, label="calibrated")
    lower.bar(
        edges[:-1], images / max(images.sum(), 1), np.diff(edges), align="edge", color=COLORS["majority"], alpha=0.6
    )
    _finish(upper, f"{title}: ECE {error:.3f}", "accuracy")
    _finish(lower, "", "part of images")
    lower.set_xlabel("confidence")
    lower.set_xticks(np.linspace(0, 1, 6))
    upper.set_xlim(0, 1)
    return figure


def head(axes: Axes, title: str) -> None:
    """Put a title above a panel, no longer than the figure is wide."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.set_title(label(title, most=int(12 * (figure.get_figwidth() - 1))), fontsize=10.5, loc="left")


def _finish(axes: Axes, title: str, unit: str) -> None:
    head(axes, title)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
