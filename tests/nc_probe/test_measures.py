"""Each measure against an oracle written another way: closed forms, loops over pairs, 60-digit arithmetic."""

import itertools
import math

import mpmath as mp
import pytest
import torch
from collapsed import crosses, etf, frame, moments_of

from nc_probe import measure
from nc_probe.measures import formulas

mp.mp.dps = 60


def mp_nc1(x, labels, center="balanced"):
    """tr(S_W S_B^+)/K without eigenvalues: with D the differences of means to the last, S_B = D^T C D, and
    v^T S_B^+ v = u^T C^-1 u where u = (D D^T)^-1 D v."""
    K, d = int(labels.max()) + 1, x.shape[1]
    classes = [[mp.matrix(row) for row in x[labels == k].tolist()] for k in range(K)]
    N = sum(map(len, classes))
    pi = [mp.mpf(1) / K if center == "balanced" else mp.mpf(len(rows)) / N for rows in classes]
    mu = [sum(rows, mp.zeros(d, 1)) / len(rows) for rows in classes]
    D = mp.matrix([list((m - mu[-1]).T) for m in mu[:-1]])
    P = mp.matrix(K, K - 1)
    for k, j in itertools.product(range(K), range(K - 1)):
        P[k, j] = (k == j) - pi[j]
    project, C_inverse = mp.inverse(D * D.T) * D, mp.inverse(P.T * mp.diag(pi) * P)
    total = mp.mpf(0)
    for p, rows, m in zip(pi, classes, mu, strict=True):
        for row in rows:
            u = project * (row - m)
            total += p / len(rows) * (u.T * C_inverse * u)[0]
    return total / K


def relative(value, truth):
    return float(abs(mp.mpf(value) / truth - 1))


@pytest.mark.parametrize("merged", [1, 1e-3, 1e-6])
@pytest.mark.parametrize("noise", [1.0, 1e-4])
@pytest.mark.parametrize("center", ["balanced", "empirical"])
def test_nc1_against_sixty_digits(merged, noise, center):
    """Minority means (classes 3..5) within `merged` of each other; NC1 from 1e-8 to 1e12."""
    gen = torch.Generator().manual_seed(0)
    means = torch.randn(6, 8, generator=gen, dtype=torch.float64)
    means[3:] = means[3] + merged * torch.randn(3, 8, generator=gen, dtype=torch.float64)
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor([30, 30, 30, 4, 3, 1]))
    x = means[labels] + noise * torch.randn(len(labels), 8, generator=gen, dtype=torch.float64)
    x, labels = x.roll(17, 0), labels.roll(17)
    report = measure(moments_of(x, labels, 6, batch=10), None, center=center)
    assert report.nc1_rank == 5
    assert relative(report.nc1, mp_nc1(x, labels, center)) < 1e-15 * max(100, 10 * report.nc1_condition)


