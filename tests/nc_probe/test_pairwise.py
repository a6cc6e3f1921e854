"""Measures of pairs of classes against loops, closed forms and exact arithmetic; tiles of any size."""

import itertools
import math
from fractions import Fraction

import mpmath as mp
import pytest
import torch
from collapsed import etf, frame, moments_of, vectors_of

from nc_probe import measure, orthogonal_frame, seli, simplex_etf
from nc_probe.measures import formulas, pairwise

mp.mp.dps = 60

COUNTS = [[20] * 6, [60, 60, 60, 6, 6, 6], [100, 40, 16, 6, 3, 1], [50, 1, 1]]


@pytest.fixture(params=[2, 1024])
def tile(request, monkeypatch):
    monkeypatch.setattr(pairwise, "TILE", request.param)
    monkeypatch.setattr(pairwise, "PAIRS", 8)


def pairs_of(rows):
    unit = torch.nn.functional.normalize(rows, dim=1)
    return [float(unit[i] @ unit[j]) for i, j in itertools.combinations(range(len(rows)), 2)]


def dense_distance(G, E):
    return float((G / torch.linalg.matrix_norm(G) - E / torch.linalg.matrix_norm(E)).square().sum().sqrt())


def test_against_loops(tile):
    gen = torch.Generator().manual_seed(0)
    rows, variances = torch.randn(7, 4, generator=gen).double(), torch.rand(7, generator=gen).double()
    cosines = torch.tensor(pairs_of(rows), dtype=torch.float64)
    angle, maxangle = pairwise.equiangle(rows)
    assert angle == pytest.approx(float(cosines.std(correction=0)))
    assert maxangle == pytest.approx(float((cosines + 1 / 6).abs().mean()))
    assert pairwise.equiangle(rows, num_classes=11)[1] == pytest.approx(float((cosines + 1 / 10).abs().mean()))
    assert pairwise.mean_cosine(rows) == pytest.approx(float(cosines.mean()))
    norms = torch.tensor([math.sqrt(sum(v * v for v in row)) for row in rows.tolist()], dtype=torch.float64)
    assert formulas.equinorm(rows) == pytest.approx(float(((norms - norms.mean()) ** 2).mean().sqrt() / norms.mean()))
    assert formulas.mean_norm(rows) == pytest.approx(float(norms.mean()))
    gaps = (2 - 2 * cosines).sqrt()
    for K in (7, 11):
        delta = math.sqrt(2 * K / (K - 1))
        log_gap, riesz_gap = pairwise.uniformity_gap(rows, num_classes=K)
        assert log_gap == pytest.approx(float((delta / gaps).log().mean()))
        assert riesz_gap == pytest.approx(math.log(delta * math.sqrt(float((gaps**-2).mean()))))
    total = 0.0
    for i, j in itertools.permutations(range(7), 2):
        total += float((variances[i] + variances[j]) / (2 * sum((rows[i] - rows[j]) ** 2)))
    assert pairwise.cdnv(rows, variances) == pytest.approx(total / 42)
    both = pairwise.compare_means(rows, variances, num_classes=11)
    apart = [pairwise.cdnv(rows, variances), *pairwise.equiangle(rows, num_classes=11)]
    assert both == pytest.approx([*apart, *pairwise.uniformity_gap(rows, num_classes=11)], rel=1e-12)
    assert pairwise.cosine_gram(rows)[torch.triu_indices(7, 7, 1).unbind()].tolist() == pytest.approx(cosines.tolist())


@pytest.mark.parametrize("d", [4, 9])
@pytest.mark.parametrize("noise", [1, 1e-2, 1e-7])
def test_distance_to_any_geometry_near_and_far(tile, d, noise):
    """Expanded where it is large, entry by entry where it is small: the same number on both sides of the change."""
    gen = torch.Generator().manual_seed(0)
    references = [simplex_etf(5), *seli([9, 9, 4, 1, 1]), *orthogonal_frame([9, 9, 4, 1, 1])]
    for reference in [*references, seli([9, 9, 4, 1, 1, 7, 7])[0].subset([6, 0, 2, 3, 5])]:
        rows = vectors_of(reference.rows(), 9)[:, :d] + noise * torch.randn(5, d, generator=gen).double()
        other = torch.randn(5, d, generator=gen).double()
        expected = dense_distance(rows @ rows.T, reference.rows())
        assert pairwise.gram_distance(3 * rows, reference) == pytest.approx(expected, rel=1e-7, abs=1e-15)
        expected = dense_distance(rows @ other.T, reference.rows())
        assert pairwise.gram_distance(rows, reference, other) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_seli_and_frame_from_vectors(counts):
    """Vectors that have these inner products, in 32 dimensions at random: at distance 0 of theirs, not of others."""
    K, d = len(counts), 32
    labels = torch.arange(K).repeat_interleave(torch.tensor(counts))
    (of_rows, of_means), (frame_rows, frame_means) = seli(counts), orthogonal_frame(counts)
    groups = {"some": [0, K - 1, 1]}
    W, M = 7 * vectors_of(of_rows.rows(), d), vectors_of(of_means.rows(), d)
    report = measure(moments_of(M[labels] + 3, labels, K), W, groups=groups)
    for part in (report, report.groups["some"]):
        assert max(part.nc2_seli, part.nc2_seli_weight) < 1e-9
        assert min(part.nc2_gof, part.nc2_gof_weight) > 1e-3
        assert (max(part.nc2_etf, part.nc2_etf_weight) < 1e-9) == (len(set(counts)) == 1)
    W, M = 7 * vectors_of(frame_rows.rows(), d), vectors_of(frame_means.rows(), d)
    report = measure(moments_of(M[labels], labels, K), W, groups=groups)
    for part in (report, report.groups["some"]):
        assert max(part.nc2_gof, part.nc2_gof_weight) < 1e-9
        assert min(part.nc2_seli_weight, part.nc2_etf_weight) > 1e-3


