"""Pictures of two reports beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nc_probe.moments.precision import cpu_by_default
from nc_probe.output.labels import label
from nc_probe.output.style import blank_figure, finish_axes, group_colors, scale_values
from nc_probe.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_compare"]

MEASURES = {
    "nc1": "NC1: spread within / between",
    "cdnv": "CDNV",
    "nc2_etf": "NC2: means to simplex ETF",
    "nc2_etf_weight": "NC2: classifier to simplex ETF",
    "nc3": "NC3: classifier to means",
    "mean_cosine": "mean cosine of means",
    "nc4": "NC4: agreement",
    "accuracy": "accuracy",
}
COLUMNS = 4


@cpu_by_default()
def plot_compare(
    first: CollapseReport,
    second: CollapseReport,
    *,
    labels: Sequence[str] = ("first", "second"),
    title: str | None = None,
) -> Figure:
    """NC1 to NC4, CDNV, mean cosine and accuracy of two reports, for all classes and for each group of either.

    An arrow goes from the first, a ring, to the second, a disc. A measure that spans a factor of ten or more is on a
    logarithmic axis; what is undefined is left out.

    Args:
        first: e.g. of an explicit network, or of an early epoch.
        second: e.g. of an equilibrium, or of a late epoch.
        labels: names of the two.
        title: above all.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: labels are not two.
        ImportError: matplotlib is missing.
    """
    if isinstance(labels, str) or len(labels) != 2:
        raise ValueError(f"labels must be two names, got {labels!r}")
    names = [None, *dict.fromkeys([*first.groups, *second.groups])]
    pairs = [(r if name is None else r.groups.get(name)) for name in names for r in (first, second)]
    keys = [key for key in MEASURES if any(part and math.isfinite(getattr(part, key)) for part in pairs)]
    columns = min(len(keys), COLUMNS) or 1
    rows = math.ceil(len(keys) / columns) or 1
    figure = blank_figure(2.6 * columns + 0.6, 3.1 * rows + 0.5, title)
    from matplotlib.lines import Line2D

    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, key in zip(axes, keys, strict=False):
        for place, color in enumerate(["black", *group_colors(names[1:])]):
            _draw(ax, place, [getattr(part, key, math.nan) for part in pairs[2 * place : 2 * place + 2]], color)
        finish_axes(ax, MEASURES[key], "")
        if key != "mean_cosine":
            scale_values(ax)
        shown = ["all", *(label(name, most=16) for name in names[1:] if name)]
        ax.set_xticks(range(len(names)), shown, rotation=90 if max(map(len, shown)) * len(shown) > 20 else 0)
        ax.set_xlim(-0.5, len(names) - 0.5)
    for ax in axes[len(keys) :]:
        ax.remove()
    kinds = [
        Line2D([], [], color="0.3", marker="o", markerfacecolor=face, linestyle="", label=label(str(name), most=40))
        for name, face in zip(labels, ("white", "0.3"), strict=True)
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _draw(ax: Axes, place: int, values: Sequence[float], color: str) -> None:
    """Draw the two values of a group, an arrow from the first to the second where there are both."""
    first, second = (value if math.isfinite(value) else math.nan for value in values)
    if math.isfinite(first) and math.isfinite(second):
        arrow = {"arrowstyle": "->", "color": color, "shrinkA": 5, "shrinkB": 4, "linewidth": 1.2}
        ax.annotate("", (place + 0.12, second), (place - 0.12, first), arrowprops=arrow)
    ax.plot(place - 0.12, first, "o", color=color, markerfacecolor="white", markersize=7)
    ax.plot(place + 0.12, second, "o", color=color, markersize=7)
