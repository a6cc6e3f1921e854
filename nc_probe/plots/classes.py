"""Pictures of the measures of each class against how frequent it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nc_probe.moments.precision import cpu_by_default
from nc_probe.output.labels import label
from nc_probe.output.style import blank_figure, finish_axes, group_colors, round_step
from nc_probe.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_classes"]

MEASURES = {
    "class_count": "samples",
    "class_accuracy": "accuracy",
    "class_nc1": "NC1: spread within the class / between classes",
    "class_variance": "variance of the class",
    "class_norm": "norm of the class mean (centred)",
    "class_norm_weight": "norm of the classifier row",
    "class_nc3_cosine": "NC3: cosine of classifier row and class mean",
}

# Up to this many classes all have their names; more than this many have no bar each.
MAX_NAMES, MAX_BARS = 25, 125


@cpu_by_default()
def plot_classes(
    report: CollapseReport, *, class_names: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Bars of each class, the most frequent first: samples, accuracy, NC1, norms and NC3, coloured by group.

    Where NC1 is not known by class the variance is shown. At collapse NC1 is 0, norms are equal, and NC3 is 1. Of
    more than 125 classes a bar is the mean of some that follow one another, with a line from the least to the greatest.

    Args:
        report: of all classes, or of a group.
        class_names: K names. Default: the class numbers.
        title: above all.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: the report holds no classes, or there are too few names.
        ImportError: matplotlib is missing.
    """
    if not report.classes:
        raise ValueError("report must hold classes with samples, got none")
    if class_names is not None and len(class_names) <= max(report.classes):
        raise ValueError(f"class_names must name {max(report.classes) + 1} classes, got {len(class_names)}")
    order = sorted(range(len(report.classes)), key=lambda i: -report.class_count[i])
    values = {key: torch.tensor(getattr(report, key), dtype=torch.float64) for key in MEASURES}
    values = {key: v[order] for key, v in values.items() if len(v) == len(order) and v.isfinite().any()}
    if "class_nc1" in values:
        del values["class_variance"]
    figure = blank_figure(9, 1.6 * len(values) + 1.2, title)
    axes = figure.subplots(len(values), 1, squeeze=False, sharex=True)[:, 0]
    block = math.ceil(len(order) / MAX_BARS)
    colors = _colors(report, order)
    for ax, (key, value) in zip(axes, values.items(), strict=False):
        _bars(ax, value, block, colors)
        finish_axes(ax, MEASURES[key], "")
        ax.set_axisbelow(True)
    step = 1 if len(order) <= MAX_NAMES else round_step(len(order))
    classes = [report.classes[i] for i in order[::step]]
    names = [label(class_names[k], most=16, instead=str(k)) if class_names else str(k) for k in classes]
    axes[-1].set_xticks(range(0, len(order), step), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=8)
    axes[-1].set_xlabel("classes, most frequent first" + f", in blocks of {block}" * (block > 1))
    if report.groups:
        for name, color in zip(report.groups, group_colors(report.groups), strict=True):
            axes[0].bar(0, 0, color=color, label=label(name))
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def _colors(report: CollapseReport, order: Sequence[int]) -> list[str]:
    """The colour of each class, that of the first group that it is in."""
    found: dict[int, str] = {}
    for group, color in zip(report.groups.values(), group_colors(report.groups), strict=True):
        for k in group.classes:
            found.setdefault(k, color)
    return [found.get(report.classes[i], "0.45") for i in order]


def _bars(ax: Axes, values: Tensor, block: int, colors: Sequence[str]) -> None:
    """Draw a bar for each class, or for a block of them, on a logarithmic axis where they differ by much."""
    parts = values.split(block)
    means = torch.stack([part.nanmean() for part in parts])
    middles = [start + (len(part) - 1) / 2 for start, part in zip(range(0, len(values), block), parts, strict=True)]
    widths = [len(part) * (0.85 if len(parts) <= 50 else 1) for part in parts]
    known = values[values.isfinite()]
    if (known > 0).all() and known.max() > 20 * known.min():
        ax.set_yscale("log")
        ax.set_ylim(0.6 * float(known.min()), 1.5 * float(known.max()))
        ax.yaxis.set_major_formatter("{x:g}")
    ax.bar(middles, means.numpy(), widths, color=colors[::block])
    if block > 1:
        ends = torch.stack([torch.stack(part.nan_to_num(math.inf).aminmax()) for part in parts])
        ax.vlines(middles, *ends.T.numpy(), color="black", linewidth=0.5, alpha=0.6)
    ax.set_xlim(-0.6, len(values) - 0.4)
