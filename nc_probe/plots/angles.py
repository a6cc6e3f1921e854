"""Pictures of the angles of classes two by two."""

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
from nc_probe.output.style import blank_figure, finish_axes, group_colors
from nc_probe.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_angles"]

# Angles are counted in steps of half a degree, and shown in bars of the first width that makes at most MAX_BARS.
STEP, WIDTHS, MAX_BARS = 0.5, (1, 2, 5), 40

# Degrees about the angle of the ETF that are shown in any case: what is spread looks so, and what is not does not.
SHOWN = 15


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
    low, high = max(etf - SHOWN, 0), min(etf + SHOWN, 180)
    if len(seen):
        low, high = min(float(seen.min()), low), max(float(seen.max()), high)
    width = next((w for w in WIDTHS if high - low <= w * MAX_BARS), WIDTHS[-1])
    edges = torch.arange(0, 180 + width, width, dtype=torch.float32).numpy()
    for ax, (panel, _), count in zip(axes, panels, counts, strict=True):
        bars = count.view(len(count), -1, int(width / STEP)).sum(2)
        for name, bar, color in zip(labels, bars, [*group_colors(members), "black"], strict=True):
            pairs = int(bar.sum())
            if pairs:
                text = f"{name}: {pairs}"
                ax.stairs((100 * bar.double() / pairs).numpy(), edges, label=text, color=color, linewidth=1.6)
        ax.axvline(etf, color="black", linestyle="--", linewidth=1.2, label=f"simplex ETF: {etf:.1f}°")
        finish_axes(ax, panel, "angle, degrees")
    axes[0].set_xlim(max(low - 2 * width, 0), min(high + 3 * width, 181))
    axes[0].set_yticks(range(0, 101, 20))
    axes[0].set_ylim(0, 145)  # room for the legends
    axes[0].set_ylabel("% of the pairs")
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
    return figure


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
