"""The peer's method and ours measure the same, and the truth where means merge is the truth."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch

from recipes.benchmarks import merged as benchmark_merged
from recipes.benchmarks import probe as benchmark_probe


@pytest.fixture(scope="module")
def problem():
    x, labels, head = benchmark_probe.gaussian_classes(600, 20, 6)
    return x, labels, head, list(zip(x.split(70), labels.split(70), strict=True))


def test_the_peer_and_the_probe_agree_in_float64(problem):
    x, labels, head, batches = problem
    with torch.no_grad():
        report = benchmark_probe.ours(batches, head, spectrum=False)
    peer = benchmark_probe.peer(batches, head.weight, torch.float64)
    etf = math.log(math.sqrt(2 * 6 / 5))  # the log kernel of a simplex ETF of 6 is minus this
    pairs = {
        "nc1": report.nc1,
        "cdnv": report.cdnv,
        "etf": report.nc2_etf,
        "alignment": report.conventions["zhu2021"]["nc3"],
        "log_kernel": report.gnc2_log - etf,
        "agreement": report.nc4,
    }
    for name, value in pairs.items():
        assert value == pytest.approx(peer[name], rel=1e-9), name
    assert 0 < peer["agreement"] < 1
    assert report.nc1 == pytest.approx(benchmark_probe.full_batch_nc1(x, labels), rel=1e-12)
    assert report.feature_rank is None


def test_the_peer_by_hand(problem):
    """Loops in NumPy; class 0 has fewer samples than the others."""
    x, labels, head, _ = problem
    keep = (labels > 0) | (torch.arange(600) < 200)
    x, labels = x[keep], labels[keep]
    batches = list(zip(x.split(70), labels.split(70), strict=True))
    found = benchmark_probe.peer(batches, head.weight, torch.float64)
    x, labels, W = x.double().numpy(), labels.numpy(), head.weight.detach().double().numpy()
    mu = np.array([x[labels == k].mean(0) for k in range(6)])
    variance = [np.square(x[labels == k] - mu[k]).sum(1).mean() for k in range(6)]
    M = mu - mu.mean(0)
    off = [(i, j) for i in range(6) for j in range(6) if i != j]
    S_B = sum(np.outer(m, m) for m in M) / 6
    S_W = sum(np.outer(v, v) for v in x - mu[labels]) / len(x)
    assert found["nc1"] == pytest.approx(np.trace(np.linalg.pinv(S_B, rcond=1e-12) @ S_W) / 6)
    cdnv = [(variance[i] + variance[j]) / (2 * np.square(mu[i] - mu[j]).sum()) for i, j in off]
    assert found["cdnv"] == pytest.approx(np.mean(cdnv))
    frame = np.eye(6) - 1 / 6
    for name, rows in (("etf", M), ("alignment", W)):
        G = rows @ M.T
        expected = np.linalg.norm(G / np.linalg.norm(G) - frame / np.linalg.norm(frame))
        assert found[name] == pytest.approx(expected), name
    logs = [-math.log(math.dist(M[i] / math.hypot(*M[i]), M[j] / math.hypot(*M[j]))) for i, j in off]
    assert (found["log_kernel"], found["log_kernel_variance"]) == pytest.approx((np.mean(logs), np.var(logs)))
    same = np.array([np.argmax(W @ v) == np.argmin([math.dist(v, m) for m in mu]) for v in x])
    assert found["agreement"] == pytest.approx(np.mean([same[labels == k].mean() for k in range(6)]))


def test_ranks_only_where_they_are_asked_for(problem):
    *_, head, batches = problem
    with torch.no_grad():
        assert benchmark_probe.ours(batches, head, spectrum=True).feature_rank == 20


def test_many_classes_have_a_peer_where_every_class_has_samples(monkeypatch):
    monkeypatch.setattr(benchmark_probe, "MANY", ((60, 8, 4), (20, 8, 30)))
    few, many = benchmark_probe.many_classes(torch.device("cpu"), 1)
    assert list(few) == list(many) and (few["K"], many["K"]) == (4, 30)
    assert 0 < few["ms, head alone"] < few["ms, ours"] and few["ratio"] == few["ms, ours"] / few["ms, peer"]
    assert many["ms, peer"] is many["ratio"] is None


@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_the_closed_form_against_forty_digits(distance):
    """tr(S_W S_B^+) from the samples themselves, inverting the Gram matrix of differences of means."""
    x, labels = benchmark_merged.samples(distance)
    mp.mp.dps = 40
    mu = [x[labels == k].mean(0) for k in range(10)]
    D = torch.stack([m - mu[-1] for m in mu[:-1]])
    gram = mp.matrix(9, 9)
    for i in range(9):
        for j in range(9):
            gram[i, j] = mp.fsum(a * b for a, b in zip(D[i].tolist(), D[j].tolist(), strict=True))
    inverse = mp.inverse(gram)
    inverse = torch.tensor([[float(inverse[i, j]) for j in range(9)] for i in range(9)], dtype=torch.float64)
    # S_B = D^T C D with C = (I - 1 1^T/10)/10, whose inverse is 10 (I + 1 1^T).
    u = (x - torch.stack(mu)[labels]) @ D.T @ inverse
    total = 10 * (u.square().sum(1) + u.sum(1).square()).mean()
    assert float(total) / 10 == pytest.approx(benchmark_merged.closed_form(distance), rel=1e-6)


def test_merged_minorities():
    """Ours follows the truth, NC1 ~ distance^-2; pseudo-inverses drop the minority, which leaves the majority alone."""
    rows = {row["distance"]: row for row in benchmark_merged.merged_minorities([1.0, 1e-3, 1e-8])}
    assert list(rows) == ["1", "0.001", "1e-08"]
    assert rows["1e-08"]["NC1"] / rows["0.001"]["NC1"] == pytest.approx(1e10, rel=1e-4)
    usual = ["pinv, float32", "K - 1 largest, float32", "pinv, float64", "K - 1 largest, float64"]
    assert list(rows["1"]) == ["distance", "NC1", "this tool", "this tool, features in float32", *usual]
    assert all(row["this tool"] < 1e-7 for row in rows.values())
    assert all(rows["1"][name] < 1e-5 for name in usual)
    assert 1e-10 < rows["0.001"]["this tool, features in float32"] < 1e-2  # their own rounding
    assert rows["0.001"]["pinv, float32"] > 0.999 and rows["0.001"]["pinv, float64"] < 1e-9
    assert rows["1e-08"]["pinv, float64"] > 0.999


def test_the_figure_draws_the_table():
    (axes,) = benchmark_merged.merged_figure([1.0, 1e-2, 1e-4]).axes
    drawn = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert set(drawn) == set(benchmark_merged.COLORS)
    truth = [(e, benchmark_merged.closed_form(e)) for e in (1.0, 1e-2, 1e-4)]
    np.testing.assert_allclose(drawn["truth"], truth)
    np.testing.assert_allclose(drawn["this tool"], truth, rtol=1e-9)
    # Of the majority alone: its two directions and the one between the groups.
    alone = benchmark_merged.SPREAD**2 / 11 * (4 / 3 + 7 / (0.49 * 30))
    assert drawn["pinv, float32"][2, 1] == pytest.approx(alone, rel=1e-3)
    assert axes.get_xscale() == axes.get_yscale() == "log" and axes.xaxis_inverted()
