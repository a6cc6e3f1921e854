"""Pictures of collapse against epochs of training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nc_probe.measures.geometry import simplex_etf_cosine
from nc_probe.measures.predictions import at_seli
from nc_probe.moments.precision import cpu_by_default
from nc_probe.output.labels import label
from nc_probe.output.storage import decode
from nc_probe.output.style import blank_figure, finish_axes, group_colors, scale_values
from nc_probe.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_history"]

CURVES = {
    "nc1": "NC1: spread within classes / between",
    "nc2_etf": "NC2: class means to simplex ETF",
    "nc2_etf_weight": "NC2: classifier to simplex ETF",
    "nc3": "NC3: classifier to class means",
    "accuracy": "accuracy",
    "mean_cosine": "mean cosine of class means",
    "mean_cosine_weight": "mean cosine of classifier rows",
    "nc4": "NC4: classifier agrees with nearest mean",
}
COLUMNS = 4


@cpu_by_default()
def plot_history(
    history: Mapping[int, CollapseReport] | Sequence[CollapseReport] | str | Path,
    *,
    class_counts: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """NC1 to NC4, accuracy and mean cosines of all classes and of each group against epochs.

    NC2 is 0 at the simplex ETF. What it is at SELI, the geometry that imbalance leads to, is dashed, in the colour of
    the group; so it is with the mean cosines, which at the simplex ETF are -1/(K-1), dotted, and 1 where classes have
    merged. A measure that spans a factor of ten or more is on a logarithmic axis; what is undefined leaves a gap.

    Args:
        history: reports by epoch; or one after the other, the first of epoch 0; or a file with a line of JSON for each
            epoch, `metrics.jsonl` of recipes/train.py (or the folder of its run), or that of
            `nc_probe.integrations.epochs.EpochHook`.
        class_counts: samples of each class trained on, for SELI. Default: those of the last report, if it has them, or
            of the `manifest.json` that recipes/train.py has written beside its metrics.
        title: above all.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: there is no report, or a file is not such a one.
        ImportError: matplotlib is missing.
    """
    reports = _reports(history)
    last = reports[max(reports)]
    keys = [key for key in CURVES if any(math.isfinite(getattr(report, key)) for report in reports.values())]
    columns = min(len(keys), COLUMNS) or 1
    rows = math.ceil(len(keys) / columns) or 1
    figure = blank_figure(3.5 * columns + 0.5, 3.1 * rows + 0.5, title)
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    seli = _at_seli(last, class_counts)
    for ax, key in zip(axes, keys, strict=False):
        _draw(ax, key, reports, seli)
        finish_axes(ax, CURVES[key], "epoch")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for ax in axes[len(keys) :]:
        ax.remove()
    lines = axes[0].get_legend_handles_labels()[0][: 1 + len(last.groups)] if keys else []
    if seli:
        lines.append(Line2D([], [], color="0.4", linestyle="--", linewidth=1, label="SELI of these counts"))
    if any(key.startswith("mean_cosine") for key in keys):
        lines.append(Line2D([], [], color="black", linestyle=":", linewidth=1.4, label="simplex ETF"))
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 6) or 1, frameon=False, fontsize=9)
    return figure


def _reports(history: Any) -> dict[int, CollapseReport]:
    """Reports by epoch, in order.

    Raises:
        ValueError: there are none.
    """
    if isinstance(history, str | Path):
        history = _read(Path(history))
    found = dict(history if isinstance(history, Mapping) else enumerate(history))
    kinds = {type(report).__name__ for report in found.values() if not isinstance(report, CollapseReport)}
    if not found or kinds:
        raise ValueError(f"history must hold reports of collapse, got {', '.join(sorted(kinds)) or 'none'}")
    return dict(sorted(found.items()))


def _read(path: Path) -> dict[int, CollapseReport]:
    """Read the reports of the epochs in which collapse was measured from a file with a line of JSON for each epoch.

    Raises:
        ValueError: it is not such a file.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if record.get("collapse"):
                found[int(record["epoch"])] = _from_dict(record["collapse"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path} must have a line of JSON for each epoch, with its 'epoch' and 'collapse', got line {number}: "
                f"{line[:40]!r}"
            ) from None
    return _with_classes(found, path.parent / "manifest.json")


def _with_classes(reports: Mapping[int, CollapseReport], manifest: Path) -> dict[int, CollapseReport]:
    """Put the classes, their counts and those of groups into reports, if there is a manifest that tells them."""
    try:
        content = json.loads(manifest.read_text())
        counts = {k: int(n) for k, n in enumerate(content["counts"]) if n > 0}
        groups = {str(name): tuple(sorted(counts.keys() & classes)) for name, classes in content["groups"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one of another program
        return dict(reports)
    known = {"classes": tuple(counts), "class_count": tuple(counts.values())}
    return {
        epoch: replace(
            report,
            **known,
            groups={name: replace(group, classes=groups.get(name, ())) for name, group in report.groups.items()},
        )
        for epoch, report in reports.items()
    }


def _from_dict(values: Mapping[str, Any]) -> CollapseReport:
    """Make a report, with its groups, of what `CollapseReport.as_dict` made of one."""
    nested = {"groups": {}, "heads": {}, "layers": {}, "iterates": {}}
    report = decode(CollapseReport, {"classes": [], **values, **nested})
    return replace(report, groups={name: _from_dict(group) for name, group in values.get("groups", {}).items()})


def _at_seli(report: CollapseReport, class_counts: Sequence[int] | None) -> dict[str | None, dict[str, float]]:
    """Compute the measures at SELI, of all classes (None) and of each group; none where the counts are not known."""
    counts = list(class_counts or [])
    if class_counts is None and report.class_count:
        known = dict(zip(report.classes, report.class_count, strict=True))
        counts = [known.get(k, 0) for k in range(max(known) + 1)]
    if len(set(counts) - {0}) < 2:  # not known, or balanced: the simplex then
        return {}
    targets = {None: at_seli(counts)}
    targets |= {name: at_seli(counts, group.classes) for name, group in report.groups.items() if group.classes}
    if report.center == "balanced":
        return targets
    # Means about another centre are not those of SELI.
    return {name: {k: v for k, v in found.items() if k.endswith("_weight")} for name, found in targets.items()}


def _draw(
    ax: Axes, key: str, reports: Mapping[int, CollapseReport], seli: Mapping[str | None, Mapping[str, float]]
) -> None:
    """Draw a measure of all classes and of each group, and what it is at SELI and at the simplex."""
    last = reports[max(reports)]
    for name, color in zip((None, *last.groups), ("black", *group_colors(last.groups)), strict=True):
        parts = [report if name is None else report.groups.get(name) for report in reports.values()]
        values = [math.nan if part is None else getattr(part, key) for part in parts]
        values = [value if math.isfinite(value) else math.nan for value in values]
        ax.plot(list(reports), values, color=color, label=label(name) if name else "all", marker="o", markersize=3)
        if (target := seli.get(name, {}).get(key, 0.0)) and math.isfinite(target):
            ax.axhline(target, color=color, linestyle="--", linewidth=1)
    if not key.startswith("mean_cosine"):
        scale_values(ax)
    elif last.num_classes > 1:
        ax.axhline(simplex_etf_cosine(last.num_classes), color="black", linestyle=":", linewidth=1.4)
