"""Pictures of the cosines of classes two by two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nc_probe.measures.geometry import simplex_etf_cosine
from nc_probe.measures.pairwise import cosine_gram, unit
from nc_probe.moments.precision import cpu_by_default, float32_has_all_bits
from nc_probe.output.labels import label
from nc_probe.output.style import blank_figure, round_step
from nc_probe.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

__all__ = ["plot_grams"]

ORDERS = ("group", "frequency")

# Up to this many classes the cells are labelled with their values, and the axes with all the classes; more than this
# many cells a side are none.
MAX_VALUES, MAX_NAMES, MAX_CELLS = 12, 25, 125

# Cosines this far from the ETF have the darkest colours where there are too many classes to read each.
REACH = 0.5


@cpu_by_default()
def plot_grams(
    report: CollapseReport,
    *,
    order: str = "group",
    class_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Cosines of all pairs of centred class means, and of classifier rows, side by side.

    At collapse both pictures are white off the diagonal, the colour of the cosine -1/(K-1), which the colour bar marks;
    merged minority classes are a dark red block. Colours mean the same in any two pictures of as many classes. Of more
    than 25 classes, whose cosines lie close together, they show the square root of the distance to -1/(K-1); of more
    than 125, its root mean square over the pairs of a block of classes, red where their mean is above -1/(K-1).

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
    if report.means is None:
        raise ValueError("report must hold class means, got a report without samples")
    position = {k: i for i, k in enumerate(report.classes)}
    if order == "frequency":
        classes, spans = sorted(report.classes, key=lambda k: -report.class_count[position[k]]), []
    else:
        classes, spans = _by_group(report)
    total = max(classes) + 1
    if class_names is not None and len(class_names) < total:
        raise ValueError(f"class_names must name {total} classes, got {len(class_names)}")
    step = 1 if len(classes) <= MAX_NAMES else round_step(len(classes))
    names = [label(class_names[k], most=16, instead=str(k)) if class_names else str(k) for k in classes[::step]]

    rows = torch.tensor([position[k] for k in classes])
    vectors = [("class means (centred)", report.means)]
    if report.weight is not None:
        vectors.append(("classifier rows", report.weight))
    block = math.ceil(len(classes) / MAX_CELLS)
    ideal = simplex_etf_cosine(report.num_classes) if len(classes) > 1 else 0.0
    panels = [(panel, _cells(each[rows], ideal, block)) for panel, each in vectors if each is not None]

    figure = blank_figure(4.6 * len(panels) + 1.0, 5.1, title)
    from matplotlib.cm import ScalarMappable

    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    colors = ScalarMappable(_color_scale(len(classes), ideal), "RdBu_r")
    end = len(panels[0][1]) * block - 0.5
    for ax, (panel, cells) in zip(axes, panels, strict=True):
        extent = (-0.5, end, end, -0.5)
        ax.imshow(cells.numpy(), cmap=colors.cmap, norm=colors.norm, interpolation="nearest", extent=extent)
        ax.set_title(panel, fontsize=11, pad=20 if spans else 6)
        _show_groups(ax, len(classes), spans)
        if len(classes) <= MAX_VALUES:
            _write_values(ax, cells, ideal)
        _name_axes(ax, names, step, left=ax is axes[0])
        along = ["classes, most frequent first"] * (order == "frequency") + [f"blocks of {block} classes"] * (block > 1)
        ax.set_xlabel(", ".join(along), fontsize=9)
    what = "cosine" if block == 1 else "ETF ± r.m.s. distance of cosines"
    bar = figure.colorbar(
        colors, ax=list(axes), shrink=0.82, label=what, extend="both" * (len(classes) > MAX_NAMES) or None
    )
    if len(classes) > MAX_NAMES:
        bar.set_ticks([-0.5, -0.2, -0.05, 0, 0.05, 0.2, 0.5])
        bar.ax.minorticks_off()
    else:
        bar.ax.set_ylim(-1, 1)
    if len(classes) > 1:
        bar.ax.axhline(ideal, color="black", linewidth=1.5)
        bar.ax.text(-0.15, ideal, "ETF", ha="right", va="center", fontsize=8, transform=bar.ax.get_yaxis_transform())
    figure.draw_without_rendering()  # the layout knows how large squares come out at its second pass alone
    return figure


def _color_scale(num_classes: int, ideal: float) -> Normalize:
    """White at the cosine of the ETF; even up to 1 for few classes, by square roots up to REACH for many."""
    from matplotlib.colors import FuncNorm, Normalize

    if num_classes <= MAX_NAMES:
        return Normalize(2 * ideal - 1, 1)

    def root(cosine: Any) -> Any:
        apart = torch.as_tensor(cosine) - ideal
        return (apart.sign() * apart.abs().sqrt()).numpy()

    def square(value: Any) -> Any:
        value = torch.as_tensor(value)
        return (ideal + value.sign() * value.square()).numpy()

    return FuncNorm((root, square), ideal - REACH, ideal + REACH)


def _cells(rows: Tensor, ideal: float, block: int) -> Tensor:
    """Cosines of rows (m, d) two by two; or, by blocks of rows, `ideal` and the root mean square distance from it.

    The distance has the sign of its mean. Pairs of a row with itself are in no block; K x K cosines are never held.
    """
    if block == 1:
        return cosine_gram(rows)
    directions = unit(rows)
    if float32_has_all_bits(rows.device):
        directions = directions.float()
    column = torch.arange(len(rows)) // block
    cells = directions.new_full((int(column[-1]) + 1,) * 2, math.nan)
    for i, start in enumerate(range(0, len(rows), block)):
        apart = directions[start : start + block] @ directions.T - ideal
        apart.diagonal(start).fill_(math.nan)
        known = apart.isfinite()
        apart = apart.nan_to_num()
        pairs, total, squares = directions.new_zeros(3, len(cells)).index_add_(
            1, column, torch.stack([known.to(directions).sum(0), apart.sum(0), apart.square().sum(0)])
        )
        cells[i] = ideal + total.sign() * (squares / pairs).sqrt()
    return cells


def _by_group(report: CollapseReport) -> tuple[list[int], list[tuple[str, int]]]:
    """The classes, those of each group together, and (name, first position) of the groups; "" if in no group."""
    order: dict[int, None] = {}
    spans: list[tuple[str, int]] = []
    for name, classes in [*((name, group.classes) for name, group in report.groups.items()), ("", report.classes)]:
        fresh = [k for k in classes if k not in order]
        if fresh and report.groups:
            spans.append((name, len(order)))
        order |= dict.fromkeys(fresh)
    return list(order), spans


def _show_groups(ax: Axes, num_classes: int, spans: list[tuple[str, int]]) -> None:
    """Draw lines between groups, and write their names above."""
    ends = [start for _, start in spans[1:]] + [num_classes]
    for (name, start), end in zip(spans, ends, strict=True) if spans else ():
        above = {"ha": "center", "va": "bottom", "fontsize": 9, "color": "0.3"}
        ax.text((start + end - 1) / 2, -0.5 - 0.015 * num_classes, label(name, most=16), **above)
        if start:
            ax.axhline(start - 0.5, color="black", linewidth=1.2)
            ax.axvline(start - 0.5, color="black", linewidth=1.2)


def _write_values(ax: Axes, cells: Tensor, ideal: float) -> None:
    """Write the cosines into their cells."""
    for i, row in enumerate(cells.tolist()):
        for j, value in enumerate(row):
            if i != j and math.isfinite(value):
                text = f"{round(value, 2) + 0.0:.2f}".replace("0.", ".")  # no -.00
                color = "white" if abs(value - ideal) > 0.6 * (1 - ideal) else "black"
                ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=color)


def _name_axes(ax: Axes, names: Sequence[str], step: int, *, left: bool) -> None:
    """Write the names of every class, or of each so many."""
    places = range(0, step * len(names), step)
    ax.tick_params(length=0 if step == 1 else 2, labelsize=8)
    ax.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0)
    ax.set_yticks(places if left else [], names if left else [])
