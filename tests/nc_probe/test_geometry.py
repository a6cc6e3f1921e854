"""Reference Gram matrices against dense decompositions of the label matrices that define them."""

import math

import pytest
import torch

from nc_probe import ClassMoments, ReferenceGram, measure, orthogonal_frame, seli, simplex_etf
from nc_probe.measures.geometry import simplex_etf_cosine

COUNTS = [
    [7, 7, 7, 7],
    [100, 100, 100, 10, 10, 10, 10],
    [500, 1],
    [5000, 796, 126, 20, 3],
    [9, 3, 9, 1, 3, 3, 1, 9],
    [4, 0, 2, 0, 0, 4, 1],
    [12],
]


@pytest.mark.parametrize("K", [2, 3, 10, 100])
def test_simplex_is_centred_unit_vectors(K):
    corners = torch.eye(K, dtype=torch.float64) - 1 / K
    corners /= corners.norm(dim=1, keepdim=True)
    torch.testing.assert_close(simplex_etf(K).rows(), corners @ corners.T, rtol=0, atol=1e-14)
    assert torch.equal(simplex_etf(K, size=2).rows(), simplex_etf(K).rows()[:2, :2])
    assert simplex_etf_cosine(K) == pytest.approx(float(corners[0] @ corners[1]), abs=1e-14)


def one_hot(counts):
    """(classes with samples, N) labels, and the samples of each of these classes."""
    n = torch.tensor([c for c in counts if c])
    return torch.repeat_interleave(torch.eye(len(n), dtype=torch.float64), n, dim=1), n.double()


