"""Rows by blocks that stay, in float64, in the cache of a CPU and in the same memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["block_rows", "deviations"]


def block_rows(device: torch.device, num_features: int) -> int:
    """How many rows of d = `num_features` to work on at once: 1 MiB of float64 on a CPU."""
    return max(2**17 // num_features, 16) if device.type == "cpu" else 4096


def deviations(x: Tensor, labels: Tensor, means: Tensor, *, rows: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """x_i - means[labels_i] and labels_i, by blocks; a block is overwritten by the next.

    Pages that are new cost more than the arithmetic on them, so that all blocks share theirs.

    Args:
        x: (B, d) floating point, on any device.
        labels: (B,) rows of `means`.
        means: (K, d) float64.
        rows: of a block. Default: `block_rows`.
    """
    rows = min(rows or block_rows(means.device, means.shape[1]), len(x))
    y, mean = (means.new_empty(rows, means.shape[1]) for _ in range(2))
    for part, of in zip(x.split(rows), labels.split(rows), strict=True) if rows else ():
        y, mean, of = y[: len(part)], mean[: len(part)], of.to(means.device).long()
        torch.index_select(means, 0, of, out=mean)
        yield y.copy_(part.to(means.device)).sub_(mean), of
