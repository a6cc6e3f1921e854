"""The papers' formulas against their transcription to NumPy, on the full batch."""

import math

import numpy as np
import pytest
import torch
from collapsed import crosses, etf, moments_of

from nc_probe import CONVENTIONS, Agreement, ClassMoments, measure
from nc_probe.measures.conventions import fang2021, papyan2020, rhubarbwu, zhu2021

# d and the samples of each class
SHAPES = [(9, [12] * 5), (9, [40, 40, 5, 5, 5]), (9, [30, 9, 4, 2, 1]), (4, [25] * 7), (4, [60, 20, 9, 5, 3, 2, 1])]
GROUPS = {"majority": torch.tensor([0, 1]), "minority": torch.tensor([2, 3, 4])}


def problem(d, counts):
    gen = torch.Generator().manual_seed(0)
    K, labels = len(counts), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x = 3 + torch.randn(K, d, generator=gen).double()[labels] + torch.randn(len(labels), d, generator=gen).double()
    return x, labels, torch.randn(K, d, generator=gen).double(), torch.randn(K, generator=gen).double()


def notebook_of_papyan(x, labels, W, b):
    """M (d, K) has the class means as columns."""
    K, N = len(W), len(x)
    M = np.stack([x[labels == k].mean(0) for k in range(K)], 1)
    Sw = sum(np.outer(xi - M[:, y], xi - M[:, y]) for xi, y in zip(x, labels, strict=True)) / N
    M_ = M - M.mean(1, keepdims=True)
    U, s, _ = np.linalg.svd(M_ @ M_.T / K)
    rank = min(K - 1, len(x[0]))
    inverse = U[:, :rank] @ np.diag(1 / s[:rank]) @ U[:, :rank].T
    M_norms, W_norms = np.linalg.norm(M_, axis=0), np.linalg.norm(W.T, axis=0)

    def coherence(V):
        G = V.T @ V + np.ones((K, K)) / (K - 1)
        return np.abs(G - np.diag(np.diag(G))).sum() / (K * (K - 1))

    match = [np.argmin(np.linalg.norm(xi[:, None] - M, axis=0)) == np.argmax(W @ xi + b) for xi in x]
    return {
        "nc1": np.trace(Sw @ inverse),
        "nc2_norm": M_norms.std(ddof=1) / M_norms.mean(),
        "nc2_norm_weight": W_norms.std(ddof=1) / W_norms.mean(),
        "nc2_angle": coherence(M_ / M_norms),
        "nc2_angle_weight": coherence(W.T / W_norms),
        "nc3": np.linalg.norm(W.T / np.linalg.norm(W) - M_ / np.linalg.norm(M_)) ** 2,
        "nc4": 1 - np.mean(match),
    }


def script_of_zhu(x, labels, W, b):
    K, mu_G = len(W), x.mean(0)
    mu = [x[labels == k].mean(0) for k in range(K)]
    Sigma_W = sum(np.outer(xi - mu[y], xi - mu[y]) for xi, y in zip(x, labels, strict=True)) / len(x)
    Sigma_B = sum(np.outer(m - mu_G, m - mu_G) for m in mu) / K
    simplex = (np.eye(K) - np.ones((K, K)) / K) / math.sqrt(K - 1)
    H = np.stack([m - mu_G for m in mu], 1)
    return {
        "nc1": np.trace(Sigma_W @ np.linalg.pinv(Sigma_B, rcond=1e-12)) / K,
        "nc2": np.linalg.norm(W @ W.T / np.linalg.norm(W @ W.T) - simplex),
        "nc3": np.linalg.norm(W @ H / np.linalg.norm(W @ H) - simplex),
        "nc3_bias": np.linalg.norm(W @ mu_G + b),
    }


