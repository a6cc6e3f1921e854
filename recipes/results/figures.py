"""Pictures of a run. They are drawn on figures of their own; pyplot and its global state are left alone."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from nc_probe import CollapseReport
from nc_probe.plots import plot_grams
from recipes.results.calibration import calibration_error
from timm_deq import SolveLog, Status

# Okabe & Ito (2008): told apart by readers of any colour vision.
COLORS = {"overall": "#000000", "majority": "#0072B2", "minority": "#D55E00"}
_CLASS_COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #F0E442 #000000 #999999 #882255".split()
COLORS |= {"many": "#0072B2", "medium": "#009E73", "few": "#D55E00"}
_STYLE: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
_FLOOR = 1e-16  # where a residual of 0 is drawn on a logarithmic axis


def save_figures(
    folder: Path,
    records: Sequence[dict[str, Any]],
    report: CollapseReport,
    log: SolveLog,
    *,
    tol: float | None,
    class_names: Sequence[str],
    title: str,
) -> None:
    """Write the pictures of a run into a folder: training.png, gram.png and, for a model that solves, residual.png and
    steps.png."""
    folder.mkdir(exist_ok=True)
    training_figure(records, title=title).savefig(folder / "training.png", dpi=150)
    gram = plot_grams(report, class_names=class_names, title=f"{title}: cosines between classes")
    gram.savefig(folder / "gram.png", dpi=150)
    if len(log):
        residuals = residual_figure(log.trace.numpy(), tol=tol, title=f"{title}: residual on test images")
        residuals.savefig(folder / "residual.png", dpi=150)
        steps = convergence_figure(log, title=f"{title}: solves of test images")
        steps.savefig(folder / "steps.png", dpi=150)


def training_figure(records: Sequence[dict[str, Any]], *, title: str) -> Figure:
    """Accuracy and NC1..NC3 against epochs.

    Args:
        records: lines of metrics.jsonl. Accuracies are under 'val' and 'train', measurements of collapse under
            'collapse'.
        title: above all.
    """
    figure = Figure(figsize=(10, 6.8), layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(2, 2, sharex=True).flat
    _accuracy_panel(panels[0], records)
    _collapse_panel(panels[1], records, "nc1", "NC1: spread within classes, relative to between")
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panels[1].yaxis.set_major_formatter("{x:.2g}")
    panels[1].yaxis.set_minor_formatter(NullFormatter())
    _collapse_panel(panels[2], records, "nc2_etf", "NC2: distance of class means to a simplex ETF")
    _collapse_panel(panels[3], records, "nc3", "NC3: distance of classifier to class means")
    for axes in panels[2:]:
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
    return figure


def _accuracy_panel(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for split, dashes, marker in (("val", "-", ""), ("train", ":", "o")):
        measured = [record for record in records if record.get(split)]
        for group in measured[0][split] if measured else ():
            epochs = [record["epoch"] for record in measured]
            values = [100 * record[split][group] for record in measured]
            axes.plot(
                epochs,
                values,
                color=COLORS.get(group),
                linestyle=dashes,
                marker=marker,
                markersize=3,
                label=f"{group}, {split}",
            )
    _finish(axes, "Accuracy on validation and training images", "%")
    axes.set_ylim(top=102)


def _collapse_panel(axes: Axes, records: Sequence[dict[str, Any]], key: str, title: str) -> None:
    measured = [record for record in records if record.get("collapse")]
    epochs = [record["epoch"] for record in measured]
    for group in ["overall", *(measured[0]["collapse"]["groups"] if measured else ())]:
        reports = [r["collapse"] if group == "overall" else r["collapse"]["groups"][group] for r in measured]
        values = [math.nan if report[key] is None else report[key] for report in reports]
        axes.plot(epochs, values, color=COLORS.get(group), label=group, **_STYLE)
    _finish(axes, title, "")


def residual_figure(trace: np.ndarray, *, tol: float | None, title: str) -> Figure:
    """Residual of the fixed point against evaluations, over samples.

    Args:
        trace: relative residual of each sample after each evaluation, (T, N).
        tol: residual at which the solver stops.
        title: above the picture.
    """
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(trace) + 1)
    low, median, high = np.nanpercentile(trace, [10, 50, 90], axis=1)
    axes.fill_between(steps, low, high, color=COLORS["majority"], alpha=0.2, linewidth=0, label="10 to 90 % of images")
    axes.plot(steps, median, color=COLORS["majority"], label="median image", **_STYLE)
    if tol is not None:
        axes.axhline(tol, color=COLORS["minority"], linestyle="--", linewidth=1.4, label=f"tolerance {tol:g}")
    axes.set_yscale("log")
    axes.set_xlabel("evaluations of f")
    _finish(axes, title, "‖f(z) − z‖ / ‖f(z)‖")
    return figure


def convergence_figure(log: SolveLog, *, title: str) -> Figure:
    """Histograms over samples of the evaluations that their solves took and of the residuals they ended with.

    Args:
        log: of a model that solves; forward and, where there were any, backward solves are shown.
        title: above all.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2)
    solves = {"forward": (log.steps, log.residual, log.status, COLORS["majority"])}
    if len(log.backward_steps):
        solves["backward"] = (log.backward_steps, log.backward_residual, log.backward_status, COLORS["minority"])
    longest = max(int(steps.max()) for steps, *_ in solves.values())
    finite = {name: residual[residual.isfinite()].clamp_min(_FLOOR) for name, (_, residual, *_) in solves.items()}
    known = torch.cat(list(finite.values())).log10()
    low, high = (math.floor(known.min()), math.floor(known.max()) + 1) if len(known) else (-3, 0)
    bins = np.logspace(low, high, 10 * (high - low) + 1)  # ten a decade
    for name, (steps, _, status, color) in solves.items():
        bars: dict[str, Any] = {"color": color, "alpha": 0.6}
        left.hist(steps.numpy(), np.arange(0.5, longest + 1), label=f"{name}, mean {steps.double().mean():.1f}", **bars)
        share = (status == Status.CONVERGED).double().mean()
        right.hist(finite[name].numpy(), bins.tolist(), label=f"{name}, {share:.1%} of {len(status)} converged", **bars)
    left.margins(y=0.25)  # room for the legends
    right.margins(y=0.25)
    left.set_xlabel("evaluations of f")
    right.set_xlabel("‖f(z) − z‖ / ‖f(z)‖")
    _finish(left, "Evaluations until a sample was done", "samples")
    _finish(right, "Residual at the end", "samples")
    right.set_xscale("log")  # after _finish, whose ticks are whole numbers
    return figure


