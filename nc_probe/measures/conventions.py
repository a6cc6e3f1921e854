"""Neural collapse as papers published it, each with its own centre, weighting and normalisation.

The report has one convention for all of its numbers; published numbers have others, and on imbalanced data they differ
by more than the effects they are about. Here are the formulas of the papers, on any data, so that a number can stand
beside theirs. They agree with the released code in exact arithmetic: pseudo-inverses come from singular values in
float64, and what is rounding in them is left out.

Classes without samples are left out, but for the measures of W alone, which take all its rows. NaN stands for what is
absent or undefined, or for a weighting that the moments cannot resolve.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from nc_probe.measures import formulas, pairwise
from nc_probe.measures.agreement import Agreement
from nc_probe.measures.geometry import simplex_etf
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.precision import float64_context

__all__ = [
    "CONVENTIONS",
    "INVERSES",
    "SAME_IF_BALANCED",
    "check_conventions",
    "fang2021",
    "papyan2020",
    "rhubarbwu",
    "zhu2021",
]

NAN = math.nan


def papyan2020(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    agreement: Agreement | None = None,
    groups: Mapping[str, Tensor] | None = None,
    spread: Tensor | None = None,
) -> dict[str, float]:
    """Papyan, Han & Donoho, PNAS 117(40), 2020, as in the notebook released with it.

    mu_G is the mean of class means, S_W = (1/N) sum over all samples, S_B = (1/K) sum_k m_k m_k^T of rank K - 1.

    Returns:
        nc1: tr(S_W S_B^+), without the 1/K that fig. 6 has. [0, inf), 0 at collapse.
        nc2_norm, nc2_norm_weight: standard deviation (unbiased) over mean, of the norms of m_k and of w_k. [0, sqrt K].
        nc2_angle, nc2_angle_weight: mean over i != j of |cos + 1/(K-1)|. [0, 1 + 1/(K-1)].
        nc3: || W/||W||_F - M/||M||_F ||_F^2, squared. [0, 4].
        nc4: share of samples on which the classifier and the nearest class mean disagree. [0, 1], 0 at collapse.
    """
    with float64_context(moments.device):
        W = _rows(moments, weight)
        seen = moments.count > 0
        n, mu = moments.count[seen], moments.mean[seen]
        M = mu - mu.mean(0)
        norm, angle = _unbiased_equinorm(M), pairwise.equiangle(M)[1]
        values = {"nc1": _nc1(moments, _papyan_inverse, spread), "nc2_norm": norm, "nc2_norm_weight": NAN}
        values |= {"nc2_angle": angle, "nc2_angle_weight": NAN, "nc3": NAN, "nc4": NAN}
        if W is not None:
            values["nc2_norm_weight"] = _unbiased_equinorm(W)
            values["nc2_angle_weight"] = pairwise.equiangle(W)[1]
            values["nc3"] = formulas.self_duality(W[seen], M) ** 2
        if agreement is not None and agreement.agree is not None:
            values["nc4"] = 1 - float(agreement.agree.sum()) / float(n.sum())
    return values


def zhu2021(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    agreement: Agreement | None = None,
    groups: Mapping[str, Tensor] | None = None,
    spread: Tensor | None = None,
) -> dict[str, float]:
    """Zhu et al., "A Geometric Analysis of Neural Collapse with Unconstrained Features", NeurIPS 2021.

    mu_G is the mean of all samples, S_W = (1/N) sum over all samples, S_B = (1/K) sum_k (mu_k - mu_G)(mu_k - mu_G)^T:
    every class counts once in it, but about the centre of samples. Its rank is K - 1, as sum_k n_k (mu_k - mu_G) = 0.

    Returns:
        nc1: tr(S_W S_B^+) / K. [0, inf), 0 at collapse.
        nc2: || W W^T/||W W^T||_F - (I - 1 1^T/K)/sqrt(K-1) ||_F. [0, sqrt 2].
        nc3: || W H/||W H||_F - (I - 1 1^T/K)/sqrt(K-1) ||_F, the columns of H being mu_k - mu_G. [0, 2].
        nc3_bias: || W mu_G + b ||, b = 0 if there is none. [0, inf). At collapse the bias takes the centre back. As in
            the code released, tding1/Neural-Collapse, since October 2021; W mu_G - b before, and in copies of it.
    """
    with float64_context(moments.device):
        W = _rows(moments, weight)
        seen = moments.count > 0
        K, n, mu = int(seen.sum()), moments.count[seen].double(), moments.mean[seen]
        center = (n / n.sum()) @ mu
        M = mu - center
        values = {"nc1": _nc1(moments, _zhu_inverse, spread) / K, "nc2": NAN, "nc3": NAN, "nc3_bias": NAN}
        if W is not None:
            if len(W) > 1:
                values["nc2"] = pairwise.gram_distance(W, simplex_etf(len(W)))
            if K > 1:
                values["nc3"] = pairwise.gram_distance(W[seen], simplex_etf(K), M)
            image = W @ center
            values["nc3_bias"] = float((image if bias is None else image + bias.detach().to(image)).norm())
    return values


def fang2021(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    agreement: Agreement | None = None,
    groups: Mapping[str, Tensor] | None = None,
    spread: Tensor | None = None,
) -> dict[str, float]:
    """Fang, He, Long & Su, "Exploring deep neural networks via layer-peeled model", PNAS 118(43), 2021.

    Returns:
        cosine_NAME: for each group, mean cosine between all pairs of its classifier rows. [-1/(m-1), 1]; minority
            collapse is 1 in the minority.
        norm_ratio: mean norm of the classifier rows of group "majority" over that of group "minority". [0, inf); only
            where both are named.
    """
    with float64_context(moments.device):
        W, groups = _rows(moments, weight), groups or {}
        values = {f"cosine_{name}": NAN if W is None else pairwise.mean_cosine(W[of]) for name, of in groups.items()}
        if {"majority", "minority"} <= groups.keys():
            norms = [NAN if W is None else formulas.mean_norm(W[groups[name]]) for name in ("majority", "minority")]
            values["norm_ratio"] = norms[0] / norms[1] if norms[1] else NAN
    return values


def rhubarbwu(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    agreement: Agreement | None = None,
    groups: Mapping[str, Tensor] | None = None,
    spread: Tensor | None = None,
) -> dict[str, float]:
    """Wu, the library `neural_collapse` (github.com/rhubarbwu/neural-collapse, 2024), by the names of its functions.

    mu_G is the mean of class means, the default of its accumulators; S_W = (1/N) sum over all samples, S_B = (1/K)
    sum_k m_k m_k^T. u_k = m_k / ||m_k||; its kernels are of g = ||u_i - u_j||, over pairs i < j.

    Returns:
        covariance_ratio: tr(S_B^+ S_W) / K, its metric "pinv". [0, inf), 0 at collapse.
        variability_cdnv: mean over pairs of (v_i + v_j) / (2 ||mu_i - mu_j||^2). [0, inf], 0 at collapse.
        simplex_etf_error: || M M^T/||M M^T||_F - (I - 1 1^T/K)/sqrt(K-1) ||_F. [0, sqrt 2].
        dist_kernel, dist_kernel_variance: `kernel_stats` of g, mean and variance; at collapse sqrt(2K/(K-1)) and 0.
        log_kernel, log_kernel_variance: of log(1/g); at collapse -log(2K/(K-1))/2 and 0.
        self_duality_error: || W M^T/||W M^T||_F - (I - 1 1^T/K)/sqrt(K-1) ||_F. [0, 2]. `zhu2021` has the mean of
            samples for mu_G.
        similarities_variance: unbiased variance of w_k . m_k, uniform duality. [0, inf), 0 at collapse.
        clf_ncc_agreement: share of samples on which the classifier and the nearest class mean agree. [0, 1], 1 at
            collapse. Absent with a bias that differs between classes: the classifier of the library has none.
    """
    with float64_context(moments.device):
        W = _rows(moments, weight)
        seen = moments.count > 0
        K, n, mu = int(seen.sum()), moments.count[seen].double(), moments.mean[seen]
        M = mu - mu.mean(0)
        values = {"covariance_ratio": _nc1(moments, _papyan_inverse, spread) / K}
        values["variability_cdnv"] = pairwise.cdnv(M, moments.trace[seen] / n)
        values["simplex_etf_error"] = pairwise.gram_distance(M, simplex_etf(K)) if K > 1 else NAN
        values |= _kernels(M) | {"self_duality_error": NAN, "similarities_variance": NAN, "clf_ncc_agreement": NAN}
        if W is not None and K > 1:
            values["self_duality_error"] = pairwise.gram_distance(W[seen], simplex_etf(K), M)
            values["similarities_variance"] = float((W[seen] * M).sum(1).var())
        unbiased = bias is None or bool((bias == bias[0]).all())
        if unbiased and agreement is not None and agreement.agree is not None:
            values["clf_ncc_agreement"] = float(agreement.agree.sum()) / float(n.sum())
    return values


Convention = Callable[
    [ClassMoments, Tensor | None, Tensor | None, Agreement | None, Mapping[str, Tensor] | None, Tensor | None],
    dict[str, float],
]

CONVENTIONS: Mapping[str, Convention] = {
    "papyan2020": papyan2020,
    "zhu2021": zhu2021,
    "fang2021": fang2021,
    "rhubarbwu": rhubarbwu,
}


def check_conventions(conventions: Iterable[str]) -> tuple[str, ...]:
    """The names, if they are those of conventions.

    Raises:
        ValueError: one is not.
    """
    for paper in conventions:
        if paper not in CONVENTIONS:
            raise ValueError(f"conventions must be among {tuple(CONVENTIONS)}, got {paper!r}")
    return tuple(conventions)


def _papyan_inverse(moments: ClassMoments) -> formulas.BetweenInverse:
    mu = moments.mean[moments.count > 0]
    return _inverse(moments, mu - mu.mean(0))


def _zhu_inverse(moments: ClassMoments) -> formulas.BetweenInverse:
    seen = moments.count > 0
    n, mu = moments.count[seen].double(), moments.mean[seen]
    return _inverse(moments, mu - (n / n.sum()) @ mu)


def _inverse(moments: ClassMoments, centered: Tensor) -> formulas.BetweenInverse:
    """S_B^+ with every class once in S_B; about either centre the class means span K - 1 directions at most."""
    K = len(centered)
    magnitude = math.sqrt(float(moments.mean.square().sum()) / K)
    weights = torch.full_like(centered[:, 0], 1 / K)
    return formulas.between_inverse(centered, weights, max_rank=K - 1, magnitude=magnitude)


INVERSES: Mapping[str, Callable[[ClassMoments], formulas.BetweenInverse]] = {
    "papyan2020": _papyan_inverse,
    "zhu2021": _zhu_inverse,
    "rhubarbwu": _papyan_inverse,
}
"""S_B^+ = B B^T of the conventions whose NC1 needs it, so that tr(B^T S_k B) can be had from a second look."""

SAME_IF_BALANCED = {"papyan2020", "zhu2021", "rhubarbwu"}
"""Those whose S_B is that of a report in which every class counts once: of `zhu2021` for equal counts alone."""


def _rows(moments: ClassMoments, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().to(moments.mean)


def _nc1(
    moments: ClassMoments, invert: Callable[[ClassMoments], formulas.BetweenInverse], spread: Tensor | None
) -> float:
    """tr(S_W S_B^+) with S_W over all samples; `spread` (K,) is tr(B^T S_k B), if known."""
    n = moments.count.double()
    if spread is not None:
        return float(spread.sum() / n.sum())
    inverse = invert(moments)
    per_sample = torch.full_like(n, 1 / float(n.sum()))
    return (
        formulas.nc1(inverse, moments.within_class_scatter(per_sample), 1)
        if inverse.rank and moments.supports_weights(per_sample)
        else NAN
    )


def _unbiased_equinorm(rows: Tensor) -> float:
    norms = rows.norm(dim=1)
    return float(norms.std() / norms.mean()) if len(rows) > 1 else NAN


def _kernels(centered: Tensor) -> dict[str, float]:
    """Mean and variance over pairs of g = ||u_i - u_j|| and of log(1/g), in two passes over tiles of pairs."""
    m, directions = len(centered), pairwise.unit(centered)

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64, device=centered.device)
        for _, squares in pairwise.squared_gaps(directions):
            g = squares[squares != math.inf].sqrt()
            total += of(torch.stack([g, -g.log()])).sum(1)
        return total / (m * (m - 1) / 2)

    means = mean(lambda kernels: kernels)
    variances = mean(lambda kernels: (kernels - means[:, None]).square())
    values = torch.stack([means, variances], 1).flatten().tolist()
    return dict(zip(("dist_kernel", "dist_kernel_variance", "log_kernel", "log_kernel_variance"), values, strict=True))
