"""Imbalance profiles: how many images of each class a training set keeps, and which classes form its groups.

With n_1 >= ... >= n_K the sizes from the largest class to the smallest, R = n_1 / n_K >= 1 the imbalance ratio:

    balanced      n_i = n_1
    two_group     n_A = n_1 for the K_A majority classes, n_B = n_1 // R for the others             Fang et al. 2021
    step          the same, given by the number or share of its minority classes                    Buda et al. 2018
    exponential   n_i = n_1 R^(-(i-1)/(K-1)), rounded down                                           Cui et al. 2019
    pareto        n_i = n_K + (n_1 - n_K) (i^(-1/alpha) - K^(-1/alpha)) / (1 - K^(-1/alpha))         Liu et al. 2019
    explicit      as listed
    as_is         everything there is

Which class is which is a matter of `class_order`: a number of a class says nothing about its size, so groups are made
of sizes too. Without a size of its own, the largest class gets what every class has: the size of the smallest.

Sources: Fang, He, Long & Su, "Exploring deep neural networks via layer-peeled model: Minority collapse in imbalanced
training" (arXiv 2101.12699); Buda, Maki & Mazurowski, "A systematic study of the class imbalance problem in
convolutional neural networks" (arXiv 1710.05381); Cui, Jia, Lin, Song & Belongie, "Class-balanced loss based on
effective number of samples" (arXiv 1901.05555); Liu, Miao, Zhan, Wang, Gong & Yu, "Large-scale long-tailed recognition
in an open world" (arXiv 1904.05160).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from recipes.errors import UserError

Groups = dict[str, list[int]]

_RANKING = 3  # its own random stream, other than those of recipes/training/manifest.py

# Few below the first, many above the second: images of a class (Liu et al. 2019), or shares of the classes.
_BOUNDS = {"thresholds": (20, 100), "quantiles": (1 / 3, 2 / 3)}


def balanced(sizes: np.ndarray) -> tuple[np.ndarray, Groups]:
    """As many images of every class as the smallest class has.

    Args:
        sizes: images at hand per class, (K,).

    Returns:
        Images to keep per class (K,), and no groups.
    """
    return np.full_like(sizes, sizes.min()), {}


def two_group(
    sizes: np.ndarray,
    *,
    majority: int | list[int],
    ratio: float,
    largest: int | None = None,
    class_order: Sequence[int] | None = None,
) -> tuple[np.ndarray, Groups]:
    """n_A images of each majority class, n_A // R of each minority class.

    Args:
        sizes: images at hand per class, (K,).
        majority: K_A, meaning the first K_A classes of the order, or the majority classes themselves.
        ratio: R = n_A / n_B, at least 1.
        largest: n_A; the size of the smallest class at hand if not given.
        class_order: the classes from large to small; as they are numbered if not given.

    Returns:
        Images to keep per class (K,), and the classes of the groups 'majority' and 'minority'.

    Raises:
        UserError: K_A outside 0..K, a class outside 0..K-1 or given twice, R below 1, R so large that a minority
            class is empty, a class with fewer images than it should keep, or an order together with majority classes
            given by number.
    """
    num_classes, most = len(sizes), int(sizes.max())
    n_A = int(sizes.min()) if largest is None else largest
    if not 1 <= n_A <= most:
        raise UserError(f"largest is {n_A}; allowed: 1 to {most}, the images of the largest class at hand")
    order = rank_classes(class_order, num_classes)
    if isinstance(majority, int):
        if not 0 <= majority <= num_classes:
            raise UserError(f"majority (K_A) is {majority}; allowed: 0 to {num_classes}, the number of classes")
        majority = order[:majority]
    elif order != list(range(num_classes)):
        raise UserError(f"majority is {majority}; allowed: their number K_A, as class_order says which they are")
    if len(set(majority)) < len(majority) or not set(majority) <= set(range(num_classes)):
        raise UserError(f"majority is {majority}; allowed: different classes out of 0 to {num_classes - 1}")
    _check_ratio(ratio)
    minority = [k for k in range(num_classes) if k not in set(majority)]
    n_B = int(n_A // ratio)
    if minority and n_B < 1:
        raise UserError(
            f"ratio (R) is {ratio:g}, which leaves a minority class empty; allowed: 1 to {n_A}, "
            "the size of a majority class"
        )
    counts = np.full(num_classes, n_A)
    counts[minority] = n_B
    _check_at_hand(counts, sizes)
    return counts, {"majority": sorted(majority), "minority": minority}


def step(
    sizes: np.ndarray,
    *,
    minority: int | float,
    ratio: float,
    largest: int | None = None,
    class_order: Sequence[int] | None = None,
) -> tuple[np.ndarray, Groups]:
    """The profile of two groups, given by its minority: the last classes of the order.

    Args:
        sizes: images at hand per class, (K,).
        minority: an integer is the number of minority classes, a float their share of the classes, 0.0 to 1.0, which
            is rounded to a whole number of classes.
        ratio, largest, class_order: as for `two_group`.

    Returns:
        Images to keep per class (K,), and the classes of the groups 'majority' and 'minority'.

    Raises:
        UserError: more minority classes than classes, a share outside 0..1, or what `two_group` refuses.
    """
    num_classes = len(sizes)
    most, what = (num_classes, "their number") if isinstance(minority, int) else (1.0, "their share of the classes")
    if not 0 <= minority <= most:
        raise UserError(f"minority is {minority}; allowed: 0 to {most}, {what}")
    number = minority if isinstance(minority, int) else math.floor(minority * num_classes + 0.5)
    return two_group(sizes, majority=num_classes - number, ratio=ratio, largest=largest, class_order=class_order)


def exponential(
    sizes: np.ndarray, *, ratio: float, largest: int | None = None, class_order: Sequence[int] | None = None
) -> tuple[np.ndarray, Groups]:
    """Sizes that fall by a constant factor from one class to the next, as in CIFAR-LT.

    Args:
        sizes: images at hand per class, (K,).
        ratio: R = n_1 / n_K, at least 1.
        largest: n_1; the size of the smallest class at hand if not given.
        class_order: the classes from the largest to the smallest; as they are numbered if not given.

    Returns:
        Images to keep per class (K,), and the groups that `groups_of` makes of them.

    Raises:
        UserError: R below 1, R so large that a class is empty, or a class with fewer images than it should keep.
    """
    largest = _largest(sizes, ratio, largest)
    i = np.arange(len(sizes))
    return _give(largest / ratio ** (i / max(len(sizes) - 1, 1)), sizes, class_order)


def pareto(
    sizes: np.ndarray,
    *,
    ratio: float,
    alpha: float = 6.0,
    largest: int | None = None,
    class_order: Sequence[int] | None = None,
) -> tuple[np.ndarray, Groups]:
    """Sizes that fall by a power of the rank: the quantiles of a Pareto distribution, from n_1 to n_K = n_1 / R.

    ImageNet-LT was drawn at random from such a distribution with alpha = 6, n_1 = 1280 and n_K = 5: 115.8 thousand
    images, where the quantiles give 121 thousand.

    Args:
        sizes: images at hand per class, (K,).
        ratio: R = n_1 / n_K, at least 1.
        alpha: exponent of the distribution, above 0; the smaller, the fewer classes are large.
        largest: n_1; the size of the smallest class at hand if not given.
        class_order: the classes from the largest to the smallest; as they are numbered if not given.

    Returns:
        Images to keep per class (K,), and the groups that `groups_of` makes of them.

    Raises:
        UserError: alpha not above 0, R below 1, R so large that a class is empty, or a class with fewer images than it
            should keep.
    """
    largest = _largest(sizes, ratio, largest)
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha is {alpha:g}; allowed: above 0")
    power = np.arange(1, len(sizes) + 1) ** (-1 / alpha)
    height = (power - power[-1]) / (1 - power[-1]) if len(sizes) > 1 else np.ones(1)  # from 1 to 0
    return _give(largest / ratio + (largest - largest / ratio) * height, sizes, class_order)


def explicit(sizes: np.ndarray, *, counts: Sequence[int]) -> tuple[np.ndarray, Groups]:
    """Use the sizes listed.

    Args:
        sizes: images at hand per class, (K,).
        counts: images to keep of class 0, 1, ..., K-1.

    Returns:
        Images to keep per class (K,), and the groups that `groups_of` makes of them.

    Raises:
        UserError: not one size for each class, an empty class, or a class with fewer images than it should keep.
    """
    if len(counts) != len(sizes):
        raise UserError(f"counts has {len(counts)} sizes; allowed: {len(sizes)}, one for each class")
    for k, count in enumerate(counts):
        if not 1 <= count <= sizes[k]:
            raise UserError(f"counts[{k}] is {count}; allowed: 1 to {sizes[k]}, the images of class {k}")
    return np.array(counts), groups_of(counts)


def as_is(sizes: np.ndarray) -> tuple[np.ndarray, Groups]:
    """Every image of every class.

    Args:
        sizes: images at hand per class, (K,).

    Returns:
        Images to keep per class (K,), and the groups that `groups_of` makes of them.
    """
    return sizes.copy(), groups_of(sizes)


PROFILES: dict[str, Callable[..., tuple[np.ndarray, Groups]]] = {
    profile.__name__: profile for profile in (balanced, two_group, step, exponential, pareto, explicit, as_is)
}


def rank_classes(class_order: str | Sequence[int] | None, num_classes: int, *, seed: int = 0) -> list[int]:
    """Order the classes from the largest to the smallest.

    Args:
        class_order: 'given' or None for 0, 1, ..., K-1; 'random' for an order that `seed` decides; or the classes.

    Raises:
        UserError: neither of these, or not each class once.
    """
    if class_order is None or class_order == "given":
        return list(range(num_classes))
    if class_order == "random":
        return np.random.default_rng((seed, _RANKING)).permutation(num_classes).tolist()
    if isinstance(class_order, str) or sorted(class_order) != list(range(num_classes)):
        raise UserError(
            f"class_order is {class_order!r}; allowed: 'given', 'random', or each class of 0 to {num_classes - 1} once"
        )
    return list(class_order)


def groups_of(
    counts: Sequence[int] | np.ndarray, rule: str = "thresholds", bounds: tuple[float, float] | None = None
) -> Groups:
    """Sort the classes into groups by their sizes alone; classes of one size are in one group.

    Args:
        counts: training images per class, (K,).
        rule: 'thresholds': many for more than `bounds[1]` images, few for less than `bounds[0]`, medium for the rest.
            'quantiles': few where no more than a share `bounds[0]` of all classes is of this size or smaller, many
            where no more than a share 1 - `bounds[1]` is of this size or larger, medium for the rest.
            'majority': majority for the classes as large as the largest, minority for the rest.
        bounds: 20 and 100 images, or 1/3 and 2/3 of the classes, if not given.

    Returns:
        Classes of each group in ascending order. A group without classes is left out: it has no accuracy.

    Raises:
        UserError: an unknown rule; bounds that are not in order, or shares outside 0..1, or bounds of a rule that has
            none.
    """
    counts = np.asarray(counts)
    if rule == "majority" and bounds is None:
        masks = {"majority": counts == counts.max(), "minority": counts < counts.max()}
    elif rule in _BOUNDS:
        low, high = bounds or _BOUNDS[rule]
        if not 0 <= low <= high <= (1 if rule == "quantiles" else math.inf):
            allowed = "two shares of the classes, 0 to 1," if rule == "quantiles" else "two numbers of images"
            raise UserError(f"bounds is {low:g} and {high:g}; allowed: {allowed} the smaller first")
        if rule == "thresholds":
            few, many = counts < low, counts > high
        else:
            slack = 1e-9  # 1 - 2/3 is a little more than 1/3
            ascending = np.sort(counts)
            few = np.searchsorted(ascending, counts, side="right") <= (low + slack) * len(counts)
            many = len(counts) - np.searchsorted(ascending, counts) <= (1 - high + slack) * len(counts)
        masks = {"many": many, "medium": ~many & ~few, "few": few}
    else:
        given = "" if bounds is None else " with bounds"
        raise UserError(f"rule is {rule!r}{given}; allowed: 'thresholds', 'quantiles', or 'majority' without bounds")
    return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items() if mask.any()}


def _check_ratio(ratio: float) -> None:
    if not (math.isfinite(ratio) and ratio >= 1):
        raise UserError(f"ratio (R) is {ratio:g}; allowed: 1 or more")


def _largest(sizes: np.ndarray, ratio: float, largest: int | None) -> int:
    """Return the size of the largest class, checked to leave an image to the smallest."""
    _check_ratio(ratio)
    if largest is None:
        largest = int(sizes.min())
    elif not 1 <= largest <= sizes.max():
        raise UserError(f"largest is {largest}; allowed: 1 to {sizes.max()}, the images of the largest class at hand")
    if ratio > largest:
        raise UserError(
            f"ratio (R) is {ratio:g}, which leaves a class empty; allowed: 1 to {largest}, the largest class"
        )
    return largest


def _give(by_rank: np.ndarray, sizes: np.ndarray, class_order: Sequence[int] | None) -> tuple[np.ndarray, Groups]:
    """Give the classes, from the largest to the smallest, the sizes (K,) rounded down, which each must have."""
    counts = np.empty(len(sizes), dtype=np.int64)
    # Rounded first, or the last digit of a power could cost an image.
    counts[rank_classes(class_order, len(sizes))] = np.floor(np.round(by_rank, 6))
    _check_at_hand(counts, sizes)
    return counts, groups_of(counts)


def _check_at_hand(counts: np.ndarray, sizes: np.ndarray) -> None:
    if (counts > sizes).any():
        k = int(np.argmax(counts > sizes))
        raise UserError(
            f"largest is {counts.max()}, which asks for {counts[k]} images of class {k}; allowed: at most "
            f"{sizes[k]} of it, all there are"
        )
