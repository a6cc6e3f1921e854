"""Pictures of classes: how they are confused, and how their features lie."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from nc_probe.output.labels import label
from recipes.results.figures import head

# Up to this many classes the cells of a confusion matrix have their values; more than this many cells a side are none.
MAX_VALUES, MAX_CELLS = 15, 125

# Samples of a class in a picture: fewer than t-SNE takes for neighbours, for of more it spreads every class as widely
# as any other, however close together it is; and at least so many of each, if there are.
PER_CLASS, PERPLEXITY, AT_LEAST = 25, 30, 10

_CLASS_COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #F0E442 #000000 #999999 #882255".split()


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str], *, title: str) -> Figure:
    """How the images of each class are classified, in % of the class.

    Args:
        confusion: counts [class, prediction], (K, K); a class without images has an empty row.
        class_names: K names, which stand at the axes up to K = 25; beyond, class numbers do here and there. More than
            MAX_CELLS classes are shown in blocks: the part of the images of some classes that is classified as any of
            some classes, with every class weighing the same.
        title: above the picture.
    """
    K = len(confusion)
    total = confusion.sum(1, keepdims=True)
    share = np.divide(100 * confusion, total, out=np.full(confusion.shape, np.nan), where=total > 0)
    block = math.ceil(K / MAX_CELLS)
    cells = block_means(share, block) if block > 1 else share
    size = float(np.clip(0.55 * K, 5, 9))
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axes = figure.subplots()
    # Where no numbers stand in the cells, their colours let a few % be seen.
    norm = Normalize(0, 100) if K <= MAX_VALUES else PowerNorm(0.5, 0, 100)
    end = len(cells) * block - 0.5
    picture = axes.imshow(cells, cmap="Blues", norm=norm, interpolation="nearest", extent=(-0.5, end, end, -0.5))
    bar = figure.colorbar(picture, ax=axes, label="% of the class", shrink=0.8)
    bar.set_ticks([0, 25, 50, 75, 100] if K <= MAX_VALUES else [0, 1, 5, 10, 25, 50, 100])
    if K <= 25:
        names = [label(name, most=12, instead=str(k)) for k, name in enumerate(class_names)]
        axes.set_xticks(range(K), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=9)
        axes.set_yticks(range(K), names, fontsize=9)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
    if K <= MAX_VALUES:
        for i, j in np.ndindex(K, K):
            if confusion[i, j]:
                color = "white" if share[i, j] > 50 else "black"
                axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=8, color=color)
    blocks = f", in blocks of {block} classes" if block > 1 else ""
    axes.set_xlabel(f"prediction{blocks}")
    axes.set_ylabel(f"class{blocks}")
    head(axes, title)
    figure.draw_without_rendering()  # the layout knows how large squares come out at its second pass alone
    return figure


def block_means(share: np.ndarray, block: int) -> np.ndarray:
    """Sum shares [class, prediction] over blocks of predictions, and average over blocks of classes.

    Args:
        share: (K, K); the row of a class without images is NaN, and not averaged.
        block: classes in a block, but for the last.

    Returns:
        (M, M) for M blocks; NaN for a block of classes without images.
    """
    starts = np.arange(0, len(share), block)
    known = ~np.isnan(share[:, :1])
    classes = np.add.reduceat(known.astype(float), starts)
    sums = np.add.reduceat(np.add.reduceat(np.where(known, share, 0), starts, axis=0), starts, axis=1)
    return np.divide(sums, classes, out=np.full(sums.shape, np.nan), where=classes > 0)


def sample_evenly(labels: np.ndarray, limit: int, *, seed: int) -> np.ndarray:
    """Choose about as many samples of every class, PER_CLASS at most, and no more than `limit` of all.

    Where that would be fewer than AT_LEAST, some classes are left out, evenly from the most frequent to the least: of
    two samples of each one could not see how they lie.

    Args:
        labels: classes, (N,).

    Returns:
        Sorted indices of at most `limit` samples; a class with too few gives all that it has.
    """
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    most = max(limit // min(AT_LEAST, int(np.median(counts))), 1)
    if len(counts) > most:
        kept = np.argsort(-counts, kind="stable")[np.linspace(0, len(counts) - 1, most).round().astype(int)]
        counts = np.where(np.isin(np.arange(len(counts)), kept), counts, 0)
    each = next((n for n in range(min(limit, PER_CLASS), 1, -1) if np.minimum(counts, n).sum() <= limit), 1)
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == k))[:each] for k in np.flatnonzero(counts)]
    return np.sort(generator.permutation(np.concatenate(chosen))[:limit])


def tsne_points(features: np.ndarray, *, seed: int) -> np.ndarray:
    """Put features (N, d), N of 4 or more, into the plane by t-SNE, (N, 2); it starts from two principal components.

    Source: van der Maaten & Hinton, "Visualizing data using t-SNE", JMLR 9, 2008. Neighbours are kept, distances are
    not.
    """
    from sklearn.manifold import TSNE  # takes a second to import, and the other pictures do not need it

    # The two components exist if the features vary in two directions.
    plane = np.linalg.matrix_rank(features - features.mean(0)) > 1
    perplexity = min(PERPLEXITY, 2 * (len(features) - 1) / 3)
    embedding = TSNE(perplexity=perplexity, init="pca" if plane else "random", random_state=seed, n_jobs=1)
    return embedding.fit_transform(features)


def tsne_figure(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    groups: Mapping[str, Sequence[int]],
    class_names: Sequence[str],
    seed: int,
    title: str,
) -> Figure:
    """Features in the plane by `tsne_points`: a colour for each class, a marker for each group.

    At collapse a class is a dot.

    Args:
        features: (N, d), N of 4 or more.
        labels: classes, (N,).
        groups: classes of each group; may be none.
        class_names: names of the K classes. Up to 20 classes have theirs at the sample next to their median; of more a
            colour bar tells the numbers.
        seed: of the embedding.
        title: above the picture, with the number of classes there, if not all are.
    """
    points = tsne_points(features, seed=seed)
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
            name = label(class_names[int(k)], most=16, instead=str(k))
            above: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            text = axes.annotate(name, (x, y), **above, fontsize=10, weight="bold")
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    else:
        figure.colorbar(shades, ax=axes, label="class", shrink=0.8, aspect=40)
    for name, shape in marker.items():
        axes.scatter([], [], color="0.35", marker=shape, s=28, label=label(name))
    head(axes, title if len(classes) == len(class_names) else f"{title}, {len(classes)} of {len(class_names)} classes")
    axes.set_aspect("equal", "datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    if groups:
        figure.legend(
            loc="outside lower center", ncols=6 if max(map(len, groups)) <= 12 else 3, frameon=False, fontsize=9
        )
    return figure
