"""Pictures of collapse from place to place in a model: against depth, and along the solve of an equilibrium."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nc_probe.output.labels import label
from nc_probe.output.style import MAX_TICKS, blank_figure, finish_axes, group_colors, scale_values
from nc_probe.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_depth", "plot_iterates"]

CURVES = (("NC1: spread within classes / between", "nc1"), ("NC2: distance to simplex ETF", "nc2"), ("CDNV", "cdnv"))


def plot_depth(report: CollapseReport, *, title: str | None = None) -> Figure:
    """NC1, NC2 and CDNV of all classes and of each group against depth: layer by layer, and at last the features.

    A measure that spans a factor of ten or more is on a logarithmic axis. What is undefined leaves a gap.

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
    """NC1, NC2 and CDNV of all classes and of each group against the iterates of a solve, from its input H0 to z*.

    Axes are as in `plot_depth`. A model with several equilibrium layers has a row of panels for each.

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
    """A row of panels for each sequence of named reports, under what its places are."""
    figure = blank_figure(11, 3.6 * len(rows), title)
    for panels, (kind, places) in zip(figure.subplots(len(rows), 3, squeeze=False), rows.items(), strict=True):
        groups = places[-1][1].groups
        for ax, (measure, key) in zip(panels, CURVES, strict=True):
            for name, color in zip((None, *groups), ("black", *group_colors(groups)), strict=True):
                values = [getattr(r if name is None else r.groups[name], key) for _, r in places]
                values = [value if math.isfinite(value) else math.nan for value in values]
                shown = label(name) if name else "all"
                ax.plot(range(len(places)), values, color=color, label=shown, marker="o", markersize=3.5)
            finish_axes(ax, measure, label(kind, most=40))
            scale_values(ax)
            # The last place is always named, and none so near before it that their names would meet.
            step = math.ceil(len(places) / MAX_TICKS)
            ticks = [*range(0, len(places) - step, step), len(places) - 1]
            names = [label(places[i][0]) for i in ticks]
            ax.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 3 else 0)
        if groups:
            panels[0].legend(frameon=False, fontsize=8.5)
    return figure
