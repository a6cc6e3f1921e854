"""Run summary and environment."""

import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from recipes.settings.config import TrainConfig
from recipes.training.manifest import Manifest


def run_title(config: TrainConfig, manifest: Manifest) -> str:
    """Name the model and the data set, for the head of a figure."""
    values = manifest.parameters
    setting = [] if manifest.profile == "two_group" else [manifest.profile]
    if manifest.profile == "two_group":
        setting.append(f"K_A = {len(manifest.groups.get('majority', ()))}")
    if "ratio" in values:
        setting.append(f"R = {values['ratio']:g}")
    return f"{config.model} on {config.dataset} ({', '.join(setting)})"


def summary(results: Mapping[str, Any], folder: Path) -> str:
    """Format the last four lines that a run prints, with `-` for an absent number, such as NC1 where all means are the
    same.

    Args:
        results: content of results.json.
    """
    collapse, solver = results["collapse"], results["solver"]
    keys = {"NC1": "nc1", "NC2": "nc2_etf", "NC3": "nc3", "NC4": "nc4"}

    def listed(values: Mapping[str, float | None], form: str) -> str:
        return "   ".join(f"{name} {'-' if value is None else format(value, form)}" for name, value in values.items())

    solved = f"{solver['mean_steps']:.2f} per image, {solver['converged']:.1%} converged" if solver else "-"
    return (
        f"test accuracy    {listed(results['test'], '.2%')}\n"
        f"neural collapse  {listed({name: collapse[key] for name, key in keys.items()}, '.4g')}\n"
        f"evaluations      {solved}\n"
        f"run folder       {folder}"
    )


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return the conditions under which numbers and times were measured."""
    return {
        "device": str(accelerator.device),
        "ranks": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "accelerate", "datasets")},
    }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held on its device, or on the CPU where the device keeps no count."""
    module = torch.get_device_module(device)
    if device.type != "cpu" and hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        usage: Any = psutil.Process().memory_info()
        return usage.peak_wset
    import resource  # which Windows lacks

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
