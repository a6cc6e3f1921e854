"""Measures of neural collapse: pure functions of class means, classifier rows and a within-class covariance.

Notation: K classes, d features; mu_k class means; pi_k the weight of class k in every average over classes (`balanced`:
1/K; `empirical`: n_k/N); mu_G = sum_k pi_k mu_k the centre; M (K, d) the centred means m_k = mu_k - mu_G; W (K, d) the
classifier's rows. Covariances are

    S_W = sum_k pi_k S_k / n_k,    S_B = sum_k pi_k m_k m_k^T.

Measures that compare classes with each other (all of NC2 and NC3, CDNV) count every class once in either weighting.

Sources, and where they differ:

* `papyan2020`: Papyan, Han & Donoho, PNAS 117(40), 2020. NC1 is tr(S_W S_B^+)/K in fig. 6; the code released with it
  leaves out the division, squares NC3 and takes the unbiased standard deviation of norms.
* `zhu2021`: Zhu et al., NeurIPS 2021. NC1 is tr(S_W S_B^+)/K; NC2 is the distance of normalised Gram matrices, of W;
  their NC3 is the same distance with G = W M^T, not the one here.
* `galanti2022`: Galanti, Gyorgy & Hutter, ICLR 2022. CDNV.

What is undefined (one class, a zero vector) is NaN, never 0.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nc_probe.geometry import simplex_etf_cosine, simplex_etf_gram

__all__ = [
    "BetweenInverse",
    "between_inverse",
    "cdnv",
    "cosine_gram",
    "equiangle",
    "equinorm",
    "etf_distance",
    "mean_cosine",
    "nc1",
    "self_duality",
    "self_duality_cosines",
    "trace_quotient",
]

# Rows of a K x K matrix held at once: 1024 x 21841 float64 is 179 MB, the whole would be 3.8 GB.
TILE = 1024


class BetweenInverse(NamedTuple):
    """S_B^+ = basis basis^T.

    basis: (d, r) float64. rank: r. condition: sigma_1 / sigma_r of the weighted centred means; the relative error of
    NC1 is about this times the rounding (2e-16) of the means.
    """

    basis: Tensor
    rank: int
    condition: float


def between_inverse(
    centered: Tensor,
    class_weights: Tensor,
    *,
    max_rank: int | None = None,
    magnitude: float = 0.0,
) -> BetweenInverse:
    """Factor of the pseudo-inverse of S_B = A^T A, A = diag(sqrt(pi)) M.

    With the singular value decomposition A = U diag(sigma) V^T it is basis = V diag(1/sigma): the eigenvectors of the
    K x K Gram matrix A A^T carried to feature space, without forming that product. Forming it squares the condition:
    with class means merged to 1e-6 of their norm, NC1 from the eigenvalues of A A^T is right to 4e-4, from the singular
    values of A to 5e-8.

    A singular value is kept above 8 max(K, d) eps times the larger of sigma_1 and `magnitude`: below that it is
    rounding of the means, whose reciprocal would be noise. At most `max_rank` are kept.

    Args:
        centered: (K, d) M.
        class_weights: (K,) pi.
        max_rank: what the centring leaves, K - 1 if all classes are given. Default: min(K, d).
        magnitude: size of the means before centring, to which their rounding is relative.
    """
    A = class_weights.sqrt()[:, None] * centered
    _, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    if max_rank is not None:
        sigma = sigma[:max_rank]
    scale = max(float(sigma[0]), magnitude) if len(sigma) else 0.0
    floor = 8 * max(A.shape) * torch.finfo(A.dtype).eps * scale
    rank = int((sigma > floor).sum())
    basis = Vh[:rank].T / sigma[:rank]
    return BetweenInverse(basis, rank, float(sigma[0] / sigma[rank - 1]) if rank else math.nan)


def nc1(inverse: BetweenInverse, within: Tensor, num_classes: int) -> float:
    """NC1, within-class variability against between-class: tr(S_W S_B^+) / K.

    Range [0, inf); 0 at collapse. `zhu2021`; figures of `papyan2020` (its notebook: K times this).
    Variability outside the span of the centred means does not count.

    Args:
        inverse: of S_B.
        within: (d, d) S_W.
        num_classes: K.
    """
    if inverse.rank == 0:
        return math.nan
    return float((within @ inverse.basis * inverse.basis).sum() / num_classes)


def trace_quotient(within_trace: Tensor, between_trace: Tensor) -> float:
    """tr S_W / tr S_B. Range [0, inf); 0 at collapse. Needs no inverse, so never ill-conditioned."""
    return float(within_trace / between_trace) if between_trace > 0 else math.nan


def cdnv(means: Tensor, variances: Tensor) -> float:
    """Class-distance normalised variance: mean over i != j of (v_i + v_j) / (2 ||mu_i - mu_j||^2).

    Range [0, inf]; 0 at collapse, infinite if two class means coincide. `galanti2022`.

    Args:
        means: (K, d), centred or not.
        variances: (K,) v_k = tr S_k / n_k.
    """
    K = len(means)
    if K < 2:
        return math.nan
    total = 0.0
    for start in range(0, K, TILE):
        # Differences first, then squares: the Gram form of a distance cancels where minority means merge.
        gap = torch.cdist(means[start : start + TILE], means, compute_mode="donot_use_mm_for_euclid_dist").square()
        gap.diagonal(start).fill_(math.inf)
        total += float(((variances[start : start + TILE, None] + variances) / (2 * gap)).sum())
    return total / (K * (K - 1))


def equinorm(rows: Tensor) -> float:
    """NC2, equal norms: standard deviation of the norms over their mean (coefficient of variation, population form).

    Range [0, sqrt(K-1)]; 0 if all norms are equal. `papyan2020`, fig. 2.

    Args:
        rows: (m, d) centred means, or classifier rows as they are.
    """
    norms = rows.norm(dim=1)
    return float(norms.std(correction=0) / norms.mean()) if len(rows) > 1 else math.nan


def equiangle(rows: Tensor, *, num_classes: int | None = None) -> tuple[float, float]:
    """NC2, equal angles: of the cosines of all pairs, (standard deviation, mean |cos + 1/(K-1)|).

    Ranges [0, 1] and [0, 1 + 1/(K-1)]; both 0 for a simplex ETF. `papyan2020`, figs. 3 and 4.

    Args:
        rows: (m, d) centred means or classifier rows: all K, or those of a group.
        num_classes: K of the simplex that the rows should be part of. Default: m.
    """
    m = len(rows)
    if m < 2:
        return math.nan, math.nan
    target, mean = simplex_etf_cosine(num_classes or m), mean_cosine(rows)
    squares = deviation = 0.0
    for start, cosines in _gram_tiles(_unit(rows)):
        cosines.diagonal(start).fill_(mean)
        squares += float((cosines - mean).square().sum())
        cosines.diagonal(start).fill_(target)
        deviation += float((cosines - target).abs().sum())
    pairs = m * (m - 1)
    return math.sqrt(squares / pairs), deviation / pairs


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine over all pairs of rows. Range [-1/(m-1), 1].

    -1/(K-1) for a simplex ETF; 1 if the rows have merged to one direction, as minority classes do beyond a critical
    imbalance (minority collapse: Fang, He, Long & Su, PNAS 118(43), 2021).
    """
    m = len(rows)
    # The sum over all ordered pairs is ||sum of unit rows||^2, of which m are a row with itself.
    return float(_unit(rows).sum(0).square().sum() - m) / (m * (m - 1)) if m > 1 else math.nan