def interpolation(Z, n, Y):
    """W W^T, and M M^T of the class means of H, where W H^T = Z = V L U^T is split evenly."""
    V, L, Ut = torch.linalg.svd(Z, full_matrices=False)
    keep = L > 1e-9 * L[0]
    V, L, Ut = V[:, keep], L[keep], Ut[keep]
    means = (Y / n[:, None]) @ (Ut.T * L.sqrt())
    return (V * L) @ V.T, means @ means.T


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_seli_is_the_decomposition_of_all_simplex_encoded_labels(counts):
    Y, n = one_hot(counts)
    Z = Y - 1 / len(n)
    for got, expected in zip(seli(counts), interpolation(Z, n, Y), strict=True):
        torch.testing.assert_close(got.rows(), expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))
        assert len(got) == len(n)
        assert got.norm() == pytest.approx(float(expected.norm()), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_orthogonal_frame_is_the_decomposition_of_all_one_hot_labels(counts):
    Y, n = one_hot(counts)
    for got, expected in zip(orthogonal_frame(counts), interpolation(Y, n, Y), strict=True):
        torch.testing.assert_close(got.rows(), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
        assert got.norm() == pytest.approx(float(expected.norm()), rel=1e-12)


def test_balanced_seli_is_the_simplex():
    for gram in seli(torch.full((6,), 50)):
        torch.testing.assert_close(gram.rows() / gram.norm(), simplex_etf(6).rows() / simplex_etf(6).norm())


def test_squared_error_with_vanishing_decay_finds_the_orthogonal_frame():
    """W, H trained from random numbers: ||W H^T - Y||^2 / 2 + decay (||W||^2 + ||H||^2) / 2."""
    gen, counts, decay = torch.Generator().manual_seed(0), [6, 3, 1], 1e-3
    Y, n = one_hot(counts)
    factors = [torch.randn(rows, 4, generator=gen, dtype=torch.float64).requires_grad_() for rows in (3, 10)]
    optimizer = torch.optim.LBFGS(factors, max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        W, H = factors
        value = (W @ H.T - Y).square().sum() / 2 + decay / 2 * (W.square().sum() + H.square().sum())
        value.backward()
        return value

    optimizer.step(loss)
    W, H = (f.detach() for f in factors)
    means = Y @ H / n[:, None]
    # Its singular values are those of Y less the decay.
    for got, reference in zip((W, means), orthogonal_frame(counts), strict=True):
        torch.testing.assert_close(got @ got.T, reference.rows(), rtol=0, atol=3 * decay)


@pytest.mark.parametrize("decay", [0.02, 0.12])
def test_squared_error_at_finite_decay_shrinks_the_orthogonal_frame(decay):
    """||W H^T - Y||^2 / (2N) + decay_W ||W||^2 / 2 + decay_H ||H||^2 / 2, N times, trained. At 0.12 the rarest class is
    not learned: 1 < 10 * 0.12."""
    gen, counts, ratio = torch.Generator().manual_seed(0), [6, 3, 1], 4.0
    Y, n = one_hot(counts)
    factors = [torch.randn(rows, 4, generator=gen, dtype=torch.float64).requires_grad_() for rows in (3, 10)]
    optimizer = torch.optim.LBFGS(factors, max_iter=400, tolerance_grad=1e-11, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        W, H = factors
        penalty = decay * (ratio * W.square().sum() + H.square().sum() / ratio)
        value = (W @ H.T - Y).square().sum() / 2 + len(H) * penalty / 2
        value.backward()
        return value

    optimizer.step(loss)
    W, H = (f.detach() for f in factors)
    for got, reference in zip((W, Y @ H / n[:, None]), orthogonal_frame(counts, weight_decay=decay), strict=True):
        scale = ratio if got is W else 1 / ratio
        torch.testing.assert_close(scale * got @ got.T, reference.rows(), rtol=0, atol=1e-4)


def test_weight_decay_of_a_report():
    """Five classes of 5000 and five of 50 at decay 5e-4: N decay = 12.6 > sqrt 50, so these are zero."""
    counts = torch.tensor([5000] * 5 + [50] * 5)
    means = torch.diag(torch.cat([torch.ones(5), torch.zeros(5)])).double()
    moments = ClassMoments(10, 10, scatter=False).update(
        means.repeat_interleave(counts, 0), torch.arange(10).repeat_interleave(counts)
    )
    at_the_limit, finite = measure(moments, None), measure(moments, None, weight_decay=5e-4, groups={"rare": [8, 9]})
    # cos = sum_A n^-1/2 / (sqrt 5 ||n^-1/2||) of the two diagonals
    cosine = 5 * 5000**-0.5 / math.sqrt(5 * (5 / 5000 + 5 / 50))
    assert at_the_limit.nc2_gof == pytest.approx(math.sqrt(2 - 2 * cosine), rel=1e-12) == pytest.approx(1.342, abs=1e-3)
    assert finite.nc2_gof == pytest.approx(0, abs=1e-12) and finite.weight_decay == 5e-4
    assert math.isnan(finite.groups["rare"].nc2_gof), "there is no geometry of vectors that are all zero"


def test_rows_parts_and_norms_of_any_matrix_of_kinds():
    gen = torch.Generator().manual_seed(0)
    kind, diagonal = torch.tensor([2, 0, 1, 0, 2, 2, 1]), torch.rand(3, generator=gen).double()
    block = torch.randn(3, 3, generator=gen).double()
    block = block + block.T
    dense = torch.zeros(7, 7).double()
    for i in range(7):
        for j in range(7):
            dense[i, j] = block[kind[i], kind[j]] + (diagonal[kind[i]] if i == j else 0)
    gram = ReferenceGram(kind, diagonal, block)
    assert torch.equal(gram.rows(), dense) and len(gram) == 7
    assert torch.equal(gram.rows(2, 5), dense[2:5]) and torch.equal(gram.rows(6, 9), dense[6:])
    assert gram.norm() == pytest.approx(float(dense.norm()), rel=1e-14)
    part = gram.subset([5, 1, 2])
    assert torch.equal(part.rows(), dense[[5, 1, 2]][:, [5, 1, 2]])
    assert part.norm() == pytest.approx(float(part.rows().norm()), rel=1e-14)
    assert gram.subset([]).rows().shape == (0, 0) and gram.subset([]).norm() == 0
    A, B = torch.randn(7, 4, generator=gen).double(), torch.randn(7, 4, generator=gen).double()
    assert gram.inner(A, B) == pytest.approx(float((dense * (A @ B.T)).sum()), rel=1e-12)
    assert torch.equal(gram.to("cpu").rows(), dense)


def test_at_the_scale_of_imagenet21k():
    """21841 classes of 50 to 1400 samples: never a K x K matrix, and the first rows are those of their definition."""
    counts = torch.randint(50, 1400, (21841,), generator=torch.Generator().manual_seed(0))
    counts = counts // 50 * 50  # 27 distinct
    classifier, means = seli(counts)
    assert classifier.block.shape == (27, 27)
    # G_W is a root of C N C: with r a row of it, r G_W^T = C n_k e_k ... of which the trace is sum_k n_k (1 - 1/K)
    n = counts.double()
    assert classifier.norm() == pytest.approx(math.sqrt(float(n.sum()) * (1 - 1 / len(n))), rel=1e-12)
    # and G_M its inverse: G_W G_M = C
    row, column = classifier.rows(3, 4)[0], means.rows(3, 4)[0]
    assert float(row @ column) == pytest.approx(1 - 1 / len(n), rel=1e-10)
    assert float(row.sum()) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: simplex_etf(1), "num_classes must be at least 2, got 1"),
        (lambda: simplex_etf(3, size=4), "size must be in 0..3, got 4"),
        (lambda: seli([3, -1]), "counts must be numbers >= 0 that are not all 0, got "),
        (lambda: seli([0, 0]), "counts must be numbers >= 0 that are not all 0, got "),
        (lambda: orthogonal_frame([1], weight_decay=-1e-9), "weight_decay must be a finite number >= 0, got -1e-09"),
        (lambda: orthogonal_frame([1], weight_decay=math.inf), "weight_decay must be a finite number >= 0, got inf"),
        (lambda: orthogonal_frame([1], weight_decay=math.nan), "weight_decay must be a finite number >= 0, got nan"),
        (lambda: orthogonal_frame([1], weight_decay="1"), "weight_decay must be a finite number >= 0, got '1'"),
        (lambda: orthogonal_frame([]), "counts must be numbers >= 0 that are not all 0, got "),
        (lambda: orthogonal_frame([[1, 2]]), "counts must be numbers >= 0 that are not all 0, got "),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
