"""Metrics for an experiment tracker, through accelerate; metrics.jsonl has them all in any case."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers

from recipes.errors import UserError

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def check_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is not installed, which accelerate would leave out without a word.

    Raises:
        UserError: it is not installed.
    """
    if name is not None and name not in map(str, get_available_trackers()):
        package = " or ".join(PACKAGES[name])
        raise UserError(f"tracker {name!r} needs the package {package}; allowed: none, or after pip install {package}")


def start_tracker(accelerator: Any, name: str | None, folder: Path, settings: Mapping[str, Any], updates: int) -> None:
    """Begin the tracker's record of a run, or go on with it.

    Args:
        accelerator: whose `log` then reaches the tracker.
        name: of the tracker; None for none.
        folder: of the run, whose name the record bears, and which tensorboard and wandb write to.
        settings: of training, shown with the metrics.
        updates: done before, above 0 in a run that goes on: what was logged of later ones counts no more.
    """
    if name is None:
        return
    project = "tensorboard" if name == "tensorboard" else "timm-deq"  # the former is a folder in that of the run
    plain = {
        key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in settings.items()
    }
    begin = {
        "tensorboard": {"purge_step": updates + 1 if updates else None},
        "trackio": {"name": folder.name, "resume": "allow" if updates else "never"},
        "wandb": {"name": folder.name, "dir": str(folder), "resume": "auto"},  # by a file in `dir`, of a run cut short
    }
    accelerator.init_trackers(project, config=plain, init_kwargs={name: begin[name]})


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten the finite numbers of a line of metrics.jsonl by their path, as in 'val/overall'."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[prefix + key] = float(value)
    return found
