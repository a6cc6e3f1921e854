"""Every number of the report against the full batch, over shapes: few features, few samples, empty classes."""

import dataclasses
import math

import numpy as np
import oracles_nc
import pytest
import torch

from nc_probe import Agreement, ClassMoments, NCProbe, measure

# d and the samples of each class.
SHAPES = [
    (d, counts)
    for d in (2, 3, 7, 40)
    for counts in (
        [6, 6, 6, 6],
        [30, 30, 3, 3, 3],
        [40, 17, 9, 5, 2, 1],
        [5, 0, 5, 1, 0, 9],
        [2, 1, 1],
        [12] * 9 + [1] * 3,
        [20, 4],
    )
] + [(1, [9, 4, 4]), (5, [7])]

NOT_NUMBERS = {
    "center",
    "num_classes",
    "weight_decay",
    "nc1_precision",
    "nc1_source",
    "nc4_source",
    "means",
    "weight",
    "conventions",
    "groups",
    "heads",
    "layers",
    "iterates",
}
GROUPS = {"few": [0, 1], "others": range(1, 100), "one": [1], "none": []}


def problem(d, counts, seed):
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x = 2 + torch.randn(len(counts), d, generator=gen, dtype=torch.float64)[labels]
    x = x + 0.5 * torch.randn(len(labels), d, generator=gen, dtype=torch.float64)
    W, b = torch.randn(len(counts), d, generator=gen).double(), torch.randn(len(counts), generator=gen).double()
    order = torch.randperm(len(labels), generator=gen)
    return x[order], labels[order], W, b


def agreement(x, labels, W, b):
    chosen, nearest = map(torch.as_tensor, oracles_nc.predictions(x.numpy(), labels.numpy(), W.numpy(), b.numpy()))
    hits = (chosen == labels, nearest == labels, chosen == nearest)
    return Agreement(*(torch.zeros(len(W)).long().index_add_(0, labels, h.long()) for h in hits), "counted")


def absent(value):
    if isinstance(value, tuple):
        return all(map(absent, value))
    return value is None or value == 0 or math.isnan(value)


def by_moments(x, labels, W, b, **settings):
    moments = ClassMoments(*W.shape)
    for xb, yb in zip(x.split(7), labels.split(7), strict=True):
        moments.update(xb, yb)
    return measure(moments, W, b, agreement=agreement(x, labels, W, b), **settings)


def by_probe(x, labels, W, b, **settings):
    """The features are kept, and looked at again."""
    model = torch.nn.utils.skip_init(torch.nn.Linear, *reversed(W.shape), dtype=torch.float64).eval()
    model.load_state_dict({"weight": W, "bias": b})
    with torch.no_grad(), NCProbe(model, spectrum=True, **settings) as probe:
        for xb, yb in zip(x.split(7), labels.split(7), strict=True):
            model(xb)
            probe.update(yb)
    return probe.compute()


def by_second_pass(x, labels, W, b, **settings):
    """Features are not kept, classes have a scatter each, and the samples are shown again."""
    model = torch.nn.utils.skip_init(torch.nn.Linear, *reversed(W.shape), dtype=torch.float64).eval()
    model.load_state_dict({"weight": W, "bias": b})
    probe = NCProbe(model, cache_bytes=0, spectrum=True, **settings)
    with torch.no_grad():
        for showing in (probe, probe.second_pass()):
            with showing:
                model(x)
                probe.update(labels)
    return probe.compute()


@pytest.mark.parametrize("measured", [by_moments, by_probe, by_second_pass])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_every_number(shape, measured):
    d, counts = SHAPES[shape]
    center = ("balanced", "empirical")[shape % 2]
    x, labels, W, b = problem(d, counts, shape)
    groups = {name: [k for k in classes if k < len(counts)] for name, classes in GROUPS.items()}
    pooled = center == "empirical" and measured is by_second_pass
    got = measured(x, labels, W, b, center=center, groups=groups)
    arrays = [t.numpy() for t in (x, labels, W, b)]
    for classes, part in [(None, got), *((groups[name], part) for name, part in got.groups.items())]:
        expected = oracles_nc.report(*arrays, center=center, classes=classes)
        names = {f.name for f in dataclasses.fields(part)} - NOT_NUMBERS
        assert set(expected) <= names
        assert part.num_classes == sum(n > 0 for n in counts)
        for name in names:
            value = getattr(part, name)
            if name == "class_nc1" and pooled and value == ():
                continue
            if name in expected:
                assert value == pytest.approx(expected[name], rel=1e-8, abs=1e-10), name
            else:
                assert absent(value), f"{name} is {value}, but should be absent"


def test_the_oracle_knows_the_simplex():
    """The oracle itself, on what can be said by hand."""
    corners = np.eye(3) - 1 / 3
    expected = oracles_nc.report(np.repeat(corners, 2, 0), np.repeat(np.arange(3), 2), corners, np.zeros(3))
    for name in ("nc1", "nc1_trace", "cdnv", "nc2_etf", "nc2_seli", "nc2_norm", "gnc2_log", "gnc2_riesz", "nc3"):
        assert expected[name] == pytest.approx(0, abs=1e-12), name
    assert expected["feature_rank"] == 2 and expected["stable_rank"] == pytest.approx(2)
    assert expected["nc4"] == expected["accuracy"] == 1 and expected["mean_cosine"] == pytest.approx(-0.5)