def test_nc1_of_collapsed_features_far_from_the_origin():
    """NC1 = 1e-7 with features about 1e4."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(20)
    x = 1e4 + etf(5, 8)[labels] + 1.4e-4 * torch.randn(100, 8, generator=gen, dtype=torch.float64)
    truth = mp_nc1(x, labels)
    assert 0.5e-7 < truth < 2e-7
    assert relative(measure(moments_of(x, labels, 5, batch=7), None).nc1, truth) < 1e-8


@pytest.mark.parametrize("K, d", [(10, 40), (10, 10), (30, 32)])
@pytest.mark.parametrize("scale, s", [(1.0, 0.3), (1e-3, 1e-8), (50.0, 1e-2)])
def test_nc1_of_noisy_etf_in_closed_form(K, d, scale, s):
    """S_B has K-1 eigenvalues scale^2/(K-1) and S_W = s^2/d I, so NC1 = (K-1)^2 s^2 / (K d scale^2)."""
    x, labels = crosses(scale * etf(K, d), torch.eye(d, dtype=torch.float64), s)
    report = measure(moments_of(x, labels, K, batch=999), None)
    # A sample scale + s is rounded by 1e-16 scale, which is that part of s.
    assert report.nc1 == pytest.approx((K - 1) ** 2 * s**2 / (K * d * scale**2), rel=1e-9 + 1e-14 * scale / s)
    assert report.nc1_rank == K - 1 and report.nc1_condition == pytest.approx(1, abs=1e-9)
    assert report.nc1_trace == pytest.approx(s**2 / scale**2, rel=1e-9 + 1e-14 * scale / s)
    # All pairs of means are at squared distance 2 scale^2 K/(K-1).
    assert report.cdnv == pytest.approx(s**2 * (K - 1) / (2 * scale**2 * K), rel=1e-9 + 1e-14 * scale / s)
    assert report.class_nc1 == pytest.approx([report.nc1] * K, rel=1e-6)


@pytest.mark.parametrize("merged", [1e-2, 1e-3, 1e-6])
def test_nc1_where_minority_means_merge_in_closed_form(merged):
    """K_A = 3 majority means at t u + ETF, K_B = 7 minority means at -t K_A/K_B u + merged * ETF, the three parts in
    orthogonal subspaces of 128 dimensions:
    S_B = (K_A/(K_A-1) P_A + t^2 K_A K/K_B u u^T + merged^2 K_B/(K_B-1) P_B) / K."""
    KA, KB, d, t, s = 3, 7, 128, 0.7, 0.2 * merged
    K = KA + KB
    Q = frame(d, KA + KB + 1)
    u = Q[:, -1]
    majority = t * u + etf(KA) @ Q[:, :KA].T
    minority = -t * KA / KB * u + merged * etf(KB) @ Q[:, KA:-1].T
    means = torch.cat([majority, minority])
    x, labels = crosses(means, Q, s)
    eigenvalues = [KA / (KA - 1)] * (KA - 1) + [t**2 * KA * K / KB] + [merged**2 * KB / (KB - 1)] * (KB - 1)
    truth = s**2 / Q.shape[1] * sum(K / value for value in eigenvalues) / K
    report = measure(moments_of(x, labels, K, class_counts=[1] * K), None)
    assert report.nc1_rank == K - 1
    assert report.nc1 == pytest.approx(truth, rel=1e-13 / merged)

    # What is usually computed: float32 and the pseudo-inverse of a d x d matrix.
    S_B, S_W = means.float().T @ means.float() / K, s**2 / Q.shape[1] * (Q @ Q.T).float()
    if merged <= 1e-3:
        usual = float(torch.trace(S_W @ torch.linalg.pinv(S_B, hermitian=True))) / K
        assert not 0.5 < usual / truth < 2, "the case is meant to be one that the usual formula gets wrong"


def test_nc1_with_fewer_features_than_classes():
    """d < K: S_B is invertible, so a plain inverse is the oracle."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(9).repeat(12)
    x = torch.randn(9, 4, generator=gen, dtype=torch.float64)[labels] + torch.randn(108, 4, generator=gen).double()
    mu = torch.stack([x[labels == k].mean(0) for k in range(9)])
    S_W = (x - mu[labels]).T @ (x - mu[labels]) / len(x)
    S_B = torch.cov(mu.T, correction=0)
    report = measure(moments_of(x, labels, 9), None)
    assert report.nc1 == pytest.approx(float(torch.trace(S_W @ S_B.inverse())) / 9, rel=1e-12)
    assert report.nc1_rank == 4


@pytest.mark.parametrize("offset", [0, 1e4])
def test_coinciding_means_are_dropped_and_the_rank_says_so(offset):
    """Classes 2 and 3 have equal means, but for the rounding of their sums: its reciprocal must not enter."""
    gen = torch.Generator().manual_seed(0)
    means, arms = torch.randn(4, 8, generator=gen).double(), torch.randn(4, 25, 8, generator=gen).double()
    means[3] = means[2]
    x = offset + torch.cat([means[:, None] + arms, means[:, None] - arms], 1).flatten(0, 1)
    labels = torch.arange(4).repeat_interleave(50)
    order = torch.randperm(200, generator=gen)
    report = measure(moments_of(x[order], labels[order], 4, batch=3), None)
    assert report.nc1_rank == 2 and report.nc1_condition < 100
    three = torch.linalg.pinv(torch.cov(means.T, correction=0), rtol=1e-10)
    within = torch.einsum("kni,knj->ij", arms, arms) / 100
    assert report.nc1 == pytest.approx(float(torch.trace(within @ three)) / 4, rel=1e-8)


def test_rank_is_bounded_by_what_the_centring_leaves():
    rows, weights = torch.eye(4, dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)
    assert formulas.between_inverse(rows, weights).rank == 4
    inverse = formulas.between_inverse(rows, weights, max_rank=3)
    assert inverse.rank == 3 and inverse.basis.shape == (4, 3)
    # S_B = I/4 on what is kept
    assert formulas.nc1(inverse, torch.eye(4, dtype=torch.float64), 4) == pytest.approx(3)


