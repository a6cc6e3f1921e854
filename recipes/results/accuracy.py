"""A pass over images: how many are classified rightly, overall, by group and by class, and what the solver did."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nc_probe import NCProbe
from recipes.errors import user_errors
from recipes.results.calibration import BINS, bin_table
from timm_deq import NonFiniteInputError, SolveLog


def sum_over_ranks(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Sum the tensors of all ranks, on every rank."""
    total = accelerator.reduce(value, "sum")
    assert isinstance(total, Tensor)
    return total


class Evaluation(NamedTuple):
    """Result of a pass over images: counts [class, prediction] (K, K), means over images of what the solver did
    (empty for an explicit model), and the table of `recipes.results.calibration`, all over all ranks; and the log of
    this rank's solves."""

    confusion: np.ndarray
    solver: dict[str, float]
    log: SolveLog
    bins: np.ndarray


@torch.no_grad()
def evaluate(
    net: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    num_classes: int,
    probe: NCProbe | None = None,
    *,
    adjust: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Pass over the images of all ranks in evaluation mode, with the probe attached if one is given, and logits
    corrected by `adjust` if it is given.

    Raises:
        UserError: activations that are not finite, as those of broken weights are.
    """
    net.eval()
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=accelerator.device)
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # which MPS lacks
    bins = torch.zeros(num_classes, BINS, 3, dtype=dtype, device=accelerator.device)
    with SolveLog(net) as log, probe or nullcontext():
        for images, labels in loader:
            with accelerator.autocast(), user_errors(NonFiniteInputError):
                logits = net(images.to(accelerator.device, non_blocking=True))
            if adjust is not None:
                logits = adjust(logits)
            if probe is not None:
                with user_errors():
                    probe.update(labels)
            labels = labels.to(accelerator.device, non_blocking=True)
            confusion += torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes**2)
            bins += bin_table(logits, labels, num_classes)
    confusion = sum_over_ranks(accelerator, confusion).view(num_classes, num_classes).cpu().numpy()
    keys = ("mean_steps", "mean_evaluations", "mean_residual", "converged", "nonfinite")
    summary = log.summary()
    means = [1.0, *(summary.get(key, 0.0) for key in keys)]
    mine = torch.tensor(means, dtype=dtype, device=accelerator.device) * summary.get("samples", 0)
    samples, *sums = sum_over_ranks(accelerator, mine).tolist()
    solver = {key: value / samples for key, value in zip(keys, sums, strict=True)} if samples else {}
    return Evaluation(confusion, solver, log, sum_over_ranks(accelerator, bins).cpu().numpy())


def recalls(confusion: np.ndarray) -> np.ndarray:
    """Accuracy of each class, (K,); NaN for a class without images."""
    total = confusion.sum(1)
    return np.divide(np.diag(confusion), total, out=np.full(len(total), np.nan), where=total > 0)


def accuracies(confusion: np.ndarray, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Accuracy over all images, and over those of each group; NaN for a group without images."""
    correct, total = np.diag(confusion), confusion.sum(1)
    members = {"overall": range(len(confusion)), **groups}
    return {
        name: float(correct[list(classes)].sum() / images) if (images := total[list(classes)].sum()) else math.nan
        for name, classes in members.items()
    }
