"""Class sums in float64: the first moments alone, where a second look at the features gives the others.

Features in float32 and coarser are summed as they are: numbers of 24 bits, of which a sum in float64 keeps every bit
while they and the sum are within a factor of 2^29, as those about a large common offset are. Of features in float64
x - c is summed, with the first sample as c, so that such an offset cancels before it rounds.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from nc_probe.moments.blocks import block_rows
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.precision import float64_context
from nc_probe.moments.validation import check_batch, validate_values

__all__ = ["ClassSums"]


class ClassSums:
    """Streaming count and sum of K classes of d features.

    Args:
        empty: moments without samples, which tell K, d and the device.

    Attributes:
        batches: number of batches checked.
    """

    def __init__(self, empty: ClassMoments) -> None:
        self._empty = empty
        self.num_classes, self.num_features, self.device = empty.num_classes, empty.num_features, empty.device
        self._memory = torch.empty(0, empty.num_features)
        self.reset()

    def reset(self) -> None:
        """Drop every sample."""
        K, d, self.batches = self.num_classes, self.num_features, 0
        real: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        with float64_context(self.device):
            self.count = torch.zeros(K, dtype=torch.int64, device=self.device)
            self._total, self._origin = torch.zeros(K, d, **real), torch.zeros(d, **real)  # the sum is about the origin
            # The first batch with a bad label, and with a bad feature; -1 for none.
            self._bad = torch.full((2,), -1, dtype=torch.int64, device=self.device)
        self._started = self._about_origin = False

    def check(self, features: Tensor, labels: Tensor, norms: Tensor | None = None) -> None:
        """Check a batch, before it is added, as `ClassMoments.update` does.

        Args:
            features: (B, d) floating point, on any device.
            labels: (B,) integers in 0..K-1.
            norms: (B,) of the features, if they are known: finite where these are.

        Raises:
            ValueError: as by `ClassMoments.update`.
        """
        with float64_context(self.device):
            check_batch(features, labels, self.num_features)
            x, labels = features.detach().to(self.device), labels.detach().long()
            self._bad = validate_values(x, labels, self.num_classes, batch=self.batches, bad=self._bad, norms=norms)
            self.batches += 1

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch that has been checked: features (B, d), labels (B,)."""
        if not len(labels):
            return
        with float64_context(self.device):
            x = features.detach().to(self.device)
            labels = labels.detach().to(self.device).long().clamp(0, self.num_classes - 1)  # others are known by `_bad`
            if not self._started:
                self._started, self._about_origin = True, x.dtype == torch.float64
                if self._about_origin:
                    self._origin.copy_(x[0])
            self.count.index_add_(0, labels, torch.ones_like(labels))
            rows = min(block_rows(self.device, self.num_features), len(x))
            if len(self._memory) < rows or self._memory.device != self._total.device:  # pages that are new take time
                self._memory = self._total.new_empty(rows, self.num_features)
            for part, of in zip(x.split(rows), labels.split(rows), strict=True):
                y = self._memory[: len(part)].copy_(part)
                self._total.index_add_(0, of, y.sub_(self._origin) if self._about_origin else y)

    def moments(self) -> ClassMoments:
        """Return moments of these counts and means, without variances."""
        moments = copy.copy(self._empty).reset()
        with float64_context(self.device):
            seen = self.count.nonzero()[:, 0]
            mean = torch.addcdiv(self._origin, self._total[seen], self.count[seen, None].double())
            moments.mean[seen] = mean
            moments.count, moments._bad = self.count.clone(), self._bad.clone()
            moments.batches = self.batches
        return moments
