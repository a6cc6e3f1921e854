"""Paired statistics against SciPy on known samples, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from recipes.results.statistics import first_at_loss, paired_difference, sign_flip_p, student


def by_seed(values):
    return dict(enumerate(values))


@pytest.mark.parametrize("n", [2, 6, 12])
def test_against_scipy(n):
    rng = np.random.default_rng(n)
    first, second = rng.normal(0.5, 1, n), rng.normal(0, 1, n)
    found = paired_difference(by_seed(first), by_seed(second))
    t = stats.ttest_rel(first, second)
    assert (found.n, found.mean) == (n, pytest.approx(np.mean(first - second)))
    assert (found.low, found.high) == pytest.approx(tuple(t.confidence_interval(0.95)))
    assert found.t_p == pytest.approx(t.pvalue)

    def statistic(x, y, axis):
        return np.mean(x - y, axis=axis)

    exact = stats.permutation_test((first, second), statistic, permutation_type="samples", n_resamples=np.inf)
    assert found.sign_flip_p == pytest.approx(exact.pvalue)


def test_sign_flips_have_a_least_p_and_count_ties():
    assert sign_flip_p(np.ones(5)) == 2 / 2**5
    assert sign_flip_p(np.array([0.1, 0.2, -0.3])) == 1
    assert sign_flip_p(np.array([3, -3, 1, 2]) / 10) == 0.75  # as of whole numbers, though 0.1 + 0.2 is not 0.3
    assert sign_flip_p(np.zeros(3)) == 1


def test_many_seeds_are_sampled():
    differences = np.random.default_rng(0).normal(0.4, 1, 24)
    drawn = sign_flip_p(differences)
    t_p = paired_difference(by_seed(differences), by_seed(np.zeros(24))).t_p
    assert drawn == pytest.approx(t_p, abs=0.01) and drawn == sign_flip_p(differences)
    assert 0 < sign_flip_p(np.ones(40)) < 1e-4


def draw(shape, rng, size):
    """Differences whose mean is 0: of two accuracies in counts of 360 images, of two exponentials, and so on."""
    if shape == "accuracy":
        return (rng.binomial(360, 0.7, size) - rng.binomial(360, 0.7, size)) / 360
    if shape == "skewed":
        return rng.exponential(1, size) - rng.exponential(1, size)
    return {
        "normal": rng.standard_normal,
        "uniform": lambda s: rng.uniform(-1, 1, s),
        "t5": lambda s: rng.standard_t(5, s),
    }[shape](size)


@pytest.mark.parametrize("n", [6, 16])
@pytest.mark.parametrize("shape", ["normal", "uniform", "t5", "accuracy", "skewed"])
def test_interval_covers(shape, n):
    intervals = np.array([student(sample)[:2] for sample in draw(shape, np.random.default_rng(n), (4000, n))])
    covered = np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
    assert 0.93 <= covered <= 0.97


def test_a_percentile_bootstrap_does_not_cover():
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((2000, 6))
    means = np.take_along_axis(samples[:, None], rng.integers(0, 6, (2000, 1000, 6)), axis=2).mean(2)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.90


def test_what_is_missing_is_left_out():
    first, second = {0: 1.0, 1: 2.0, 2: math.nan, 3: 5.0}, {1: 1.0, 0: 0.5, 2: 1.0, 4: 9.0}
    found = paired_difference(first, second)
    assert (found.n, found.mean) == (2, 0.75)
    assert paired_difference({0: 1.0}, {1: 1.0}).n == 0
    alone = paired_difference({3: 2.0}, {3: 0.5})
    assert (alone.n, alone.mean, alone.sign_flip_p) == (1, 1.5, 1)
    assert math.isnan(alone.low) and math.isnan(alone.t_p)
    constant = paired_difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0})
    assert constant.mean == 1 and math.isnan(constant.high) and constant.sign_flip_p == 0.5


def test_first_probe_at_a_loss():
    records = [
        {"epoch": 0, "train_loss": None, "collapse": {"nc1": 4}},
        {"epoch": 1, "train_loss": 0.9, "collapse": {"nc1": 3}},
        {"epoch": 2, "train_loss": 0.4},
        {"epoch": 3, "train_loss": 0.5, "collapse": {"nc1": 2}},
        {"epoch": 4, "train_loss": 0.2, "collapse": {"nc1": 1}},
    ]
    assert [(first_at_loss(records, loss) or {}).get("epoch") for loss in (1, 0.5, 0.45, 0.1)] == [1, 3, 4, None]
