"""Metrics on their way to an experiment tracker, through accelerate; metrics.jsonl has them all in any case."""

import json
import math
from collections.abc import Mapping
from typing import Any

from accelerate.tracking import get_available_trackers

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def check_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is not installed, which accelerate would leave out without a word.

    Raises:
        ValueError: it is not installed.
    """
    if name is not None and name not in map(str, get_available_trackers()):
        package = " or ".join(PACKAGES[name])
        raise ValueError(f"tracker {name!r} needs the package {package}; allowed: none, or after pip install {package}")


def start_tracker(accelerator: Any, name: str | None, run: str, settings: Mapping[str, Any]) -> None:
    """Begin a run of the tracker, named `run`, with the settings of training beside it."""
    if name is None:
        return
    project = "tensorboard" if name == "tensorboard" else "timm-deq"  # the former is a folder in that of the run
    plain = {
        key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in settings.items()
    }
    accelerator.init_trackers(project, config=plain, init_kwargs={key: {"name": run} for key in ("trackio", "wandb")})


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl by their path, as in 'val/overall'."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[prefix + key] = float(value)
    return found