def test_perfect_collapse():
    """Means an ETF, W the same ETF times 3: every measure at its ideal, at any offset of the features."""
    M = etf(10, 32)
    report = measure(moments_of(M + 5, torch.arange(10), 10), 3 * M, groups={"part": [1, 4, 6]})
    for part in (report, report.groups["part"]):
        names = ["nc1", "nc1_trace", "cdnv", "gnc2_log", "gnc2_riesz", "nc3"]
        names += [f"nc2_{what}{of}" for what in ("etf", "seli", "norm", "angle", "maxangle") for of in ("", "_weight")]
        for name in names:
            assert getattr(part, name) == pytest.approx(0, abs=1e-9), name
        assert part.mean_cosine == pytest.approx(-1 / 9) and part.nc3_cosine == pytest.approx(1)
        assert part.mean_norm == pytest.approx(1) and part.mean_norm_weight == pytest.approx(3)
    assert report.feature_rank == 9
    assert report.stable_rank == pytest.approx(9) and report.participation_ratio == pytest.approx(9)


def test_wide_and_tall_means_have_the_inverse_of_their_covariance():
    """The factorisation starts from the longer side; S_B^+ is the same matrix."""
    gen = torch.Generator().manual_seed(0)
    for K, d in ((4, 9), (9, 4), (6, 6), (1, 3), (3, 1)):
        rows, pi = torch.randn(K, d, generator=gen).double(), torch.rand(K, generator=gen).double()
        inverse = formulas.between_inverse(rows, pi)
        S_B = sum(p * torch.outer(row, row) for p, row in zip(pi, rows, strict=True))
        expected = torch.linalg.pinv(S_B, rtol=1e-12)
        assert inverse.rank == min(K, d) and inverse.basis.shape == (d, min(K, d))
        torch.testing.assert_close(inverse.basis @ inverse.basis.T, expected, rtol=1e-9, atol=1e-9)


def test_self_duality():
    gen = torch.Generator().manual_seed(0)
    W, M = torch.randn(5, 3, generator=gen).double(), torch.randn(5, 3, generator=gen).double()
    # ||a - b||^2 = 2 - 2 a.b for unit vectors.
    expected = math.sqrt(2 - 2 * float((W * M).sum() / (W.square().sum() * M.square().sum()).sqrt()))
    assert formulas.self_duality(W, M) == pytest.approx(expected)
    assert formulas.self_duality(2 * M, M) == pytest.approx(0, abs=1e-15)
    assert formulas.self_duality(-M, M) == pytest.approx(2)
    expected = [float(w @ m / w.norm() / m.norm()) for w, m in zip(W, M, strict=True)]
    assert formulas.self_duality_cosines(W, M).tolist() == pytest.approx(expected)


def test_undefined_is_nan():
    one, zero = torch.ones(1, 3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    values = [formulas.equinorm(one), formulas.equinorm(one[:0]), formulas.self_duality(one[:0], one[:0])]
    values += [formulas.mean_norm(one[:0]), formulas.trace_quotient(one.sum(), 0 * one.sum())]
    inverse = formulas.between_inverse(zero, torch.full((3,), 1 / 3).double())
    values += [inverse.condition, formulas.nc1(inverse, torch.eye(4).double(), 3)]
    ranks = formulas.spectrum(torch.zeros(4, 4).double(), torch.ones(4).double())
    values += [ranks.stable_rank, ranks.participation_ratio]
    assert all(map(math.isnan, values)) and inverse.rank == ranks.rank == 0


def test_spectrum_of_known_eigenvalues():
    Q = frame(6, 6)
    total = (Q * torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)) @ Q.T
    ranks = formulas.spectrum(total, torch.zeros(6, dtype=torch.float64))
    assert ranks.rank == 4
    assert ranks.stable_rank == pytest.approx(2) and ranks.participation_ratio == pytest.approx(64 / 22)


@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rank_of_rounded_features(dtype, offset):
    """Features of rank 5 in 24 dimensions: rounded, they have rank 24 to the letter, yet 5 is what they hold."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(500, 5, generator=gen, dtype=torch.float64) @ torch.randn(5, 24, generator=gen).double() + offset
    x, labels = x.to(dtype), torch.arange(500) % 4
    moments = moments_of(x, labels, 4)
    assert measure(moments, None, features_dtype=dtype).feature_rank == 5
    if dtype in (torch.bfloat16, torch.float16):
        assert measure(moments, None, features_dtype=torch.float64).feature_rank == 24
