"""Class means and samples of a known geometry, turned at random, in float64."""

import torch
from torch import Tensor

from nc_probe import ClassMoments


def frame(d: int, r: int, seed: int = 0) -> Tensor:
    """(d, r) orthonormal columns."""
    gen = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, generator=gen, dtype=torch.float64))[0]


def etf(K: int, d: int | None = None, *, seed: int = 0) -> Tensor:
    """(K, d) unit vectors of a simplex ETF."""
    corners = torch.eye(K, dtype=torch.float64) - 1 / K
    return corners / corners[0].norm() @ frame(d or K, K, seed).T


def vectors_of(gram: Tensor, d: int, *, seed: int = 0) -> Tensor:
    """(m, d) vectors with the inner products `gram` (m, m)."""
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * torch.where(values > 1e-12 * values[-1], values, 0).sqrt()
    return root @ frame(d, len(gram), seed).T


def crosses(means: Tensor, Q: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Samples mu_k +- s q_j for every column q_j of Q: class covariance (s^2/r) Q Q^T and class means exactly mu_k."""
    arms = s * torch.cat([Q.T, -Q.T])
    x = (means[:, None] + arms).flatten(0, 1)
    return x, torch.arange(len(means)).repeat_interleave(len(arms))


def moments_of(x: Tensor, labels: Tensor, K: int, batch: int | None = None, **arguments) -> ClassMoments:
    moments = ClassMoments(K, x.shape[1], **arguments)
    for xb, yb in zip(x.split(batch or len(x)), labels.split(batch or len(x)), strict=True):
        moments.update(xb, yb)
    return moments
