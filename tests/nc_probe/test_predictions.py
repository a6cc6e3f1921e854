"""Measures at SELI against those of features and a classifier that are one, built by numpy."""

import math

import numpy as np
import pytest
import torch

from nc_probe import ClassMoments, measure
from nc_probe.measures.predictions import at_seli

CASES = [[5, 40, 8, 5, 20], [9, 9, 9, 9], [100, 1, 1], [30, 0, 3, 4, 0, 30], [2, 7]]


def build(counts):
    """Features (N, d), labels and classifier rows of a SELI: the singular vectors of the simplex-encoded labels."""
    labels = np.repeat(np.arange(len(counts)), counts)
    K = len(set(labels))
    Z = np.eye(len(counts))[labels][:, np.array(counts) > 0].T - 1 / K
    V, L, U = np.linalg.svd(Z, full_matrices=False)
    W = np.zeros((len(counts), len(L)))
    W[np.array(counts) > 0] = V * np.sqrt(L)
    return torch.tensor((U.T * np.sqrt(L)).copy()), torch.tensor(labels), torch.tensor(W)


@pytest.mark.parametrize("counts", CASES)
def test_measures_of_a_seli(counts):
    x, labels, W = build(counts)
    groups = {"some": [k for k in range(len(counts)) if k > 0], "one": [0]}
    report = measure(ClassMoments(len(counts), x.shape[1]).update(x, labels), W, groups=groups)
    for name, part in {None: report, **report.groups}.items():
        found = at_seli(counts, None if name is None else groups[name])
        assert len(found) == 4
        for key, value in found.items():
            if key.endswith("_weight") and not all(counts):
                continue  # a report measures the rows of absent classes too
            assert value == pytest.approx(getattr(part, key), abs=1e-7, nan_ok=True), (name, key)
    assert report.nc2_seli == pytest.approx(0, abs=1e-6)


def test_of_one_class_or_none():
    assert all(map(math.isnan, at_seli([5]).values()))
    assert all(map(math.isnan, at_seli([5, 3], []).values()))
    assert at_seli([3, 3, 3])["nc2_etf"] == at_seli([1, 9])["nc2_etf_weight"] == 0
