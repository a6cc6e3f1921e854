"""Paired statistics over seeds: whether two ways of training differ beyond the noise of a seed.

Runs of the same seed share split, weights and order of images, so differences are taken seed by seed, d_1 .. d_n. The
interval is Student's for their mean, mean +- t s / sqrt(n) with n - 1 degrees of freedom. It covers 93 to 97 % from 6
seeds on where differences are symmetric about their mean, as those of two like quantities are, whatever the tails; a
percentile bootstrap covers 87 % at n = 6 (tests/recipes/test_statistics.py simulates both).

The sign-flip test asks how many of the 2^n ways to exchange the two within seeds have a mean as far from 0. It assumes
symmetry alone, and its p is never below 2 / 2^n: 5 seeds cannot show anything at the 5 % level.

Sources: Student, "The probable error of a mean", Biometrika 1908; Fisher, "The Design of Experiments", 1935, section
21.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Above, 2^n signs are drawn at random.
MOST_EXACT = 20


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two quantities, over the seeds that have both.

    Attributes:
        n: seeds.
        mean: of the differences, first minus second; NaN without any.
        low, high: 95 % confidence interval of the mean; NaN of fewer than two seeds, or of differences that are all
        equal. t_p: two-sided p of the paired t test; NaN where there is no interval. sign_flip_p: two-sided p of the
        sign-flip test; NaN without seeds.
    """

    n: int
    mean: float
    low: float
    high: float
    t_p: float
    sign_flip_p: float


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference:
    """Compare two quantities seed by seed.

    Args:
        first: the quantity by seed. Values that are not finite, and seeds that the other lacks, are left out.
        second: the one to subtract.
    """
    pairs = [(first[seed], second[seed]) for seed in first if seed in second]
    differences = np.array([a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)], dtype=float)
    n = len(differences)
    if n == 0:
        return PairedDifference(0, *[math.nan] * 5)
    return PairedDifference(n, float(differences.mean()), *student(differences), sign_flip_p(differences))


def student(differences: np.ndarray) -> tuple[float, float, float]:
    """Ends of Student's 95 % interval for the mean of differences (n,), and the two-sided p of the t test; or NaN."""
    from scipy.stats import t  # takes a second to import

    n, mean = len(differences), differences.mean()
    error = differences.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    if error == 0:
        return math.nan, math.nan, math.nan
    half = t.ppf(0.975, n - 1) * error
    return float(mean - half), float(mean + half), float(2 * t.sf(abs(mean) / error, n - 1))


def interval_of(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean of a normal distribution: t s / sqrt(n), where t is the 97.5 %
    quantile of Student's distribution with n - 1 degrees of freedom, for n values of standard deviation s, 2 or more.

    Source: Student, "The probable error of a mean", Biometrika 1908.
    """
    from scipy.stats import t  # takes a second to import

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p of the sign-flip test: of all 2^n choices of signs, the share whose sum is as far from 0.

    Args:
        differences: (n,). Of more than MOST_EXACT, 2^16 choices are drawn, the same each time.
    """
    n = len(differences)
    if n > MOST_EXACT:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(2**16, n))
        sums = np.append(signs @ differences, differences.sum())  # the choice that was observed counts
    else:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-12 * np.abs(differences).sum()
    return float(np.mean(np.abs(sums) >= abs(differences.sum()) - rounding))


def first_at_loss(records: Sequence[Mapping[str, Any]], loss: float) -> Mapping[str, Any] | None:
    """The first record with a measurement of collapse whose mean training loss of the epoch is at most `loss`, or None.

    Args:
        records: lines of metrics.jsonl.
        loss: in nats for cross-entropy.
    """
    probed = (record for record in records if record.get("collapse") and record["train_loss"] is not None)
    return next((record for record in probed if record["train_loss"] <= loss), None)
