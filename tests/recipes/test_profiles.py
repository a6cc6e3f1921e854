"""Imbalance profiles: published set sizes, and what must hold for any data set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.imbalance.profiles import (
    PROFILES,
    as_is,
    balanced,
    explicit,
    exponential,
    groups_of,
    pareto,
    rank_classes,
    step,
    two_group,
)

CIFAR10, CIFAR100 = np.full(10, 5000), np.full(100, 500)


# Fang et al. (2021): n_A = 5000, n_B = 5000 // R.
@pytest.mark.parametrize(
    ("majority", "ratio", "total"),
    [
        (3, 10, 18500),
        (3, 50, 15700),
        (3, 100, 15350),
        (5, 10, 27500),
        (5, 50, 25500),
        (5, 100, 25250),
        (7, 10, 36500),
        (7, 50, 35300),
        (7, 100, 35150),
    ],
)
def test_two_group_has_the_published_sizes(majority, ratio, total):
    counts, groups = two_group(CIFAR10, majority=majority, ratio=ratio)
    assert counts.sum() == total
    assert groups == {"majority": list(range(majority)), "minority": list(range(majority, 10))}


# CIFAR-LT, as Cui et al. (2019) cut it.
@pytest.mark.parametrize(
    ("sizes", "ratio", "total"),
    [
        (CIFAR10, 10, 20431),
        (CIFAR10, 50, 13996),
        (CIFAR10, 100, 12406),
        (CIFAR100, 10, 19573),
        (CIFAR100, 50, 12608),
        (CIFAR100, 100, 10847),
    ],
)
def test_exponential_has_the_published_sizes(sizes, ratio, total):
    counts, groups = exponential(sizes, ratio=ratio)
    assert counts.sum() == total and (np.diff(counts) < 0).sum() >= 9
    assert (counts[0], counts[-1]) == (sizes[0], sizes[0] // ratio)
    assert sorted(sum(groups.values(), [])) == list(range(len(sizes)))


@pytest.mark.parametrize("base", [2, 3, 5, 7, 10])
def test_exponential_gives_whole_powers_in_whole(base):
    powers = [base**i for i in range(5, -1, -1)]  # of which floating point misses 27 by 4e-15
    assert exponential(np.full(6, powers[0]), ratio=powers[0])[0].tolist() == powers


# Buda et al. (2018): the share mu of the classes has 1 / rho of the images.
@pytest.mark.parametrize(("minority", "number"), [(3, 3), (0.5, 5), (0.25, 3), (0, 0), (1, 1), (1.0, 10)])
def test_step_is_two_groups_told_by_the_minority(minority, number):
    counts, groups = step(CIFAR10, minority=minority, ratio=10)
    assert counts.tolist() == [5000] * (10 - number) + [500] * number
    assert groups["minority"] == list(range(10 - number, 10))


# Liu et al. (2019): 115.8 thousand images, drawn at random, of 1000 classes of 1280 to 5 images.
def test_pareto_has_the_shape_of_imagenet_lt():
    counts, groups = pareto(np.full(1000, 1280), alpha=6, ratio=256)
    assert (counts[0], counts[-1]) == (1280, 5) and (np.diff(counts) <= 0).all()
    assert counts.sum() == pytest.approx(115_800, rel=0.05)
    assert {name: len(classes) for name, classes in groups.items()} == {"many": 404, "medium": 456, "few": 140}


@pytest.mark.parametrize("alpha", [0.5, 1, 6])
def test_pareto_sizes_are_a_power_of_the_rank(alpha):
    counts = pareto(np.full(60, 10**6), alpha=alpha, ratio=100)[0].astype(float)
    i = np.arange(1, 61)
    # Without its constant, log size against log rank is a line of slope -1/alpha.
    constant = (10**4 - 10**6 * 60 ** (-1 / alpha)) / (1 - 60 ** (-1 / alpha))
    slope = np.diff(np.log(counts - constant)) / np.diff(np.log(i))
    assert np.median(slope) == pytest.approx(-1 / alpha, rel=1e-3)


def test_sizes_come_from_the_data_unless_given():
    sizes = np.array([90, 300, 120])
    assert exponential(sizes, ratio=9)[0].tolist() == [90, 30, 10]
    assert exponential(sizes, ratio=9, largest=300, class_order=[1, 2, 0])[0].tolist() == [33, 300, 100]
    assert pareto(sizes, ratio=9)[0].tolist()[::2] == [90, 10]
    assert pareto(sizes, ratio=3, largest=210, class_order=[1, 2, 0])[0].tolist()[:2] == [70, 210]
    assert as_is(sizes)[0].tolist() == sizes.tolist() and as_is(sizes)[1] == {"many": [1, 2], "medium": [0]}
    assert explicit(sizes, counts=[5, 300, 100]) == (pytest.approx([5, 300, 100]), groups_of([5, 300, 100]))


def test_balanced_keeps_the_smallest_class_size():
    counts, groups = balanced(np.array([7, 5, 9]))
    assert counts.tolist() == [5, 5, 5] and groups == {}


def test_majority_classes_may_be_named():
    assert two_group(np.array([600, 90, 500]), majority=[2], ratio=10, largest=500)[0].tolist() == [50, 50, 500]
    assert step(np.array([60, 90, 50]), minority=2, ratio=3, largest=60)[0].tolist() == [60, 20, 20]
    counts, groups = two_group(np.array([8, 9, 10, 8]), majority=[3, 1], ratio=3.9)
    assert counts.tolist() == [2, 8, 2, 8]
    assert groups == {"majority": [1, 3], "minority": [0, 2]}


@pytest.mark.parametrize("majority", [0, 10])
def test_one_group_may_be_empty(majority):
    counts, groups = two_group(CIFAR10, majority=majority, ratio=10)
    assert counts.tolist() == [5000 if majority else 500] * 10
    assert len(groups["majority"]) == majority


@pytest.mark.parametrize("profile", [exponential, pareto])
def test_one_class_is_the_largest(profile):
    assert profile(np.array([30]), ratio=10)[0].tolist() == [30]


RANKED = {
    "two_group": dict(majority=2, ratio=3),
    "step": dict(minority=0.5, ratio=3),
    "exponential": dict(ratio=7),
    "pareto": dict(ratio=7, alpha=1.5),
}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(RANKED)),
    st.lists(st.integers(10, 99), min_size=2, max_size=6),
    st.permutations(range(6)),
    st.permutations(range(6)),
)
def test_renaming_the_classes_renames_the_counts_and_the_groups(profile, sizes, order, names):
    order, names = (np.array([k for k in some if k < len(sizes)]) for some in (order, names))
    counts, groups = PROFILES[profile](np.array(sizes), class_order=order.tolist(), **RANKED[profile])
    assert (np.diff(counts[order]) <= 0).all()  # whatever the numbers of the classes
    renamed = np.empty(len(sizes), dtype=int)
    renamed[names] = sizes
    other, other_groups = PROFILES[profile](renamed, class_order=names[order].tolist(), **RANKED[profile])
    assert other[names].tolist() == counts.tolist()
    assert other_groups == {name: sorted(names[classes].tolist()) for name, classes in groups.items()}


def test_classes_are_ranked_as_told():
    assert rank_classes("given", 4) == rank_classes(None, 4) == [0, 1, 2, 3]
    assert rank_classes([2, 0, 1], 3) == [2, 0, 1]
    orders = [rank_classes("random", 6, seed=seed) for seed in range(20)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert rank_classes("random", 6, seed=3) == orders[3] and len({tuple(order) for order in orders}) > 10
    np.random.seed(0)
    assert rank_classes("random", 6, seed=3) == orders[3]


def test_groups_go_by_size_and_none_is_empty():
    counts = [5, 101, 20, 100, 19, 3000]
    assert groups_of(counts) == {"many": [1, 5], "medium": [2, 3], "few": [0, 4]}
    assert groups_of(counts, "thresholds", (6, 6)) == {"many": [1, 2, 3, 4, 5], "few": [0]}
    assert groups_of(counts, "quantiles") == {"many": [1, 5], "medium": [2, 3], "few": [0, 4]}
    assert groups_of(counts, "quantiles", (0.5, 0.5)) == {"many": [1, 3, 5], "few": [0, 2, 4]}
    assert groups_of(counts, "quantiles", (0, 1)) == {"medium": list(range(6))}
    assert groups_of(counts, "majority") == {"majority": [5], "minority": [0, 1, 2, 3, 4]}
    assert groups_of([7, 7, 7], "majority") == {"majority": [0, 1, 2]}
    assert groups_of([7, 7, 7], "quantiles") == {"medium": [0, 1, 2]}
    assert groups_of([9, 7, 7, 7, 9, 7], "quantiles") == {"many": [0, 4], "medium": [1, 2, 3, 5]}
    assert groups_of(np.arange(3), "quantiles") == {"many": [2], "medium": [1], "few": [0]}


@pytest.mark.parametrize(
    ("bounds", "few", "many"),
    [((0.5, 0.9), 5, 1), ((0.3, 0.7), 3, 3), ((0.1, 0.8), 1, 2), ((0.7, 0.7), 7, 3), ((0.29, 0.91), 2, 0)],
)
def test_shares_of_ten_classes_are_whole_classes(bounds, few, many):
    """By hand: 0.5 of ten classes are the 5 smallest, and above 0.9 is the largest, though 1 - 0.9 is below 0.1."""
    by_size = [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]
    counts = [3 + 10 * by_size.index(k) for k in range(10)]
    parts = {"many": by_size[10 - many :] if many else [], "medium": by_size[few : 10 - many], "few": by_size[:few]}
    assert groups_of(counts, "quantiles", bounds) == {name: sorted(part) for name, part in parts.items() if part}


# Liu et al. (2019) and Cao et al. (2019): CIFAR-100-LT at ratio 100 has 35, 35 and 30 classes in the groups.
def test_groups_of_cifar_100_lt_are_the_published_ones():
    groups = exponential(CIFAR100, ratio=100)[1]
    assert groups == {"many": list(range(35)), "medium": list(range(35, 70)), "few": list(range(70, 100))}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=12),
    st.sampled_from(["thresholds", "quantiles", "majority"]),
    st.permutations(range(12)),
)
def test_groups_are_a_partition_that_renaming_the_classes_renames(counts, rule, names):
    groups = groups_of(counts, rule)
    assert sorted(sum(groups.values(), [])) == list(range(len(counts))) and all(groups.values())
    names = [k for k in names if k < len(counts)]
    renamed = groups_of([counts[k] for k in names], rule)
    assert renamed == {name: [i for i, k in enumerate(names) if k in classes] for name, classes in groups.items()}
    ranges = [
        [counts[k] for k in groups[name]]
        for name in ("few", "minority", "medium", "many", "majority")
        if name in groups
    ]
    assert all(max(low) < min(high) for low, high in zip(ranges, ranges[1:], strict=False))


@pytest.mark.parametrize(
    ("profile", "arguments", "message"),
    [
        ("two_group", dict(majority=11, ratio=10), r"majority \(K_A\) is 11; allowed: 0 to 10"),
        ("two_group", dict(majority=-1, ratio=10), r"majority \(K_A\) is -1; allowed: 0 to 10"),
        ("two_group", dict(majority=[0, 10], ratio=10), r"majority is \[0, 10\]; allowed: different classes out of 0"),
        ("two_group", dict(majority=[0, 0], ratio=10), r"majority is \[0, 0\]; allowed: different classes"),
        ("two_group", dict(majority=3, ratio=0.5), r"ratio \(R\) is 0.5; allowed: 1 or more"),
        ("two_group", dict(majority=3, ratio=float("nan")), r"ratio \(R\) is nan; allowed: 1 or more"),
        ("two_group", dict(majority=3, ratio=10, largest=5001), "largest is 5001; allowed: 1 to 5000"),
        ("step", dict(minority=3, ratio=1, largest=0), "largest is 0; allowed: 1 to 5000"),
        ("two_group", dict(majority=3, ratio=10, largest=9), r"ratio \(R\) is 10.*allowed: 1 to 9"),
        ("two_group", dict(majority=3, ratio=5001), r"ratio \(R\) is 5001.*allowed: 1 to 5000"),
        (
            "two_group",
            dict(majority=[1], ratio=2, class_order=[*range(9, -1, -1)]),
            r"majority is \[1\]; allowed: thei",
        ),
        ("step", dict(minority=11, ratio=10), "minority is 11; allowed: 0 to 10, their number"),
        ("step", dict(minority=1.1, ratio=10), "minority is 1.1; allowed: 0 to 1.0, their share"),
        ("exponential", dict(ratio=0.1), r"ratio \(R\) is 0.1; allowed: 1 or more"),
        ("exponential", dict(ratio=6000), r"ratio \(R\) is 6000, which leaves a class empty; allowed: 1 to 5000"),
        ("exponential", dict(ratio=10, largest=5001), "largest is 5001; allowed: 1 to 5000"),
        ("exponential", dict(ratio=1, largest=0), "largest is 0; allowed: 1 to 5000"),
        ("exponential", dict(ratio=2, class_order=[0] * 10), r"class_order is \[0, .*allowed: 'given', 'random', or"),
        ("exponential", dict(ratio=2, class_order="alphabetic"), "class_order is 'alphabetic'; allowed: 'given'"),
        ("pareto", dict(ratio=10, alpha=0), "alpha is 0; allowed: above 0"),
        ("pareto", dict(ratio=float("inf")), r"ratio \(R\) is inf; allowed: 1 or more"),
        ("explicit", dict(counts=[5] * 9), "counts has 9 sizes; allowed: 10, one for each class"),
        ("explicit", dict(counts=[5] * 9 + [0]), r"counts\[9\] is 0; allowed: 1 to 5000, the images of class 9"),
        ("explicit", dict(counts=[5001] * 10), r"counts\[0\] is 5001; allowed: 1 to 5000, the images of class 0"),
    ],
)
def test_impossible_profiles_are_refused(profile, arguments, message):
    with pytest.raises(ValueError, match=message):
        PROFILES[profile](CIFAR10, **arguments)


def test_a_class_that_has_too_few_images_is_named():
    with pytest.raises(
        ValueError, match="largest is 90, which asks for 30 images of class 1; allowed: at most 29 of it"
    ):
        exponential(np.array([90, 29, 10]), ratio=9, largest=90)
    with pytest.raises(ValueError, match="largest is 90, which asks for 9 images of class 2; allowed: at most 8 of it"):
        two_group(np.array([90, 29, 8]), majority=1, ratio=10, largest=90)


def test_the_largest_ratio_named_is_allowed():
    assert two_group(CIFAR10, majority=3, ratio=5000)[0][3:].tolist() == [1] * 7
    assert exponential(CIFAR10, ratio=5000)[0][-1] == pareto(CIFAR10, ratio=5000)[0][-1] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sizes",), "rule is 'sizes'; allowed: 'thresholds', 'quantiles', or 'majority'"),
        (("majority", (1, 2)), "rule is 'majority' with bounds; allowed: .*'majority' without bounds"),
        (("thresholds", (100, 20)), "bounds is 100 and 20; allowed: two numbers of images the smaller first"),
        (("quantiles", (20, 100)), "bounds is 20 and 100; allowed: two shares of the classes, 0 to 1, the smaller"),
    ],
)
def test_impossible_groups_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        groups_of([1, 2, 3], *arguments)
