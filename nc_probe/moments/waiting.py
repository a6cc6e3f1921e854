"""Batches that wait on a CPU to be added together, as many small ones take longer than one of as many samples."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CheckedBatch", "WaitingBatches"]

# Features and logits that wait, and those of a batch that does not.
WAITING_BYTES, LARGE = 2**22, 2**20


class CheckedBatch(NamedTuple):
    """Features (B, D), labels (B,), logits (B, K) if the model gave them, and of each classifier a sketch (n, B)."""

    features: Tensor
    labels: Tensor
    logits: Tensor | None
    sketches: list[Tensor | None]


class WaitingBatches:
    """Batches in the order in which they came."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop every batch."""
        self._batches: list[CheckedBatch] = []
        self._bytes = 0

    def fits(self, batch: CheckedBatch) -> bool:
        """Tell whether a batch can be put together with those that wait."""
        kinds = [
            (x.features.dtype, x.features.shape[1], x.labels.device, x.logits if x.logits is None else x.logits.dtype)
            for x in (*self._batches[-1:], batch)
        ]
        return kinds[0] == kinds[-1]

    def append(self, batch: CheckedBatch) -> bool:
        """Let a batch wait; tell whether they are enough to be added."""
        size = batch.features.nbytes + (0 if batch.logits is None else batch.logits.nbytes)
        self._batches.append(batch)
        self._bytes += size
        return size >= LARGE or self._bytes >= WAITING_BYTES or batch.features.device.type != "cpu"

    def pop(self) -> tuple[CheckedBatch, list[int]] | None:
        """Return them as one, with the sizes that they had, and clear them; None if there are none."""
        batches = self._batches
        self.clear()
        if len(batches) < 2:
            return (batches[0], [len(batches[0].labels)]) if batches else None
        features, labels, logits, sketches = zip(*batches, strict=True)
        together = CheckedBatch(
            torch.cat(features),
            torch.cat(labels),
            None if logits[0] is None else torch.cat(logits),
            [None if each[0] is None else torch.cat(each, 1) for each in zip(*sketches, strict=True)],
        )
        return together, [len(each) for each in labels]