def library_of_wu(x, labels, W):
    """Its accumulators and functions in turn: MeanAccumulator, CovarAccumulator, VarNormAccumulator, DecAccumulator."""
    K, N = len(W), len(x)
    M = np.stack([x[labels == k].mean(0) for k in range(K)])
    difference = x - M[labels]
    V_intra = difference.T @ difference / N
    V = np.array([(difference[labels == k] ** 2).sum() / (labels == k).sum() for k in range(K)])
    squares = (x**2).sum(1)[:, None] + (M**2).sum(1) - 2 * x @ M.T
    hits = (x @ W.T).argmax(1) == squares.argmin(1)

    def structure_error(A, B):
        struct = B @ A.T
        struct = struct / np.linalg.norm(struct) + 1 / K / math.sqrt(K - 1)
        return np.linalg.norm(struct - np.eye(K) / math.sqrt(K - 1))

    M_centred = M - M.mean(0)
    V_inter = M_centred.T @ M_centred / K
    unit = M_centred / np.linalg.norm(M_centred, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    dist = np.array([np.linalg.norm(unit[i] - unit[j]) for i, j in pairs])
    log = np.log(dist**-1)
    return {
        "covariance_ratio": np.trace(np.linalg.pinv(V_inter, rcond=1e-12) @ V_intra) / K,
        "variability_cdnv": np.mean([(V[i] + V[j]) / 2 / ((M[i] - M[j]) ** 2).sum() for i, j in pairs]),
        "simplex_etf_error": structure_error(M_centred, M_centred),
        "dist_kernel": dist.mean(),
        "dist_kernel_variance": ((dist - dist.mean()) ** 2).mean(),
        "log_kernel": log.mean(),
        "log_kernel_variance": ((log - log.mean()) ** 2).mean(),
        "self_duality_error": structure_error(M_centred, W),
        "similarities_variance": (W * M_centred).sum(1).var(ddof=1),
        "clf_ncc_agreement": hits.mean(),
    }


def agreement_of(x, labels, W, b):
    means = torch.stack([x[labels == k].mean(0) for k in range(len(W))])
    chosen, nearest = (x @ W.T + b).argmax(1), torch.cdist(x, means).argmin(1)
    hits = (chosen == labels, nearest == labels, chosen == nearest)
    return Agreement(*(torch.zeros(len(W)).long().index_add_(0, labels, h.long()) for h in hits), "counted")


@pytest.mark.parametrize("d, counts", SHAPES, ids=str)
def test_as_published(d, counts):
    x, labels, W, b = problem(d, counts)
    arrays = [t.numpy() for t in (x, labels, W, b)]
    moments, agreement = moments_of(x, labels, len(counts), batch=13), agreement_of(x, labels, W, b)
    assert papyan2020(moments, W, b, agreement) == pytest.approx(notebook_of_papyan(*arrays), rel=1e-9)
    assert zhu2021(moments, W, b, agreement) == pytest.approx(script_of_zhu(*arrays), rel=1e-9)
    without = script_of_zhu(*arrays[:3], np.zeros(len(counts)))
    assert zhu2021(moments, W) == pytest.approx(without, rel=1e-9)

    unbiased = agreement_of(x, labels, W, torch.full_like(b, 3.0))  # a bias of all alike changes no decision
    assert rhubarbwu(moments, W, torch.full_like(b, 3.0), unbiased) == pytest.approx(
        library_of_wu(*arrays[:3]), rel=1e-9
    )
    assert math.isnan(rhubarbwu(moments, W, b, agreement)["clf_ncc_agreement"])

    rows = arrays[2] / np.linalg.norm(arrays[2], axis=1, keepdims=True)
    norms = np.linalg.norm(arrays[2], axis=1)
    expected = {
        "cosine_majority": rows[0] @ rows[1],
        "cosine_minority": (rows[2] @ rows[3] + rows[2] @ rows[4] + rows[3] @ rows[4]) / 3,
        "norm_ratio": norms[:2].mean() / norms[2:5].mean(),
    }
    assert fang2021(moments, W, groups=GROUPS) == pytest.approx(expected, rel=1e-12)


def test_at_collapse():
    M = etf(6, 12)
    moments = moments_of(*crosses(M + 4, torch.eye(12, dtype=torch.float64), 1e-6), 6)
    mu_G = torch.full((12,), 4.0).double()
    published = papyan2020(moments, 2 * M) | {f"zhu_{k}": v for k, v in zhu2021(moments, 2 * M, -2 * M @ mu_G).items()}
    assert math.isnan(published.pop("nc4"))
    # (K-1)^2 s^2 / d, and K times less
    assert published.pop("nc1") == pytest.approx(25e-12 / 12, rel=1e-6)
    assert published.pop("zhu_nc1") == pytest.approx(25e-12 / 72, rel=1e-6)
    assert published == pytest.approx(dict.fromkeys(published, 0), abs=1e-9)


@pytest.mark.parametrize("paper", [papyan2020, zhu2021])
@pytest.mark.parametrize("offset", [0.1, 1e4])
def test_means_that_coincide_at_an_offset_are_no_directions(paper, offset):
    """Of classes at one place nothing is left but the rounding of their means, of which S_B^+ would be noise."""
    gen = torch.Generator().manual_seed(0)
    arms = torch.randn(7, 6, generator=gen).double()
    offset = offset * torch.rand(6, generator=gen).double()
    x = torch.cat([offset + arms, offset + arms[torch.randperm(7, generator=gen)]])
    labels = torch.arange(2).repeat_interleave(7)
    assert math.isnan(paper(moments_of(x, labels, 2, batch=3))["nc1"])
    # Two classes there and one elsewhere, at distance 5 along e: one direction, in which S_W is that of the arms.
    e = torch.full((6,), 6**-0.5, dtype=torch.float64)
    x, labels = torch.cat([x, x[:7] + 5 * e]), torch.arange(3).repeat_interleave(7)
    within = float(((arms - arms.mean(0)) @ e).square().mean())
    between = (2 * (5 / 3) ** 2 + (10 / 3) ** 2) / 3
    nc1 = paper(moments_of(x, labels, 3, batch=3))["nc1"]
    assert nc1 == pytest.approx(within / between / (3 if paper is zhu2021 else 1), rel=1e-9)


def test_kernels_of_directions_that_nearly_meet():
    """Two of four class means lie 1e-7 apart, of which cosines would know nothing."""
    M = etf(4, 9)
    M[3] = M[2] + 1e-7 * torch.eye(9, dtype=torch.float64)[0]
    M = M - M.mean(0)
    values = rhubarbwu(ClassMoments(4, 9).update(M, torch.arange(4)))
    u = M / M.norm(dim=1, keepdim=True)
    logs = torch.stack([-(u[i] - u[j]).norm().log() for i in range(4) for j in range(i)])
    assert values["log_kernel"] == pytest.approx(float(logs.mean()), rel=1e-8)
    assert values["log_kernel_variance"] == pytest.approx(float(logs.var(correction=0)), rel=1e-8)


def test_minority_collapse_and_norms():
    W = torch.cat([3 * etf(3, 8), torch.full((4, 8), 0.5).double()])
    groups = {"majority": torch.arange(3), "minority": torch.arange(3, 7)}
    values = fang2021(ClassMoments(7, 8), W, groups=groups)
    assert values == pytest.approx({"cosine_majority": -0.5, "cosine_minority": 1, "norm_ratio": 3 / math.sqrt(2)})
    assert fang2021(ClassMoments(7, 8), W, groups={"minority": groups["minority"]}) == pytest.approx(
        {"cosine_minority": 1}
    )


def test_weighting_that_pooled_moments_cannot_give_is_absent():
    x, labels, W, b = problem(9, [40, 40, 5, 5, 5])
    counts = torch.bincount(labels)
    pooled, full = ClassMoments(5, 9, class_counts=counts).update(x, labels), ClassMoments(5, 9).update(x, labels)
    for paper in (papyan2020, zhu2021, rhubarbwu):
        got, expected = paper(pooled, W, b), paper(full, W, b)
        nc1 = "covariance_ratio" if paper is rhubarbwu else "nc1"
        assert math.isnan(got.pop(nc1)) and expected.pop(nc1) > 0
        assert got == pytest.approx(expected, nan_ok=True)


def test_stored_in_the_report():
    x, labels, W, b = problem(9, [40, 40, 5, 5, 5])
    moments, agreement = ClassMoments(5, 9).update(x, labels), agreement_of(x, labels, W, b)
    groups = {"majority": [0, 1], "minority": [4, 2, 3]}
    report = measure(
        moments, W.float(), b.float(), groups=groups, agreement=agreement, conventions=["zhu2021", "fang2021"]
    )
    assert list(report.conventions) == ["zhu2021", "fang2021"]
    assert report.conventions["zhu2021"] == zhu2021(moments, W.float(), b.float(), agreement)
    assert report.conventions["fang2021"] == fang2021(moments, W.float(), groups=GROUPS)
    assert report.as_dict()["conventions"] == report.conventions
    assert "fang2021: cosine_majority" in str(report) and measure(moments, W).conventions == {}
    with pytest.raises(ValueError, match=r"conventions must be among \('papyan2020',.*got 'papyan2021'"):
        measure(moments, W, conventions=["papyan2021"])


@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 4, 0, 0], [1, 1, 1, 1], [2]])
@pytest.mark.parametrize("weight", [True, False])
def test_few_samples_are_no_exception(counts, weight):
    K = len(counts)
    labels = torch.arange(K).repeat_interleave(torch.tensor(counts))
    x = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
    moments, W = ClassMoments(K, 5).update(x, labels), torch.randn(K, 5) if weight else None
    groups = {"majority": torch.tensor([0]), "minority": torch.arange(1, K)}
    for name, paper in CONVENTIONS.items():
        values = paper(moments, W, None, None, groups)
        if not weight:
            assert name == "fang2021" or math.isnan(values["self_duality_error" if name == "rhubarbwu" else "nc3"])
        assert all(isinstance(v, float) for v in values.values())


def test_empty_classes_are_left_out():
    x, labels, W, b = problem(9, [9, 8, 7])
    spread = torch.tensor([0, 2, 3])
    moments = ClassMoments(4, 9).update(x, spread[labels])
    rows, bias = torch.randn(4, 9).double(), torch.randn(4).double()
    rows[spread], bias[spread] = W, b
    for paper in (papyan2020, zhu2021):
        got, expected = paper(moments, rows, bias), paper(moments_of(x, labels, 3), W, b)
        for name in ("nc1", "nc3"):
            assert got[name] == pytest.approx(expected[name], rel=1e-10)
    assert rhubarbwu(moments, rows) == pytest.approx(rhubarbwu(moments_of(x, labels, 3), W), rel=1e-10, nan_ok=True)
