"""A hook at the end of an epoch, for loops such as that of timm's train.py."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from nc_probe.loops.model import measure_model
from nc_probe.moments.ranks import is_distributed
from nc_probe.report import CollapseReport

__all__ = ["EpochHook"]


class EpochHook:
    """Measure a model at the end of epochs, and keep the reports.

    >>> import torch
    >>> from nc_probe.integrations.epochs import EpochHook
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> hook = EpochHook(model, [(torch.randn(6, 1, 2, 2), torch.arange(6) % 3)], every=2)
    >>> for epoch in range(4):
    ...     report = hook(epoch)  # after train_one_epoch(...), on every rank
    >>> list(hook.reports)
    [1, 3]

    Args:
        model: to measure; an average of its weights is another model.
        loader: the training images as they are, neither resampled nor augmented.
        every: measure every so many epochs, which are counted from 0: the last of 10, if it is 10.
        path: a file to which each measurement is added as a line of JSON, for `nc_probe.plots.plot_history`.
        log: called with `report.scalars("nc/")` and the epoch on the first rank, e.g.
            `lambda numbers, epoch: wandb.log(numbers, step=epoch)`.
        settings: of `measure_model` and `NCProbe`.

    Attributes:
        reports: by epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        every: int = 1,
        path: str | Path | None = None,
        log: Callable[[Mapping[str, float], int], Any] | None = None,
        **settings: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.model, self.loader, self.every, self.path, self.log = model, loader, every, path, log
        self.settings = settings
        self.reports: dict[int, CollapseReport] = {}

    def __call__(self, epoch: int) -> CollapseReport | None:
        """Measure at the end of an epoch; None if it is not one of those. Every rank must call it."""
        if (epoch + 1) % self.every:
            return None
        report = self.reports[epoch] = measure_model(self.model, self.loader, **self.settings)
        if not is_distributed() or dist.get_rank() == 0:
            if self.path is not None:
                with Path(self.path).open("a") as file:
                    file.write(json.dumps({"epoch": epoch, "collapse": report.as_dict()}, allow_nan=False) + "\n")
            if self.log is not None:
                self.log(report.scalars("nc/"), epoch)
        return report