def cosine_gram(rows: Tensor) -> Tensor:
    """(m, m) cosines of all pairs of rows (m, d); NaN beside a zero row."""
    return _unit(rows) @ _unit(rows).T


def etf_distance(rows: Tensor, *, num_classes: int | None = None) -> float:
    """NC2, distance to the simplex ETF: || G/||G||_F - E/||E||_F ||_F with G = rows rows^T, E the Gram of the ETF.

    Range [0, sqrt 2]; 0 for a simplex ETF of any size and orientation. `zhu2021`, there with rows = W.

    Args:
        rows: (m, d) centred means or classifier rows: all K, or those of a group.
        num_classes: K of the simplex that the rows should be part of (E is then a block of its Gram). Default: m.
    """
    m = len(rows)
    if m < 2:
        return math.nan
    K = num_classes or m
    # rows rows^T and rows^T rows have the same Frobenius norm: take the smaller.
    narrow = rows if m <= rows.shape[1] else rows.T
    norm = (narrow @ narrow.T).norm()
    etf_norm = math.sqrt(m + m * (m - 1) * simplex_etf_cosine(K) ** 2)
    total = 0.0
    for start, gram in _gram_tiles(rows):
        etf = simplex_etf_gram(K, size=m, start=start, stop=start + len(gram), device=rows.device)
        total += float((gram / norm - etf / etf_norm).square().sum())
    return math.sqrt(total)


def self_duality(weight: Tensor, centered: Tensor) -> float:
    """NC3, || W/||W||_F - M/||M||_F ||_F. Range [0, 2]; 0 if W is M up to a positive factor.

    `papyan2020`, fig. 5 (whose code squares it).

    Args:
        weight: (m, d) classifier rows.
        centered: (m, d) centred means of the same classes.
    """
    return float((weight / weight.norm() - centered / centered.norm()).norm()) if len(weight) else math.nan


def self_duality_cosines(weight: Tensor, centered: Tensor) -> Tensor:
    """NC3 per class: cosine of w_k and m_k, (m,) in [-1, 1]; 1 at self-duality, whatever the norms."""
    return (_unit(weight) * _unit(centered)).sum(1)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def _gram_tiles(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, block of rows) of rows rows^T."""
    for start in range(0, len(rows), TILE):
        yield start, rows[start : start + TILE] @ rows.T
