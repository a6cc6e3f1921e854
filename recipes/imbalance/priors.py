"""Functions of class counts: priors, weights, and the correction of logits.

With n_k images of class k out of n, pi_k = n_k / n is its prior.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recipes.errors import UserError, check


def check_counts(counts: Tensor | Sequence[float]) -> Tensor:
    """Class counts as float64 on the host, (K,).

    A class without an image has no prior: its logit would be adjusted by minus infinity.

    Raises:
        UserError: fewer than two classes, or a count that is not positive and finite.
    """
    n = torch.as_tensor(counts, dtype=torch.float64, device="cpu")
    if n.ndim != 1 or len(n) < 2:
        raise UserError(f"counts has shape {tuple(n.shape)}; allowed: (K,) with K of 2 or more")
    if not (bad := (n > 0) & n.isfinite()).all():
        k = int(bad.long().argmin())
        raise UserError(f"counts is {n[k]:g} for class {k}; allowed: above 0, finite, for every class")
    return n


def log_prior(counts: Tensor | Sequence[float]) -> Tensor:
    """log pi_k = log(n_k / n), (K,) float64."""
    n = check_counts(counts)
    return (n / n.sum()).log()


def class_weights(counts: Tensor | Sequence[float], *, beta: float = 0.9999) -> Tensor:
    """Weights inverse to the effective number of images, w_k ~ (1 - beta) / (1 - beta^n_k), with sum_k pi_k w_k = 1.

    Source: Cui, Jia, Lin, Song & Belongie, "Class-balanced loss based on effective number of samples", CVPR 2019
    (arXiv 1901.05555), but for the normalisation: theirs is sum_k w_k = K.

    Args:
        counts: images of each class, (K,).
        beta: 0 (all equal) to 1 (the limit: inverse to n_k).

    Returns:
        (K,) float64.

    Raises:
        UserError: beta outside 0..1, or bad counts.
    """
    n = check_counts(counts)
    check(0 <= beta <= 1, "beta", beta, "0 to 1")
    if beta == 1:
        weights = 1 / n
    elif beta == 0:
        weights = torch.ones_like(n)
    else:
        weights = 1 / -torch.expm1(n * math.log(beta))
    return weights / (weights * n / n.sum()).sum()


def adjust_logits(logits: Tensor, counts: Tensor | Sequence[float], tau: float = 1.0) -> Tensor:
    """Logits of a model trained by cross-entropy, corrected afterwards: z_k - tau log pi_k.

    A model trained by `LogitAdjustment` needs no such thing.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021 (arXiv 2007.07314), eq. 9.

    Args:
        logits: (..., K).
        counts: images of each class in training, (K,).

    Returns:
        (..., K), in float32 or better.
    """
    check(math.isfinite(tau), "tau", tau, "a finite number")
    logits = widen(logits)
    return logits - (tau * log_prior(counts)).to(logits)


def widen(logits: Tensor) -> Tensor:
    """Logits in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
