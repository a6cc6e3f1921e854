"""Measures of neural collapse: pure functions of class means, classifier rows and a within-class covariance.

Those that compare classes two by two are in `pairwise.py`; the papers' own variants in `conventions.py`.

Notation: K classes, d features; mu_k class means; pi_k the weight of class k in every average over classes (`balanced`:
1/K; `empirical`: n_k/N); mu_G = sum_k pi_k mu_k the centre; M (K, d) the centred means m_k = mu_k - mu_G; W (K, d) the
classifier's rows. Covariances are

    S_W = sum_k pi_k S_k / n_k,    S_B = sum_k pi_k m_k m_k^T.

Sources:

* `papyan2020`: Papyan, Han & Donoho, PNAS 117(40), 2020.
* `zhu2021`: Zhu et al., "A Geometric Analysis of Neural Collapse with Unconstrained Features", NeurIPS 2021.
* `rudelson2007`: Rudelson & Vershynin, "Sampling from large matrices", Journal of the ACM 54(4), 2007.

What is undefined (one class, a zero vector) is NaN, never 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nc_probe.measures.pairwise import unit

__all__ = [
    "BetweenInverse",
    "Spectrum",
    "between_inverse",
    "equinorm",
    "mean_norm",
    "nc1",
    "self_duality",
    "self_duality_cosines",
    "spectrum",
    "trace_quotient",
    "unresolved",
]


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
    values of A to 5e-8. An orthogonal-triangular factorisation first leaves a square of min(K, d) to decompose.

    A singular value is kept above 8 max(K, d) eps times the larger of sigma_1 and `magnitude`: below that it is
    rounding of the means, whose reciprocal would be noise. At most `max_rank` are kept.

    Args:
        centered: (K, d) M.
        class_weights: (K,) pi.
        max_rank: what the centring leaves, K - 1 if all classes are given. Default: min(K, d).
        magnitude: size of the means before centring, to which their rounding is relative.
    """
    A = class_weights.sqrt()[:, None] * centered
    if A.shape[0] > A.shape[1]:
        sigma, Vh = torch.linalg.svd(torch.linalg.qr(A, mode="r").R)[1:]
    else:
        Q, R = torch.linalg.qr(A.T)
        sigma, Vh = torch.linalg.svd(R.T)[1:]
        Vh = Vh @ Q.T
    if max_rank is not None:
        sigma = sigma[:max_rank]
    scale = max(float(sigma[0]), magnitude) if len(sigma) else 0.0
    floor = 8 * max(A.shape) * torch.finfo(A.dtype).eps * scale
    rank = int((sigma > floor).sum())
    basis = Vh[:rank].T / sigma[:rank]
    return BetweenInverse(basis, rank, float(sigma[0] / sigma[rank - 1]) if rank else math.nan)


def unresolved(inverse: BetweenInverse, power: float, *, dtype: torch.dtype) -> int:
    """Count the directions of the centred means that may be nothing but rounding of the features.

    Each entry of a feature is off by u = eps(dtype)/2 of itself, or some u by the arithmetic that made it; so features
    by 4 u ||x|| or less, and no singular value of the weighted means by more than 4 u sqrt(E ||x||^2). Most often by
    far less, as rounding averages out over samples: NC1 is right where features vary in that direction by more than
    they are rounded, as where minority means merge. It is the quotient of two rounding errors where they do not, as
    after a linear layer that is narrow.

    Args:
        inverse: of S_B.
        power: E ||x||^2.
        dtype: precision that the features came in.
    """
    sigma = 1 / inverse.basis.norm(dim=0)
    return int((sigma <= 4 * torch.finfo(dtype).eps / 2 * math.sqrt(power)).sum())


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


class Spectrum(NamedTuple):
    """How many directions features vary in, by three counts of the eigenvalues l_i of their covariance.

    rank: those above rounding. stable_rank: sum l_i / max l_i. participation_ratio: (sum l_i)^2 / sum l_i^2.
    """

    rank: int
    stable_rank: float
    participation_ratio: float


def spectrum(total: Tensor, center: Tensor, *, dtype: torch.dtype = torch.float32) -> Spectrum:
    """Ranks of the total covariance S_T = S_W + S_B.

    Ranges: 1 <= stable_rank <= participation_ratio <= rank <= d; all are K - 1 where features are a simplex ETF. The
    stable rank is the "numerical rank" ||A||_F^2 / ||A||_2^2 of `rudelson2007`, A the centred features.

    An eigenvalue counts towards `rank` above the larger of what two roundings can make of zero. That of the features:
    each entry is off by up to u = eps(dtype)/2 of itself, so the matrix of all by u times its Frobenius norm, and no
    singular value by more (Weyl); squared, u^2 E||x||^2 with E||x||^2 = tr S_T + ||mu_G||^2. That of the sums in
    float64: 8 d eps max l_i. The first decides for bfloat16, float16 and large offsets, the second otherwise.

    Args:
        total: (d, d) S_T.
        center: (d,) mu_G, to whose size the rounding of features is relative too.
        dtype: precision that the features came in.
    """
    trace, square = float(total.trace()), float(total.square().sum())
    if not trace > 0:
        return Spectrum(0, math.nan, math.nan)
    eigenvalues = torch.linalg.eigvalsh(total)
    largest = float(eigenvalues[-1])
    of_features = (torch.finfo(dtype).eps / 2) ** 2 * (trace + float(center.square().sum()))
    of_sums = 8 * len(total) * torch.finfo(total.dtype).eps * largest
    rank = int((eigenvalues > max(of_features, of_sums)).sum())
    return Spectrum(rank, trace / largest, trace**2 / square) if rank else Spectrum(0, math.nan, math.nan)


def equinorm(rows: Tensor) -> float:
    """NC2, equal norms: standard deviation of the norms over their mean (coefficient of variation, population form).

    Range [0, sqrt(K-1)]; 0 if all norms are equal. `papyan2020`, fig. 2.

    Args:
        rows: (m, d) centred means, or classifier rows as they are.
    """
    norms = rows.norm(dim=1)
    return float(norms.std(correction=0) / norms.mean()) if len(rows) > 1 else math.nan


def mean_norm(rows: Tensor) -> float:
    """Mean norm of rows (m, d): of centred means or classifier rows. Range [0, inf); it has no ideal."""
    return float(rows.norm(dim=1).mean()) if len(rows) else math.nan


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
    return (unit(weight) * unit(centered)).sum(1)
