"""What a run has come to, in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.config import TrainConfig


def run_title(config: TrainConfig, groups: Mapping[str, Any]) -> str:
    """What was trained on what, for the head of a figure."""
    setting = f"K_A = {len(groups['majority'])}, R = {config.ratio:g}" if groups else "balanced"
    return f"{config.model} on {config.dataset} ({setting})"


def summary(results: Mapping[str, Any], folder: Path) -> str:
    """The last four lines that a run prints, from the content of results.json."""
    collapse, solver = results["collapse"], results["solver"]
    keys = {"NC1": "nc1", "NC2": "nc2_etf", "NC3": "nc3", "NC4": "nc4"}
    solved = f"{solver['mean_steps']:.2f} per image, {solver['converged']:.1%} converged" if solver else "-"
    return (
        f"test accuracy    {'   '.join(f'{name} {value:.2%}' for name, value in results['test'].items())}\n"
        f"neural collapse  {'   '.join(f'{name} {collapse[key]:.4g}' for name, key in keys.items())}\n"
        f"evaluations      {solved}\n"
        f"run folder       {folder}"
    )