def anytime_figure(points: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Accuracy against the budget of the solver, overall and by group.

    Args:
        points: one for each budget, in rising order: 'max_steps' and, by group, 'accuracy' (NaN where there is none).
        title: above the picture.
    """
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    budgets = [point["max_steps"] for point in points]
    for group in points[0]["accuracy"]:
        values = [100 * point["accuracy"][group] for point in points]
        axes.plot(budgets, values, color=COLORS.get(group), label=group, **_STYLE)
    _finish(axes, title, "accuracy, %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, labels=[str(budget) for budget in budgets])
    axes.set_xlabel("evaluations of f, at most")
    axes.set_ylim(0, 102)
    return figure


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str], *, title: str) -> Figure:
    """How the images of each class are classified, in % of the class.

    Args:
        confusion: counts [class, prediction], (K, K); a class without images has an empty row.
        class_names: K names, which stand at the axes up to K = 25; beyond, class numbers do here and there.
        title: above the picture.
    """
    total = confusion.sum(1, keepdims=True)
    share = np.divide(100 * confusion, total, out=np.full(confusion.shape, np.nan), where=total > 0)
    K = len(confusion)
    size = float(np.clip(0.55 * K, 5, 9))
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="% of the class", shrink=0.8)
    if K <= 25:
        names = [name if len(name) <= 12 else f"{name[:11]}…" for name in class_names]
        axes.set_xticks(range(K), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=9)
        axes.set_yticks(range(K), names, fontsize=9)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
    if K <= 15:
        for i, j in np.ndindex(K, K):
            if confusion[i, j]:
                color = "white" if share[i, j] > 50 else "black"
                axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xlabel("prediction")
    axes.set_ylabel("class")
    axes.set_title(title, fontsize=10.5, loc="left")
    return figure


def reliability_figure(bins: np.ndarray, *, title: str) -> Figure:
    """Accuracy against confidence, with the part of the images in each bin beside it.

    Args:
        bins: table of `recipes.results.calibration`, (K, M, 3).
        title: above the picture.
    """
    images, right, confidence = bins.sum(0).T
    edges = np.linspace(0, 1, len(images) + 1)
    known, error = images > 0, calibration_error(bins)
    figure = Figure(figsize=(5.5, 5.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    accuracy = np.divide(right, images, out=np.zeros(len(images)), where=known)
    upper.bar(edges[:-1], accuracy, np.diff(edges), align="edge", color=COLORS["majority"], alpha=0.6, label="accuracy")
    upper.plot(
        confidence[known] / images[known], accuracy[known], "o", color=COLORS["minority"], label="mean confidence"
    )
    upper.plot([0, 1], [0, 1], "--", color=COLORS["overall"], linewidth=1, label="calibrated")
    lower.bar(
        edges[:-1], images / max(images.sum(), 1), np.diff(edges), align="edge", color=COLORS["majority"], alpha=0.6
    )
    _finish(upper, f"{title}: ECE {error:.3f}", "accuracy")
    _finish(lower, "", "part of images")
    lower.set_xlabel("confidence")
    lower.set_xticks(np.linspace(0, 1, 6))
    upper.set_xlim(0, 1)
    return figure


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def sample_evenly(labels: np.ndarray, limit: int, *, seed: int) -> np.ndarray:
    """Choose about as many samples of every class: the most that makes no more than `limit` of all.

    Args:
        labels: classes, (N,).

    Returns:
        Sorted indices of at most `limit` samples; a class with too few gives all that it has.
    """
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    most = next((n for n in range(limit, 1, -1) if np.minimum(counts, n).sum() <= limit), 1)
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == k))[:most] for k in range(len(counts))]
    return np.sort(generator.permutation(np.concatenate(chosen))[:limit])


def tsne_figure(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    groups: Mapping[str, Sequence[int]],
    class_names: Sequence[str],
    seed: int,
    title: str,
) -> Figure:
    """Features in the plane by t-SNE: a colour for each class, a marker for each group.

    Source: van der Maaten & Hinton, "Visualizing data using t-SNE", JMLR 9, 2008. Neighbours are kept, distances are
    not.

    Args:
        features: (N, d), N of 4 or more.
        labels: classes, (N,).
        groups: classes of each group; may be none.
        class_names: names of the K classes. Up to 20 classes have theirs at the sample next to their median; of more a
            colour bar tells the numbers.
        seed: of the embedding, which starts from the two principal components.
        title: above the picture.
    """
    from sklearn.manifold import TSNE  # takes a second to import, and the other pictures do not need it

    # The two components exist if the features vary in two directions.
    plane = np.linalg.matrix_rank(features - features.mean(0)) > 1
    perplexity = min(30, (len(features) - 1) / 3)
    embedding = TSNE(perplexity=perplexity, init="pca" if plane else "random", random_state=seed, n_jobs=1)
    points = embedding.fit_transform(features)
    figure = Figure(figsize=(7.6, 7), layout="constrained")
    axes = figure.subplots()
    classes = np.unique(labels)
    shades = ScalarMappable(Normalize(0, max(len(class_names) - 1, 1)), "turbo")
    colors = _CLASS_COLORS if len(classes) <= len(_CLASS_COLORS) else shades.to_rgba(classes)
    marker = dict(zip(groups, itertools.cycle("o^sDvP")))
    for k, color in zip(classes, colors, strict=False):
        shape = next((marker[name] for name, members in groups.items() if k in members), "x" if groups else "o")
        axes.scatter(*points[labels == k].T, color=color, marker=shape, s=14, alpha=0.75, linewidths=0.4)
    if len(classes) <= 20:
        for k in classes:
            own = points[labels == k]
            x, y = own[np.square(own - np.median(own, axis=0)).sum(1).argmin()]
            text = axes.text(x, y, class_names[int(k)], ha="center", va="center", fontsize=10, weight="bold")
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    else:
        figure.colorbar(shades, ax=axes, label="class", shrink=0.8, aspect=40)
    for name, shape in marker.items():
        axes.scatter([], [], color="0.35", marker=shape, s=28, label=name)
    axes.set_title(title, fontsize=10.5)
    axes.set_xticks([])
    axes.set_yticks([])
    if groups:
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure
