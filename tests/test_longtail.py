"""Imbalance profiles: published set sizes, and what must hold for any data set."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.longtail import Manifest, balanced, build_manifest, carve_validation, subsample, two_group

CIFAR10 = np.full(10, 5000)


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


def test_balanced_keeps_the_smallest_class_size():
    counts, groups = balanced(np.array([7, 5, 9]))
    assert counts.tolist() == [5, 5, 5] and groups == {}


def test_majority_classes_may_be_named():
    counts, groups = two_group(np.array([8, 9, 10, 8]), majority=[3, 1], ratio=3.9)
    assert counts.tolist() == [2, 8, 2, 8]
    assert groups == {"majority": [1, 3], "minority": [0, 2]}


@pytest.mark.parametrize("majority", [0, 10])
def test_one_group_may_be_empty(majority):
    counts, groups = two_group(CIFAR10, majority=majority, ratio=10)
    assert counts.tolist() == [5000 if majority else 500] * 10
    assert len(groups["majority"]) == majority


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(majority=11, ratio=10), r"majority \(K_A\) is 11; allowed: 0 to 10"),
        (dict(majority=-1, ratio=10), r"majority \(K_A\) is -1; allowed: 0 to 10"),
        (dict(majority=[0, 10], ratio=10), r"majority is \[0, 10\]; allowed: different classes out of 0 to 9"),
        (dict(majority=[0, 0], ratio=10), r"majority is \[0, 0\]; allowed: different classes"),
        (dict(majority=3, ratio=0.5), r"ratio \(R\) is 0.5; allowed: 1 or more"),
        (dict(majority=3, ratio=float("nan")), r"ratio \(R\) is nan; allowed: 1 or more"),
        (dict(majority=3, ratio=5001), r"ratio \(R\) is 5001.*allowed: 1 to 5000"),
    ],
)
def test_impossible_groups_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        two_group(CIFAR10, **arguments)


def test_the_largest_ratio_named_is_allowed():
    counts, _ = two_group(CIFAR10, majority=3, ratio=5000)
    assert counts[3:].tolist() == [1] * 7


labels_of_any_set = st.lists(st.integers(0, 4), min_size=20, max_size=200).map(np.array)


@settings(deadline=None, max_examples=50)
@given(labels_of_any_set, st.floats(0, 0.9), st.integers(0, 2**32 - 1))
def test_validation_is_a_part_of_every_class_and_the_rest_is_the_complement(labels, fraction, seed):
    train, validation = carve_validation(labels, 5, fraction=fraction, seed=seed)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    for k in range(5):
        whole, part = (labels == k).sum(), (labels[validation] == k).sum()
        if fraction and whole > 1:
            assert part == sorted([1, round(fraction * whole), whole - 1])[1]


@settings(deadline=None, max_examples=50)
@given(labels_of_any_set, st.integers(0, 2**32 - 1), st.data())
def test_subsample_gives_the_counts_asked_for_and_nested_sets(labels, seed, data):
    indices = np.flatnonzero(np.arange(len(labels)) % 3)
    sizes = np.bincount(labels[indices], minlength=5)
    large = np.array([data.draw(st.integers(0, int(size))) for size in sizes])
    small = large // 2
    chosen, fewer = (subsample(labels, indices, counts, seed=seed) for counts in (large, small))
    assert np.bincount(labels[chosen], minlength=5).tolist() == large.tolist()
    assert set(fewer) <= set(chosen) <= set(indices) and len(set(chosen)) == len(chosen)


def manifest(seed=0, **changes):
    arguments = dict(
        profile="two_group", parameters={"majority": 1, "ratio": 4.0}, val_fraction=0.1, seed=seed, fingerprint="abc"
    )
    labels = np.arange(300) % 3
    return build_manifest(labels, ("a", "b", "c"), **{**arguments, **changes}), labels


def test_manifest_keeps_validation_apart_and_counts_what_it_lists():
    made, labels = manifest()
    assert made.counts == [90, 22, 22]
    assert np.bincount(labels[made.indices]).tolist() == made.counts
    assert np.bincount(labels[made.validation]).tolist() == [10, 10, 10]
    assert not set(made.indices) & set(made.validation)
    assert made.groups == {"majority": [0], "minority": [1, 2]}


def test_manifest_is_a_function_of_the_seed():
    assert manifest()[0].sha256 == manifest()[0].sha256
    assert len({manifest(seed)[0].sha256 for seed in range(5)}) == 5
    assert manifest()[0].sha256 != manifest(fingerprint="abd")[0].sha256


def test_manifest_survives_its_file_and_notices_a_change(tmp_path):
    made, _ = manifest()
    path = tmp_path / "manifest.json"
    path.write_text(made.to_json())
    assert Manifest.load(path) == made
    content = json.loads(path.read_text())
    content["indices"][0] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="it was changed"):
        Manifest.load(path)


def test_a_class_without_training_images_is_named():
    with pytest.raises(ValueError, match=r"class 1 \('b'\) has no image in the train split"):
        build_manifest(
            np.array([0, 0, 2]),
            ("a", "b", "c"),
            profile="balanced",
            parameters={},
            val_fraction=0.0,
            seed=0,
            fingerprint="",
        )
