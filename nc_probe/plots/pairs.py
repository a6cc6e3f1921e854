"""Pictures of classes two by two: the cosines of all pairs, and how their angles are distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nc_probe.measures.geometry import simplex_etf_cosine
from nc_probe.measures.pairwise import TILE, unit
from nc_probe.moments.precision import cpu_by_default
from nc_probe.output.labels import label
from nc_probe.output.style import MAX_TICKS, blank_figure, finish_axes, group_colors
from nc_probe.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_angles", "plot_grams"]

ORDERS = ("group", "frequency")

# Up to this many classes the cells are labelled with their values, and the axes with the classes.
MAX_VALUES, MAX_NAMES = 12, 40

# Angles are counted in steps of half a degree, and shown in bars of the first width that makes at most MAX_BARS.
STEP, WIDTHS, MAX_BARS = 0.5, (1, 2, 5), 40


@cpu_by_default()
def plot_grams(
    report: CollapseReport,
    *,
    order: str = "group",
    class_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Cosines of all pairs of centred class means, and of classifier rows, side by side.

    At collapse both pictures are one colour off the diagonal, that of -1/(K-1), which the colour bar marks; merged
    minority classes are a dark red block. Of more than 40 classes, whose cosines lie close together, white is -1/(K-1)
    and the darkest colours are as far from it as all but 1 % of the pairs are.

    Args:
        report: of all classes, or of a group.
        order: of the classes: "group" (those of each group of the report together, with lines between groups) or
            "frequency" (by falling number of samples).
        class_names: K names. Default: the class numbers.
        title: above both.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: the report holds no class means, there are too few names, or an unknown order.
        ImportError: matplotlib is missing.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    gram = report.gram
    if gram is None:
        raise ValueError("report must hold class means, got a report without samples")
    position = {k: i for i, k in enumerate(report.classes)}
    if order == "frequency":
        classes, spans = sorted(report.classes, key=lambda k: -report.class_count[position[k]]), []
    else:
        classes, spans = _by_group(report)
    total = max(classes) + 1
    if class_names is not None and len(class_names) < total:
        raise ValueError(f"class_names must name {total} classes, got {len(class_names)}")
    names = [str(k) if class_names is None else label(str(class_names[k]), most=16, instead=str(k)) for k in classes]

    rows = torch.tensor([position[k] for k in classes])
    panels = [("class means (centred)", gram[rows][:, rows])]
    if report.gram_weight is not None:
        panels.append(("classifier rows", report.gram_weight[rows][:, rows]))

    figure = blank_figure(4.6 * len(panels) + 1.0, 5.1, title)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    low, high = _color_limits([matrix for _, matrix in panels], report.num_classes)
    colors = ScalarMappable(Normalize(low, high), "RdBu_r")
    for ax, (panel, gram) in zip(axes, panels, strict=True):
        ax.imshow(gram.numpy(), cmap=colors.cmap, norm=colors.norm, interpolation="nearest")
        ax.set_title(panel, fontsize=11, pad=20 if spans else 6)
        _annotate(ax, gram, spans)
        _name_axes(ax, names, left=ax is axes[0])
        if order == "frequency":
            ax.set_xlabel("classes, most frequent first", fontsize=9)
    extend = "neither" if low == -1 else "both"
    bar = figure.colorbar(colors, ax=list(axes), shrink=0.82, label="cosine", extend=extend)
    if len(classes) > 1:
        ideal = simplex_etf_cosine(report.num_classes)
        bar.ax.axhline(ideal, color="black", linewidth=1.5)
        bar.ax.text(-0.15, ideal, "ETF", ha="right", va="center", fontsize=8, transform=bar.ax.get_yaxis_transform())
    figure.draw_without_rendering()  # the layout knows how large squares come out at its second pass alone
    return figure


@cpu_by_default()
def plot_angles(report: CollapseReport, *, title: str | None = None) -> Figure:
    """Histograms of the angles of all pairs of centred class means, and of classifier rows, in degrees.

    Pairs within each group of the report, and pairs in no group together, are shown apart, each as its share. At
    collapse all stand at the angle of the simplex ETF, arccos(-1/(K-1)), which is marked; merged classes stand at 0.

    Args:
        report: of all classes, two or more of them with samples.
        title: above both.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: the report holds fewer than two class means.
        ImportError: matplotlib is missing.
    """
    if report.means is None or len(report.means) < 2:
        raise ValueError(f"report must hold two class means or more, got {len(report.classes)}")
    panels = [("class means (centred)", report.means)]
    if report.weight is not None:
        panels.append(("classifier rows", report.weight))
    figure = blank_figure(5.2 * len(panels), 3.9, title)
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]

    classes = torch.tensor(report.classes)
    members = [torch.isin(classes, torch.tensor(group.classes)) for group in report.groups.values()]
    labels = [*(f"within {label(name)}" for name in report.groups), "other pairs" if members else "all pairs"]
    counts = [_count_angles(rows, members) for _, rows in panels]
    etf = math.degrees(math.acos(simplex_etf_cosine(report.num_classes)))
    seen = STEP * torch.stack(counts).sum((0, 1)).nonzero()[:, 0]
    low, high = (min(float(seen.min()), etf), max(float(seen.max()), etf)) if len(seen) else (etf, etf)
    width = next((w for w in WIDTHS if high - low <= w * MAX_BARS), WIDTHS[-1])
    edges = torch.arange(0, 180 + width, width).numpy()
    for ax, (panel, _), count in zip(axes, panels, counts, strict=True):
        bars = count.view(len(count), -1, int(width / STEP)).sum(2)
        for name, bar, color in zip(labels, bars, [*group_colors(members), "black"], strict=True):
            pairs = int(bar.sum())
            if pairs:
                text = f"{name}: {pairs}"
                ax.stairs((100 * bar / pairs).numpy(), edges, label=text, color=color, linewidth=1.6)
        ax.axvline(etf, color="black", linestyle="--", linewidth=1.2, label=f"simplex ETF: {etf:.1f}°")
        finish_axes(ax, panel, "angle, degrees")
    axes[0].set_xlim(max(low - 2 * width, 0), min(high + 3 * width, 180))
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if tick <= 100])
    axes[0].set_ylim(0, 1.45 * axes[0].get_ylim()[1])  # room for the legends
    axes[0].set_ylabel("% of the pairs")
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
    return figure


def _color_limits(grams: Sequence[Tensor], num_classes: int) -> tuple[float, float]:
    """-1 and 1 for few classes; for many, symmetric about the simplex, as wide as 99 % of the pairs are from it."""
    m = len(grams[0])
    if m <= MAX_NAMES:
        return -1, 1
    ideal, step = simplex_etf_cosine(num_classes), math.ceil(m / 1000)
    rows, columns = torch.triu_indices(len(range(0, m, step)), len(range(0, m, step)), 1)
    apart = torch.cat([(gram[::step, ::step][rows, columns] - ideal).abs() for gram in grams])
    apart = apart[apart.isfinite()]
    reach = float(apart.kthvalue(math.ceil(0.99 * len(apart))).values) if len(apart) else 1.0
    return ideal - max(reach, 1e-3), ideal + max(reach, 1e-3)


def _count_angles(rows: Tensor, members: Sequence[Tensor]) -> Tensor:
    """Pairs of rows (m, d) by their angle in steps of STEP, (G + 1, 180 / STEP).

    Row g counts pairs within group g, whose members (m,) bool are given; the last, pairs that are in no group
    together. K x K cosines are never held.
    """
    bins, directions = round(180 / STEP), unit(rows)
    counts = torch.zeros(len(members) + 1, bins, dtype=torch.int64)
    for start in range(0, len(rows), TILE):
        cosines = directions[start : start + TILE] @ directions.T
        rest = cosines.isfinite() & torch.ones_like(cosines, dtype=torch.bool).triu(start + 1)
        bin = (cosines.clamp(-1, 1).acos().rad2deg() / STEP).nan_to_num().long().clamp(max=bins - 1)
        for g, member in enumerate(members):
            within = rest & member[start : start + TILE, None] & member
            counts[g] += torch.bincount(bin[within], minlength=bins)
        for member in members:
            rest = rest & ~(member[start : start + TILE, None] & member)
        counts[-1] += torch.bincount(bin[rest], minlength=bins)
    return counts


def _by_group(report: CollapseReport) -> tuple[list[int], list[tuple[str, int]]]:
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
        above = {"ha": "center", "va": "bottom", "fontsize": 9, "color": "0.3"}
        ax.text((start + end - 1) / 2, -0.5 - 0.015 * m, label(name, most=16), **above)
        if start:
            ax.axhline(start - 0.5, color="black", linewidth=1.2)
            ax.axvline(start - 0.5, color="black", linewidth=1.2)
    if m <= MAX_VALUES:
        for i, row in enumerate(gram.tolist()):
            for j, value in enumerate(row):
                if i != j and math.isfinite(value):
                    text = f"{round(value, 2) + 0.0:.2f}".replace("0.", ".")  # no -.00
                    color = "white" if abs(value) > 0.6 else "black"
                    ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=color)


def _name_axes(ax: Axes, names: list[str], *, left: bool) -> None:
    step = 1 if len(names) <= MAX_NAMES else math.ceil(len(names) / MAX_TICKS)
    places, shown = range(0, len(names), step), names[::step]
    ax.tick_params(length=0 if step == 1 else 2, labelsize=8)
    ax.set_xticks(places, shown, rotation=90 if max(map(len, shown)) > 2 else 0)
    ax.set_yticks(places if left else [], shown if left else [])
