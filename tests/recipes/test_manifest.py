"""Training sets cut by index, and the manifests that record them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.imbalance.profiles import PROFILES
from recipes.training.manifest import Manifest, build_manifest, carve_validation, subsample

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


NESTED = {
    "two_group": dict(majority=1),
    "step": dict(minority=2),
    "exponential": {},
    "pareto": {},
}


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(NESTED)), st.floats(1, 45), st.floats(1, 45), st.sampled_from(["given", "random", [2, 0, 1]])
)
def test_the_set_of_a_smaller_ratio_holds_that_of_a_larger_one(profile, one, other, class_order):
    small, large = (
        manifest(3, profile=profile, parameters={**NESTED[profile], "ratio": ratio, "class_order": class_order})[0]
        for ratio in sorted((one, other))
    )
    assert set(large.indices) <= set(small.indices)
    assert small.validation == large.validation


def test_which_classes_are_large_is_told_or_drawn():
    def sizes(seed, **parameters):
        return manifest(seed, profile="exponential", parameters={"ratio": 9.0, **parameters})[0].counts

    assert sizes(0) == sizes(0, class_order="given") == [90, 30, 10]
    assert sizes(0, class_order=[2, 0, 1]) == [30, 10, 90]
    drawn = {tuple(sizes(seed, class_order="random")) for seed in range(30)}
    assert drawn > {(90, 30, 10)} and all(sorted(counts) == [10, 30, 90] for counts in drawn)


def test_a_random_class_order_leaves_validation_and_the_choice_of_images_alone():
    given, drawn = (
        manifest(5, profile="explicit", parameters={"counts": [9, 9, 9]})[0],
        manifest(5, profile="step", parameters={"minority": 3, "ratio": 10.0, "class_order": "random"})[0],
    )
    assert drawn.validation == given.validation and drawn.indices == given.indices


def test_groups_are_those_of_the_profile_or_of_a_rule():
    assert manifest(profile="exponential", parameters={"ratio": 9.0})[0].groups == {"medium": [0, 1], "few": [2]}
    arguments = dict(profile="exponential", parameters={"ratio": 9.0, "class_order": [1, 2, 0]})
    ranked = manifest(**arguments, grouping="quantiles")[0]
    assert ranked.groups == {"many": [1], "medium": [2], "few": [0]}
    assert manifest(**arguments, grouping="thresholds", bounds=(20, 29))[0].groups == {"many": [1, 2], "few": [0]}
    assert manifest(grouping="majority")[0].groups == {"majority": [0], "minority": [1, 2]}


def test_an_unknown_profile_is_refused():
    with pytest.raises(ValueError, match=f"profile is 'long'; allowed: {', '.join(PROFILES)}"):
        manifest(profile="long")


def test_a_manifest_written_before_there_were_other_profiles_is_read(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(
        '{"profile": "two_group", "parameters": {"majority": 1, "ratio": 2.0}, "seed": 0, "fingerprint": "abc", '
        '"counts": [2, 1], "groups": {"majority": [0], "minority": [1]}, "indices": [0, 2, 3], "validation": [1], '
        '"sha256": "334c16b16f95929406d5c19fef901487aba3a70898f748a98e8a3a84f59329f4"}'
    )
    assert Manifest.load(path).groups == {"majority": [0], "minority": [1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file or directory; allowed: a manifest.json"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
        (lambda path: path.write_text(""), "is not JSON: Expecting value"),
        (lambda path: path.write_text(path.read_text()[:-9]), "is not JSON: Unterminated string"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not JSON: 'utf-8' codec"),
        (lambda path: path.write_text("[1, 2]"), "holds list; allowed: profile, parameters, .*, sha256"),
        (lambda path: path.write_text("{}"), "holds nothing; allowed: profile"),
        (lambda path: path.write_text('{"seed": 0}'), "holds seed; allowed: profile"),
        (
            lambda path: path.write_text(path.read_text()[:-1] + ', "note": 1}'),
            "holds class_names, .* note, .*; allowed: p",
        ),
        (lambda path: path.write_text(path.read_text().replace('"seed": 0', '"seed": 1')), "it was changed"),
        (lambda path: path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0')), "it was changed"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "manifest.json"
    path.write_text(manifest()[0].to_json())
    change(path)
    with pytest.raises(ValueError, match=f"^manifest '{path}' .*{message}") as error:
        Manifest.load(path)
    assert "\n" not in str(error.value)


def test_a_manifest_fits_the_data_set_it_was_made_from():
    made, labels = manifest()
    made.check(fingerprint="abc", num_images=300, labels=labels)
    made.check(labels=labels)
    made.check()


MADE, LABELS = manifest()


@pytest.mark.parametrize(
    ("changes", "known", "message"),
    [
        ({}, dict(fingerprint="abd"), "the manifest is of data set abc; allowed: abd, this one"),
        ({}, dict(num_images=200), r"the manifest lists image 29\d; allowed: 0 to 199"),
        ({}, dict(labels=LABELS[:200]), r"the manifest lists image 29\d; allowed: 0 to 199"),
        ({"indices": [-1, *MADE.indices[1:]]}, dict(num_images=300), "lists image -1; allowed: 0 to 299"),
        ({"validation": [300]}, dict(num_images=300), "lists image 300; allowed: 0 to 299"),
        ({"validation": MADE.indices[:1]}, {}, f"lists image {MADE.indices[0]} twice; allowed: once, to train, to"),
        ({"indices": MADE.indices[:1] + MADE.indices[:-1]}, {}, "twice"),
        ({}, dict(labels=(LABELS + 1) % 3), "the manifest counts 90 images of class 0; allowed: 22"),
        ({}, dict(labels=np.where(np.arange(300) == MADE.indices[-1], 2 - LABELS, LABELS)), "images of class"),
        ({"counts": [90, 22, 23]}, dict(labels=LABELS), "counts 23 images of class 2; allowed: 22"),
        ({"counts": [90, 44]}, dict(labels=LABELS), "counts 2 classes; allowed: 3"),
    ],
)
def test_a_manifest_of_another_data_set_is_refused(changes, known, message):
    with pytest.raises(ValueError, match=message):
        replace(MADE, **changes).check(**known)


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
