"""Subtract class means in cache-sized blocks, reusing one buffer."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["block_rows", "deviations", "deviations_and_parts"]


def block_rows(device: torch.device, num_features: int) -> int:
    """How many rows of d = `num_features` to work on at once: 1 MiB of float64 on a CPU."""
    return max(2**17 // num_features, 16) if device.type == "cpu" else 4096


def deviations(
    x: Tensor | Iterable[Tensor], labels: Tensor, means: Tensor, *, rows: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """x_i - means[labels_i] and labels_i, by blocks; a block is overwritten by the next.

    Pages that are new cost more than the arithmetic on them, so that all blocks share theirs.

    Args:
        x: (B, d) floating point, on any device; or batches of such, of which a block may hold several.
        labels: (B,) rows of `means`, of all batches.
        means: (K, d) floating point, in whose precision the differences are.
        rows: of a block. Default: `block_rows`.
    """
    for y, of, _ in deviations_and_parts([x] if isinstance(x, Tensor) else x, labels, means, rows=rows):
        yield y, of


def deviations_and_parts(
    batches: Iterable[Tensor], labels: Tensor, means: Tensor, *, rows: int | None = None
) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """As `deviations`, and the features themselves of each block, in parts."""
    rows = min(rows or block_rows(means.device, means.shape[1]), len(labels))
    memory = means.new_empty(rows, means.shape[1])
    start = 0
    for parts in _blocks(batches, rows):
        stop = start + sum(map(len, parts))
        y, of = memory[: stop - start], labels[start:stop].to(means.device).long()
        torch.index_select(means, 0, of, out=y)
        filled = 0
        for part in parts:
            mine = y[filled : filled + len(part)]
            torch.sub(part.to(means.device), mine, out=mine)
            filled += len(part)
        yield y, of, parts
        start = stop


def _blocks(batches: Iterable[Tensor], rows: int) -> Iterator[list[Tensor]]:
    """Parts of batches, together `rows` samples; fewer at the end."""
    parts, missing = [], rows
    for x in batches:
        while len(x):
            parts.append(x[:missing])
            x, missing = x[missing:], missing - len(parts[-1])
            if not missing:
                yield parts
                parts, missing = [], rows
    if parts:
        yield parts
