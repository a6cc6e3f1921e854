"""Pictures of collapse from place to place in a model: against depth, and along the solve of an equilibrium."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from nc_probe.output.labels import label
from nc_probe.output.style import MAX_TICKS, blank_figure, finish_axes, group_colors, scale_values
from nc_probe.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_depth", "plot_iterates"]

CURVES = (
    ("NC1: spread within classes / between", "nc1"),
    ("NC2: distance to simplex ETF", "nc2"),
    ("CDNV", "cdnv"),
    ("nearest class mean: accuracy", "center_accuracy"),
    ("NC4: agreement with the final decision", "nc4"),
    ("participation ratio", "participation_ratio"),
)
PANELS = 3  # side by side


def plot_depth(report: CollapseReport, *, title: str | None = None) -> Figure:
    """Collapse of all classes and of each group against depth: layer by layer, and at last the features.

    NC1, NC2 and CDNV; where the features of layers were kept, how many samples the nearest class mean gets right, and
    on how many it agrees with the final decision; the participation ratio, which falls in the layers that make a
    tunnel. A measure that spans a factor of ten or more is on a logarithmic axis. What is undefined leaves a gap.

    Args:
        report: with `layers`.
        title: above all.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: the report holds no layers.
        ImportError: matplotlib is missing.
    """
    if not report.layers:
        raise ValueError("report must hold layers, got none: NCProbe(model, layers='stages') measures them")
    return _curves({"layer": [*report.layers.items(), ("features", report)]}, title)


def plot_iterates(report: CollapseReport, *, title: str | None = None) -> Figure:
    """Collapse of all classes and of each group against the iterates of a solve, from its input H0 to z*.

    Measures and axes are as in `plot_depth`. A model with several equilibrium layers has panels for each.

    Args:
        report: with `iterates`.
        title: above all.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: the report holds no iterates.
        ImportError: matplotlib is missing.
    """
    if not report.iterates:
        raise ValueError("report must hold iterates, got none: NCProbe(model, iterates=True) measures them")
    solves: dict[str, list[tuple[str, CollapseReport]]] = {}
    for name, place in report.iterates.items():
        layer, _, step = name.rpartition(".")
        solves.setdefault(f"iterate of {layer}" if layer else "iterate", []).append((step, place))
    return _curves(solves, title)


def _curves(rows: Mapping[str, Sequence[tuple[str, CollapseReport]]], title: str | None) -> Figure:
    """Panels for each sequence of named reports, under what its places are; none for a measure that they lack."""
    shown = [
        (kind, places, [curve for curve in CURVES if any(map(math.isfinite, _values(places, curve[1], None)))])
        for kind, places in rows.items()
    ]
    *tops, height = accumulate((max(math.ceil(len(curves) / PANELS), 1) for *_, curves in shown), initial=0)
    figure = blank_figure(11, 3.6 * height, title)
    grid = figure.add_gridspec(height, PANELS)
    for (kind, places, curves), top in zip(shown, tops, strict=True):
        for i, (measure, key) in enumerate(curves):
            ax = figure.add_subplot(grid[top + i // PANELS, i % PANELS])
            _draw_curves(ax, places, key)
            finish_axes(ax, measure, label(kind, most=40))
            scale_values(ax)
            if i == 0 and places[-1][1].groups:
                ax.legend(frameon=False, fontsize=8.5)
    return figure


def _draw_curves(ax: Axes, places: Sequence[tuple[str, CollapseReport]], key: str) -> None:
    """Draw a measure of all classes and of the groups that have it, from place to place."""
    groups = places[-1][1].groups
    for name, color in zip((None, *groups), ("black", *group_colors(groups)), strict=True):
        values = _values(places, key, name)
        if name is None or any(map(math.isfinite, values)):
            values = [value if math.isfinite(value) else math.nan for value in values]
            shown = label(name) if name else "all"
            ax.plot(range(len(places)), values, color=color, label=shown, marker="o", markersize=3.5)
    # The last place is always named, and none so near before it that their names would meet.
    step = math.ceil(len(places) / MAX_TICKS)
    ticks = [*range(0, len(places) - step, step), len(places) - 1]
    names = [label(places[i][0]) for i in ticks]
    ax.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 3 else 0)


def _values(places: Sequence[tuple[str, CollapseReport]], key: str, group: str | None) -> list[float]:
    """A measure of all classes (no group) or of a group, from place to place."""
    return [getattr(report if group is None else report.groups[group], key) for _, report in places]