def test_geometry_of_the_classes_that_have_samples():
    """Class 1 has none: the others are as if it did not exist, and its row of the classifier is left out."""
    counts = [60, 0, 60, 6, 6]
    labels = torch.arange(5).repeat_interleave(torch.tensor(counts))
    of_rows, of_means = (vectors_of(gram.rows(), 8) for gram in seli(counts))
    W, M = torch.ones(5, 8).double(), torch.zeros(5, 8).double()
    W[[0, 2, 3, 4]], M[[0, 2, 3, 4]] = of_rows, of_means
    report = measure(moments_of(M[labels], labels, 5), W, groups={"tail": [1, 3, 4]})
    for part in (report, report.groups["tail"]):
        assert max(part.nc2_seli, part.nc2_seli_weight) < 1e-9


@pytest.mark.parametrize("merged", [1e-2, 1e-4, 1e-6])
def test_cdnv_of_merging_means_has_all_digits(tile, merged):
    """Means at `merged` of each other, two of them at the square of that: rational arithmetic on the same floats is the
    truth, and differences of close floats are exact, so no digit need be lost."""
    gen = torch.Generator().manual_seed(0)
    far = torch.randn(12, 3, generator=gen, dtype=torch.float64)
    means = torch.cat([far[:4], far[4] + merged * far[5:]])
    means[-1] = means[-2] + merged**2 * far[0]
    means, variances = means[torch.randperm(len(means), generator=gen)], torch.arange(1, 12).double() / 4
    total = Fraction(0)
    for i, j in itertools.combinations(range(11), 2):
        gap = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(means[i].tolist(), means[j].tolist(), strict=True))
        total += Fraction(float(variances[i] + variances[j])) / (2 * gap)
    assert pairwise.cdnv(means, variances) == pytest.approx(float(total / 55), rel=1e-11)
    assert pairwise.compare_means(means, variances).cdnv == pytest.approx(float(total / 55), rel=1e-11)


def test_cdnv_of_merged_means_far_from_the_origin():
    means = 1e3 + torch.tensor([[0.0, 0.0], [2.0**-20, 0.0]], dtype=torch.float64)
    assert pairwise.cdnv(means, torch.ones(2, dtype=torch.float64)) == 2.0**40


def test_coinciding_classes():
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.3, 0.1, 0.7, 0.2], [0.3, 0.1, 0.7, 0.2]], dtype=torch.float64)
    assert pairwise.cdnv(rows, torch.ones(4).double()) == math.inf
    assert pairwise.uniformity_gap(rows) == (math.inf, math.inf)


def mp_gaps(rows, K):
    """Both uniformity gaps with 60 digits."""
    exact = [[mp.mpf(v) for v in row] for row in rows.tolist()]
    norms = [mp.sqrt(sum(v * v for v in row)) for row in exact]
    units = [[v / norm for v in row] for row, norm in zip(exact, norms, strict=True)]
    gaps = [mp.sqrt(sum((u - v) ** 2 for u, v in zip(a, b, strict=True))) for a, b in itertools.combinations(units, 2)]
    delta, s = mp.sqrt(mp.mpf(2 * K) / (K - 1)), rows.shape[1] - 2
    riesz = mp.log(sum(gap**-s for gap in gaps) / len(gaps)) / s + mp.log(delta)
    return float(sum(mp.log(delta / gap) for gap in gaps) / len(gaps)), float(riesz)


