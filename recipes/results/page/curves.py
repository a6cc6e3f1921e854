"""Figures of a study: arms against each other, over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from nc_probe.output.labels import label
from recipes.results.page.study import Group, Look, Study, number
from recipes.results.page.svg import INK
from recipes.results.statistics import PairedDifference, interval_of

# Okabe & Ito (2008), without the ones that one of light and dark paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT = 4.4, 3.0  # inches: a column of the page, and a phone


def arm_styles(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a dash for each arm."""
    n = len(COLORS)
    return {arm: (COLORS[i % n], _DASHES[i // n % len(_DASHES)]) for i, arm in enumerate(arms)}


Value = Callable[[Mapping[str, Any]], Any]
"""Of a line of metrics.jsonl: a number, or None."""


def epoch_values(group: Group, value: Value) -> dict[int, list[float]]:
    """The values of all seeds at each epoch that has some."""
    found: dict[int, list[float]] = {}
    for run in group.runs.values():
        for record in run.records:
            if math.isfinite(at := number(value(record))):
                found.setdefault(record["epoch"], []).append(at)
    return dict(sorted(found.items()))


def mean_and_band(values: Sequence[float], *, log: bool) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval, of logarithms where `log`; the ends are NaN of a single value."""
    numbers = np.log(values) if log else np.asarray(values, dtype=float)
    mean = float(numbers.mean())
    half = interval_of(numbers.tolist()) if len(numbers) > 1 else math.nan
    ends = (mean, mean - half, mean + half)
    return tuple(map(math.exp, ends)) if log else ends  # pyright: ignore[reportReturnType]


def curve_figure(
    groups: Sequence[Group],
    styles: Mapping[str, tuple[str, str]],
    value: Value,
    *,
    title: str,
    log: bool = False,
    percent: bool = False,
) -> Figure | None:
    """A number against epochs: the mean over seeds and the band of its interval; None where no run has it.

    Args:
        groups: of one setting.
        styles: of the arms.
        value: the number, of a line of metrics.jsonl.
        title: above the panel.
        log: on a logarithmic axis, where all values allow it; means are geometric then.
        percent: on an axis from 0 to 100.
    """
    series = {group.arm: epoch_values(group, value) for group in groups}
    series = {arm: found for arm, found in series.items() if found}
    if not series:
        return None
    log = log and all(at > 0 for found in series.values() for values in found.values() for at in values)
    figure, axes = _panel(title)
    for arm, found in series.items():
        color, dashes = styles[arm]
        mean, low, high = np.array([mean_and_band(values, log=log) for values in found.values()]).T
        axes.plot([*found], mean, dashes, color=color, linewidth=1.6)
        axes.fill_between([*found], low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        axes.set_ylim(-2, 102)
    if log:
        _log_scale(axes)
    return figure


def forest_figure(study: Study, rows: Mapping[str, Mapping[str, PairedDifference]]) -> Figure:
    """Paired differences at the endpoint with their intervals: a line for each setting and other arm.

    Args:
        study: whose arms have the colours.
        rows: by setting and other arm. One without an interval is a hollow mark.
    """
    styles = arm_styles([*study.arms])
    lines = [(setting, arm, found) for setting, arms in rows.items() for arm, found in arms.items() if found.n]
    figure = Figure(figsize=(5.2, 1.0 + 0.25 * max(len(lines), 1)), layout="constrained")
    axes = figure.subplots()
    for y, (_, arm, found) in enumerate(lines):
        color = styles[arm][0]
        known = math.isfinite(found.low)
        if known:
            axes.plot([found.low, found.high], [y, y], color=color, linewidth=2)
        axes.plot(found.mean, y, "o", color=color, markersize=6, markerfacecolor=color if known else "none")
    axes.axvline(0, color=INK, linewidth=0.8)
    names = [f"{setting}, minus {arm}" if setting else f"minus {arm}" for setting, arm, _ in lines]
    axes.set_yticks(range(len(lines)), [label(name, most=44) for name in names])
    axes.invert_yaxis()
    figure.supxlabel(f"{label(study.tested)} minus another arm, points of accuracy", fontsize=9)
    _finish(axes)
    axes.tick_params(axis="y", length=0)
    return figure


def gram_figure(group: Group, *, limit: float) -> Figure | None:
    """Cosines between class means, and between rows of the classifier, side by side: the mean over seeds.

    Args:
        group: of runs; the first alone where seeds differ in their classes.
        limit: cosines from -limit to limit have the whole scale of colours.
    """
    kept = [run.results["collapse"] for run in group.runs.values() if run.results["collapse"].get("gram")]
    same = [each for each in kept if all(each.get(key) == kept[0].get(key) for key in ("classes", "class_count"))]
    panels = {"class means": "gram", "rows of W": "gram_weight"}
    grams = {title: _mean_gram([each[key] for each in same if each.get(key)]) for title, key in panels.items()}
    grams = {title: gram for title, gram in grams.items() if gram is not None}
    if not grams:
        return None
    figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
    for axes, (title, gram) in zip(figure.subplots(1, 2).flat, grams.items(), strict=False):
        shades: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "none"}
        axes.imshow(gram, **shades)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        counts = same[0].get("class_count") or []
        for i in [i for i in range(1, len(counts)) if counts[i] != counts[i - 1]] if len(set(counts)) <= 3 else ():
            axes.axhline(i - 0.5, color="black", linewidth=0.8)
            axes.axvline(i - 0.5, color="black", linewidth=0.8)
    for axes in figure.axes[len(grams) :]:
        axes.set_axis_off()
    return figure


def _mean_gram(matrices: Sequence[Sequence[Sequence[float | None]]]) -> np.ndarray | None:
    if not matrices:
        return None
    return np.mean([[[number(value) for value in row] for row in matrix] for matrix in matrices], axis=0)


def gram_limit(groups: Sequence[Group]) -> float:
    """The scale of colours of all Gram matrices of a setting: 1, or what most cosines of many classes are within."""
    off = []
    for group in groups:
        for run in group.runs.values():
            gram = run.results["collapse"].get("gram") or []
            off += [abs(number(x)) for i, row in enumerate(gram) for j, x in enumerate(row) if i != j]
    many = len(off) and max(len(r.results["collapse"].get("gram") or []) for g in groups for r in g.runs.values()) > 40
    return max(float(np.nanpercentile(off, 99.5)), 1e-6) if many else 1.0


def scale_figure(limit: float) -> Figure:
    """The scale of colours of Gram matrices."""
    figure = Figure(figsize=(_WIDTH, 0.55), layout="constrained")
    axes = figure.subplots()
    shades = np.linspace(-limit, limit, 101)[None]
    axes.imshow(shades, cmap="RdBu_r", aspect="auto", extent=(-limit, limit, 0, 1), interpolation="none")
    axes.set_yticks([])
    axes.set_xlabel("cosine", fontsize=8)
    axes.tick_params(labelsize=8)
    return figure


def tsne_figure(look: Look, counts: Sequence[int]) -> Figure | None:
    """Features in the plane: a colour for each class; crosses are of classes with fewer images than the largest has.

    Source: van der Maaten & Hinton, "Visualizing data using t-SNE", JMLR 9, 2008. Neighbours are kept, distances are
    not.

    Args:
        look: at the model of a run; None is drawn of one without points.
        counts: training images of each class, for the markers.
    """
    from matplotlib import colormaps

    if not len(look.points):
        return None
    points, labels = np.asarray(look.points, dtype=float), np.asarray(look.labels)
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    classes, most = np.unique(labels), max(counts, default=0)
    shades = colormaps["tab10"] if len(classes) <= 10 else colormaps["turbo"].resampled(len(look.class_names))
    for k in classes.tolist():
        marker = "x" if k < len(counts) and counts[k] < most else "o"
        own = points[labels == k]
        axes.scatter(*own.T, color=shades(k), marker=marker, s=9, alpha=0.8, linewidths=0.8, rasterized=True)
        if len(classes) <= 20:
            x, y = own[np.square(own - np.median(own, axis=0)).sum(1).argmin()]
            name = label(look.class_names[int(k)], most=14, instead=str(k))
            place: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(name, (x, y), **place, weight="bold", gid="halo")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_axis_off()
    return figure


def solve_figure(
    looks: Mapping[str, Look], styles: Mapping[str, tuple[str, str]], key: str, *, title: str, log: bool = False
) -> Figure | None:
    """A measure of collapse against the updates of the solver, of one run of each arm that solves; None without any."""
    series = {arm: [number(each.get(key)) for each in look.iterates.values()] for arm, look in looks.items()}
    series = {arm: values for arm, values in series.items() if values}
    if not series:
        return None
    figure, axes = _panel(title)
    for arm, values in series.items():
        color, dashes = styles[arm]
        axes.plot(range(len(values)), values, dashes, color=color, linewidth=1.6, marker="o", markersize=3)
    axes.set_xlabel("updates of the solver, from its input on")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log and all(value > 0 for values in series.values() for value in values if math.isfinite(value)):
        _log_scale(axes)
    return figure


def _panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set_title(label(title, most=60), fontsize=9.5, loc="left")
    _finish(axes)
    return figure, axes


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 1e3 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1, 3)))
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
