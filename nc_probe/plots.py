"""Pictures of a report. Needs matplotlib; draws on figures of its own and leaves pyplot alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nc_probe.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_grams"]

# Up to this many classes the cells are labelled with their values, and the axes with the classes.
MAX_VALUES, MAX_NAMES = 12, 40


def plot_grams(report: CollapseReport, *, class_names: Sequence[str] | None = None, title: str | None = None) -> Figure:
    """Cosines of all pairs of centred class means, and of classifier rows, side by side.

    Classes stand in the order of the report's groups, with lines between groups. At collapse both pictures are one
    colour off the diagonal, that of -1/(K-1), which the colour bar marks; merged minority classes are a dark red
    block.

    Args:
        report: of all classes, or of a group.
        class_names: K names. Default: the class numbers.
        title: above both.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: the report holds no class means, or there are too few names.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("nc_probe.plots needs matplotlib: pip install 'timm-deq[recipes]'") from error
    gram = report.gram
    if gram is None:
        raise ValueError("report must hold class means, got a report without samples")
    order, spans = _order(report)
    total = max(order) + 1
    if class_names is not None and len(class_names) < total:
        raise ValueError(f"class_names must name {total} classes, got {len(class_names)}")
    names = [str(k) if class_names is None else class_names[k] for k in order]

    position = {k: i for i, k in enumerate(report.classes)}
    rows = torch.tensor([position[k] for k in order])
    panels = [("class means (centred)", gram[rows][:, rows])]
    if report.gram_weight is not None:
        panels.append(("classifier rows", report.gram_weight[rows][:, rows]))

    figure = Figure(figsize=(4.6 * len(panels) + 1.0, 5.1), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    colors = ScalarMappable(Normalize(-1, 1), "RdBu_r")
    for ax, (label, gram) in zip(axes, panels, strict=True):
        ax.imshow(gram.numpy(), cmap=colors.cmap, norm=colors.norm, interpolation="nearest")
        ax.set_title(label, fontsize=11, pad=20 if spans else 6)
        _annotate(ax, gram, spans)
        _name_axes(ax, names, left=ax is axes[0])
    bar = figure.colorbar(colors, ax=list(axes), shrink=0.82, label="cosine")
    if len(order) > 1:
        ideal = -1 / (len(order) - 1)
        bar.ax.axhline(ideal, color="black", linewidth=1.5)
        bar.ax.text(-0.15, ideal, "ETF", ha="right", va="center", fontsize=8, transform=bar.ax.get_yaxis_transform())
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def _order(report: CollapseReport) -> tuple[list[int], list[tuple[str, int]]]:
    """The classes, those of each group together, and (name, first position) of the groups; "" if in no group."""
    order: list[int] = []
    spans: list[tuple[str, int]] = []
    for name, classes in [*((name, group.classes) for name, group in report.groups.items()), ("", report.classes)]:
        fresh = [k for k in classes if k not in order]
        if fresh and report.groups:
            spans.append((name, len(order)))
        order += fresh
    return order, spans


def _annotate(ax: Axes, gram: torch.Tensor, spans: list[tuple[str, int]]) -> None:
    """Lines between groups, their names above, and the values where there is room."""
    m = len(gram)
    ends = [start for _, start in spans[1:]] + [m]
    for (name, start), end in zip(spans, ends, strict=True) if spans else ():
        ax.text((start + end - 1) / 2, -0.5 - 0.015 * m, name, ha="center", va="bottom", fontsize=9, color="0.3")
        if start:
            ax.axhline(start - 0.5, color="black", linewidth=1.2)
            ax.axvline(start - 0.5, color="black", linewidth=1.2)
    if m <= MAX_VALUES:
        for i, row in enumerate(gram.tolist()):
            for j, value in enumerate(row):
                if i != j and math.isfinite(value):
                    text = f"{value:.2f}".replace("0.", ".")
                    color = "white" if abs(value) > 0.6 else "black"
                    ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=color)


def _name_axes(ax: Axes, names: list[str], *, left: bool) -> None:
    shown = names if len(names) <= MAX_NAMES else []
    ax.tick_params(length=0, labelsize=8)
    ax.set_xticks(range(len(shown)), shown, rotation=90 if max(map(len, names)) > 2 else 0)
    ax.set_yticks(range(len(shown)) if left else [], shown if left else [])