@pytest.mark.parametrize("merged", [1, 1e-2, 1e-4, 1e-6])
def test_uniformity_against_sixty_digits(tile, merged):
    """The gaps of unit vectors at `merged` of each other: rows known to 1e-16 have them to 1e-16/merged, so their
    logarithms too."""
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 5, generator=gen, dtype=torch.float64)
    rows[3:] = rows[3] + merged * rows[3:]
    assert pairwise.uniformity_gap(rows) == pytest.approx(mp_gaps(rows, 7), rel=1e-12, abs=1e-15 / merged)


@pytest.mark.parametrize("scale", [1, 0.05])
def test_uniformity_in_4096_dimensions(tile, scale):
    """s = 4094: the kernel itself would be 1e-700 or, where classes are close, 1e+5000."""
    gen = torch.Generator().manual_seed(0)
    rows = torch.eye(4, 4096).double() + scale * torch.randn(4, 4096, generator=gen).double() / 64
    rows = rows if scale == 1 else 1 + rows / 20
    assert pairwise.uniformity_gap(rows) == pytest.approx(mp_gaps(rows, 4), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("K, d", [(2, 3), (4, 3), (10, 9), (10, 2048)])
def test_uniformity_gap_is_zero_at_the_simplex_alone(K, d):
    gen = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(simplex_etf(K).rows())
    rows = (vectors * values.clamp(min=0).sqrt())[:, 1:] @ frame(d, K - 1).T
    rows = rows * torch.rand(K, 1, generator=gen).double()
    for gap in pairwise.uniformity_gap(rows):
        assert gap == pytest.approx(0, abs=1e-9)
    for gap in pairwise.uniformity_gap(rows + 0.1 * torch.randn(K, d, generator=gen).double()):
        assert gap > 1e-5


def test_uniformity_needs_three_dimensions_for_riesz():
    log_gap, riesz_gap = pairwise.uniformity_gap(torch.eye(2, dtype=torch.float64))
    assert log_gap == pytest.approx(math.log(2 / math.sqrt(2))) and math.isnan(riesz_gap)


def test_minority_collapse_is_seen():
    rows = torch.cat([etf(3, 8), torch.ones(7, 8).double() + 1e-5 * frame(8, 7).T])
    x = torch.cat([rows, rows + 1e-3, rows - 1e-3])
    report = measure(moments_of(x, torch.arange(10).repeat(3), 10), rows, groups={"minority": range(3, 10)})
    assert report.groups["minority"].mean_cosine == pytest.approx(1, abs=1e-8)
    assert report.groups["minority"].mean_cosine_weight == pytest.approx(1, abs=1e-8)
    assert report.mean_cosine < 0.5 and report.gnc2_log > 1 and report.groups["minority"].gnc2_riesz > 5


def test_undefined_is_nan():
    one, zero = torch.ones(1, 3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    values = [*pairwise.equiangle(one), pairwise.mean_cosine(one), *pairwise.uniformity_gap(one)]
    values += [pairwise.gram_distance(one, simplex_etf(3, size=1)), pairwise.cdnv(one, one[0, :1])]
    values += [pairwise.gram_distance(zero, simplex_etf(3)), *pairwise.equiangle(zero), *pairwise.uniformity_gap(zero)]
    values += [*pairwise.compare_means(one, one[0, :1]), *pairwise.compare_means(zero, torch.ones(3).double())[1:]]
    assert all(map(math.isnan, values))


@pytest.mark.parametrize("K, d", [(3, 3), (40, 40), (10, 500)])
def test_one_pass_finds_nothing_at_the_simplex(tile, K, d):
    found = pairwise.compare_means(etf(K, d), torch.zeros(K).double())
    assert found.cdnv == 0 and max(found.angle, found.maxangle) < 1e-14 and abs(found.log_gap) < 1e-13
    near = pairwise.compare_means(torch.cat([etf(K, d), etf(K, d)[:1]]), torch.ones(K + 1).double())
    assert near.cdnv == math.inf == near.log_gap, "two of them coincide"


def test_one_pass_at_any_angle(tile):
    """A merged group far from the simplex: what is filled in for pairs not asked for leaves no trace."""
    gen = torch.Generator().manual_seed(0)
    rows = torch.ones(9, 5).double() + 1e-6 * torch.randn(9, 5, generator=gen).double()
    found = pairwise.compare_means(rows, torch.ones(9).double(), num_classes=12)
    directions = rows - torch.ones(5).double() * (rows @ torch.ones(5).double() / 5)[:, None]  # what turns them apart
    squares = torch.cdist(directions, directions).square()[torch.triu_indices(9, 9, 1).unbind()] / 5
    assert found.angle == pytest.approx(float((squares / 2).std(correction=0)), rel=1e-3)
    assert found.maxangle == pytest.approx(1 + 1 / 11, rel=1e-11)
