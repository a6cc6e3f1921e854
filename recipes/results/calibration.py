r"""Calibration: whether a classifier is right as often as it says it is.

The confidence of a prediction is the largest of its softmax probabilities. With the images in M bins of equal width by
confidence, of which $B_m$ holds those in ((m - 1) / M, m / M], the expected calibration error is

$$ \mathrm{ECE} = \sum_{m=1}^{M} \frac{|B_m|}{N} \, \bigl|\mathrm{acc}(B_m) - \mathrm{conf}(B_m)\bigr|. $$

Source: Guo, Pleiss, Sun & Weinberger, "On calibration of modern neural networks", ICML 2017, Eq. 3, with their M = 15.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

BINS = 15


def bin_table(logits: Tensor, labels: Tensor, num_classes: int, bins: int = BINS) -> Tensor:
    """What there is to know of a batch; tables add up.

    Args:
        logits: (B, K), on any scale.
        labels: (B,) in 0..K-1.
        num_classes: K.
        bins: M, of equal width in confidence.

    Returns:
        For every class and bin the number of images, of those that are right, and the sum of confidences, (K, M, 3),
        in float64 where the device has it.
    """
    confidence, prediction = logits.float().softmax(1).max(1)
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    place = (confidence.to(dtype) * bins).ceil().long().sub(1).clamp(0, bins - 1)
    rows = torch.stack([torch.ones_like(confidence), prediction == labels, confidence], dim=1).to(dtype)
    table = torch.zeros(num_classes * bins, 3, dtype=dtype, device=logits.device)
    return table.index_add_(0, labels * bins + place, rows).view(num_classes, bins, 3)


def calibration_error(table: np.ndarray) -> float:
    """The expected calibration error, in 0..1; NaN without images.

    Args:
        table: from `bin_table`, of some classes (k, M, 3).
    """
    images, right, confidence = table.sum(0).T
    return float(np.abs(right - confidence).sum() / images.sum()) if images.sum() else math.nan


def calibration_errors(table: np.ndarray, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The error over all images, and over those of each group, (K, M, 3)."""
    members = {"overall": range(len(table)), **groups}
    return {name: calibration_error(table[list(classes)]) for name, classes in members.items()}
