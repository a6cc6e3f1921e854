"""Pooling of within-class scatters S_k: which are kept apart, and which weightings of them can be had.

A balanced within-class covariance is (1/K) sum_k S_k/n_k; an empirical one is (1/N) sum_k S_k.
The n_k are known only at the end, and S_k once added to S_j cannot be told apart from it, so no pooled d x d matrix
gives both: either the final proportions are known beforehand, or each class keeps its own matrix. Hence the state is
`scatter (G, d, d)`, where `partition` says which of the G matrices a class adds to and `scale` by what weight:

* nothing given: G = K, one matrix per class. Every weighting of every group is exact. For small problems.
* `class_counts` given: G = 1, S_k enters with weight 1/class_counts[k], so the sum is the balanced scatter.
* `partition` given: G matrices, e.g. one per group of classes, with or without `class_counts`.
* `scatter=False`: none. Whoever keeps the features can sum their scatter once the means and counts are known.

A weighting that the state cannot express is refused, never approximated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nc_probe.moments.validation import short

__all__ = ["add_outer_products", "common_factors", "pooling"]


def pooling(
    num_classes: int, class_counts: Tensor | Sequence[int] | None, partition: Tensor | Sequence[int] | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Find out which scatter each class adds to, and by what weight.

    Returns:
        class_counts (K,) float64 or None, partition (K,) int64, and scale (K,) float64, on the CPU.

    Raises:
        ValueError: counts or partition are not K numbers >= 0.
    """
    counts, scale = None, torch.ones(num_classes, dtype=torch.float64)
    if class_counts is not None:
        try:
            counts = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError):
            raise ValueError(f"class_counts must be {num_classes} numbers >= 0, got {class_counts!r}") from None
        if counts.shape != (num_classes,) or not (counts >= 0).all():
            raise ValueError(f"class_counts must be {num_classes} numbers >= 0, got {short(counts)}")
        scale = 1 / counts.clamp(min=1)
    if partition is None:
        partition = torch.arange(num_classes) if class_counts is None else torch.zeros(num_classes)
    bins = torch.as_tensor(partition, device="cpu").long()
    if bins.shape != (num_classes,) or bins.min() < 0:
        raise ValueError(f"partition must be {num_classes} integers >= 0, got {short(bins)}")
    return counts, bins, scale


def common_factors(factors: Tensor, bins: Tensor, num_scatters: int) -> Tensor | None:
    """Find the factor of each of G scatters if all its classes want the same.

    Args:
        factors: (m,) that classes want for theirs.
        bins: (m,) in 0..G-1.
        num_scatters: G.

    Returns:
        (G,), or None if there is no such factor.
    """
    if not num_scatters:
        return None if len(bins) else factors
    zeros = factors.new_zeros(num_scatters)
    high = zeros.scatter_reduce(0, bins, factors, "amax", include_self=False)
    low = zeros.scatter_reduce(0, bins, factors, "amin", include_self=False)
    return high if bool((high - low <= 1e-12 * high.abs()).all()) else None


def add_outer_products(scatter: Tensor, rows: Tensor, bins: Tensor) -> None:
    """Add rows[i] rows[i]^T, rows (B, d), to scatter[bins[i]], one of (G, d, d)."""
    if len(scatter) == 1:
        scatter[0].addmm_(rows.T, rows)
        return
    sizes = torch.bincount(bins, minlength=len(scatter)).tolist()
    for matrix, part in zip(scatter, rows[bins.argsort()].split(sizes), strict=True):
        if len(part):
            matrix.addmm_(part.T, part)
