"""Class sums in float64: the first moments alone, where a second look at the features gives the others.

Of x - c, with the first sample as c, so that a large common offset cancels before it rounds.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from nc_probe.moments.blocks import block_rows
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.precision import float64_context
from nc_probe.moments.state import State
from nc_probe.moments.validation import check_batch, validate_values

__all__ = ["ClassSums"]


class ClassSums(State):
    """Streaming count and sum of K classes of d features. Values are checked as by `ClassMoments`.

    Args:
        empty: moments without samples, which tell K, d and the device.

    Attributes:
        count: (K,) int64 samples seen.
        total: (K, d) float64, their sum about `origin`.
        origin: (d,) float64, the first sample.
    """

    # In `_bad`: the first batch with a bad label, and with a bad feature; -1 for none.
    NAMES = ("count", "total", "origin", "_bad")
    count: Tensor
    total: Tensor
    origin: Tensor
    _bad: Tensor

    def __init__(self, empty: ClassMoments) -> None:
        super().__init__(empty.device)
        self._empty = empty
        self.num_classes, self.num_features = empty.num_classes, empty.num_features
        self.reset()

    def empty(self) -> dict[str, Tensor]:
        """Make the tensors as they are without samples."""
        self._started = False
        real: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        return {
            "count": torch.zeros(self.num_classes, dtype=torch.int64, device=self.device),
            "total": torch.zeros(self.num_classes, self.num_features, **real),
            "origin": torch.zeros(self.num_features, **real),
            "_bad": torch.full((2,), -1, dtype=torch.int64, device=self.device),
        }

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features (B, d) floating point, labels (B,) integers in 0..K-1, on any device.

        Raises:
            ValueError: as by `ClassMoments.update`.
        """
        with float64_context(self.device):
            check_batch(features, labels, self.num_features)
            x, labels = features.detach().to(self.device), labels.detach().long()
            self._bad = validate_values(x, labels, self.num_classes, batch=self.batches, bad=self._bad)
            self.batches += 1
            if not len(labels):
                return
            if not self._started:
                self.origin.copy_(x[0])
                self._started = True
            labels = labels.to(self.device).clamp(0, self.num_classes - 1)  # the others are known by `_bad`
            self.count.index_add_(0, labels, torch.ones_like(labels))
            rows = min(block_rows(self.device, self.num_features), len(x))
            memory = self.total.new_empty(rows, self.num_features)
            for part, of in zip(x.split(rows), labels.split(rows), strict=True):
                self.total.index_add_(0, of, memory[: len(part)].copy_(part).sub_(self.origin))

    def moments(self) -> ClassMoments:
        """Return moments of these counts and means, without variances."""
        moments = copy.copy(self._empty).reset()
        with float64_context(self.device):
            mean = torch.addcdiv(self.origin, self.total, self.count.clamp(min=1)[:, None].double())
            moments.mean = mean.masked_fill_((self.count == 0)[:, None], 0)
            moments.count, moments._bad = self.count.clone(), self._bad.clone()
            moments.batches = self.batches
        return moments
