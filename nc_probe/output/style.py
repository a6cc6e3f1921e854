"""The look of figures: sizes, colours, axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nc_probe.output.labels import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MAX_TICKS", "blank_figure", "finish_axes", "group_colors", "round_step", "scale_values"]

# Groups in their order, after all classes in black. Okabe & Ito (2008): told apart by readers of any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")

# Names along an axis.
MAX_TICKS = 12


def blank_figure(width: float, height: float, title: str | None) -> Figure:
    """Make a figure of a size in inches, under a title.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("nc_probe.plots needs matplotlib: pip install 'timm-deq[recipes]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(label(title, most=90), fontsize=12)
    return figure


def group_colors(groups: Sequence[Any] | Mapping[str, Any]) -> list[str]:
    """List a colour for each group."""
    return [COLORS[i % len(COLORS)] for i in range(len(groups))]


def finish_axes(ax: Axes, title: str, along: str) -> None:
    """Write the title and what is along the axis, and take away what is of no use."""
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.set_xlabel(along)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def round_step(places: int) -> int:
    """Find the least of 1, 2, 5, 10, 20, ... that makes at most MAX_TICKS steps of so many places."""
    return next(step for step in (d * 10**k for k in range(18) for d in (1, 2, 5)) if places <= step * MAX_TICKS)


def scale_values(ax: Axes) -> None:
    """Put what spans a factor of ten or more on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [float(y) for line in ax.get_lines() for y in line.get_xydata()[:, 1] if math.isfinite(y)]  # pyright: ignore
    if values and min(values) > 0 and max(values) >= 10 * min(values):
        ax.set_yscale("log")
        if max(values) < 1e3 * min(values):
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif values:
        ax.set_ylim(0, 1.08 * max(values) or 1)
