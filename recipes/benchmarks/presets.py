"""Foretell what each preset and each grid costs: from images and epochs, and a few updates of models on random pixels.

Every solve is made to take all of its steps, so what is told is the most that a run takes. A model that is fast to
solve takes less: digits converge after 16 of 20 evaluations. The input pipeline is left out; `pipeline` measures it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from recipes.benchmarks.pipeline import training_step
from recipes.benchmarks.tables import Row
from recipes.settings.config import TrainConfig, parse
from recipes.settings.grid import PRESETS as GRID_FOLDER
from recipes.settings.grid import Cell, read_grid
from recipes.training.checkpoint import create_model
from recipes.training.manifest import build_manifest
from timm_deq import Equilibrium, Implicit

PRESETS = sorted((Path(__file__).parents[1] / "presets").glob("*.yaml"))

GRIDS = sorted(GRID_FOLDER.glob("*.yaml"))

# Classes, images of each in the training split, images of the test split.
DATA = {
    "digits": (10, 120, 596),
    "uoft-cs/cifar10": (10, 5000, 10_000),
    "uoft-cs/cifar100": (100, 500, 10_000),
    "imagenet": (1000, 1300, 50_000),  # 1300 of most classes, at least 732 of all
}
NEVER = 1e-30  # a tolerance that no solve meets


def preset_rows(
    device: torch.device, rounds: int, *, presets: Sequence[Path] = PRESETS, batch_size: int | None = None
) -> Iterator[Row]:
    """What a run of each preset costs at most.

    Args:
        device: of the model; cuda runs it in bfloat16 as the presets' commands do.
        rounds: updates that are timed, after one that is not.
        presets: YAML files of settings.
        batch_size: images of an update; that of the preset if not given, on the CPU 16 at most.

    Yields:
        A row of: the preset; its images, those of an epoch of training; floating-point operations in 10^9 of one image
        in training (there and back) and in 10^15 of the run, evaluation included; images per second in training; hours.
    """
    for path in presets:
        config = parse(["--output", "-", "--config", str(path)])
        _, trained, tested = count_images(config)
        work, seconds = costs_of_model(config, device, rounds, batch_size)
        yield {
            "preset": path.stem,
            "images": trained // config.epochs,
            "epochs": config.epochs,
            "GFLOP / image": work["train"] / 1e9,
            "PFLOP": (trained * work["train"] + tested * work["evaluate"]) / 1e15,
            "images/s": 1 / seconds["train"],
            "hours": (trained * seconds["train"] + tested * seconds["evaluate"]) / 3600,
        }


def grid_rows(
    device: torch.device, rounds: int, *, grids: Sequence[Path] = GRIDS, batch_size: int | None = None
) -> Iterator[Row]:
    """What all runs of each arm of each grid cost at most, those that choose its learning rate included.

    Args:
        device, rounds, batch_size: as in `preset_rows`.
        grids: YAML files.

    Yields:
        A row of: the grid; the arm; its runs; floating-point operations in 10^9 of one image in training and in 10^15
        of all runs; images per second in training; hours of all runs, one after the other.
    """
    for path in grids:
        grid, _ = read_grid(str(path))
        cells = [*grid.tuning_cells(), *grid.cells()]
        with TemporaryDirectory() as folder:
            for arm in grid.arms:
                configs = [_config_of(cell, Path(folder) / "cell.yaml") for cell in cells if cell.arm == arm]
                counted = [count_images(config) for config in configs]
                work, seconds = costs_of_model(configs[0], device, rounds, batch_size)
                trained, evaluated = (sum(counts[i] for counts in counted) for i in (1, 2))
                yield {
                    "grid": path.stem,
                    "arm": arm,
                    "runs": len(configs),
                    "GFLOP / image": work["train"] / 1e9,
                    "PFLOP": (trained * work["train"] + evaluated * work["evaluate"]) / 1e15,
                    "images/s": 1 / seconds["train"],
                    "hours": (trained * seconds["train"] + evaluated * seconds["evaluate"]) / 3600,
                }


def _config_of(cell: Cell, path: Path) -> TrainConfig:
    path.write_text(yaml.safe_dump(cell.settings))
    return parse(["--output", "-", "--seed", str(cell.seed), "--config", str(path)])


def costs_of_model(
    config: TrainConfig, device: torch.device, rounds: int, batch_size: int | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Operations and seconds of one image, as `costs_of`, of the model of a run whose solves take all their steps."""
    classes, *_ = DATA[config.dataset]
    net = create_model(config, classes).to(device)
    for layer in net.modules():
        if isinstance(layer, Equilibrium):
            layer.solver = replace(layer.solver, tol=NEVER)
            if isinstance(layer.gradient, Implicit):
                layer.gradient = Implicit(replace(layer.gradient.solver, tol=NEVER))
    size = batch_size or (config.batch_size if device.type == "cuda" else min(config.batch_size, 16))
    side = config.img_size or net.pretrained_cfg["input_size"][-1]
    images = torch.randn(size, net.pretrained_cfg["input_size"][0], side, side, device=device)
    return costs_of(net, images, torch.arange(size, device=device) % classes, rounds)


def count_images(config: TrainConfig) -> tuple[int, int, int]:
    """Classes of a run, and how often an image is trained on and is evaluated in all of it."""
    classes, each, tested = DATA[config.dataset]
    manifest = build_manifest(
        np.repeat(np.arange(classes), each),
        tuple(map(str, range(classes))),
        profile=config.profile,
        parameters=config.profile_parameters,
        fingerprint="",
        **config.only("val_fraction", "seed"),
    )
    images, every = len(manifest.indices), config.probe_every
    probes = 1 + (len(range(0, config.epochs, every)) if every else 0)  # the last epoch is always measured
    return classes, images * config.epochs, images * probes + len(manifest.validation) * (config.epochs + 1) + tested


def costs_of(net: nn.Module, images: Tensor, labels: Tensor, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Operations and seconds of one image by what is done with it, "train" or "evaluate"; images (B, C, H, W)."""
    update, mixed = training_step(net), {"dtype": torch.bfloat16, "enabled": images.device.type == "cuda"}

    def train() -> None:
        with torch.autocast(images.device.type, **mixed):
            update(images, labels)

    def evaluate() -> None:
        with torch.no_grad(), torch.autocast(images.device.type, **mixed):
            net(images)

    work, seconds = {}, {}
    for name, run in (("train", train), ("evaluate", evaluate)):
        net.train(name == "train")
        work[name] = operations(run) / len(images)
        seconds[name] = seconds_of(run, rounds, images.device) / len(images)
    return work, seconds


def operations(run: Callable[[], None]) -> int:
    """Floating-point operations of matrix products and convolutions, two for a multiplication and addition."""
    with _Counter() as counter:
        run()
    return counter.total


class _Counter(TorchDispatchMode):
    """`torch.utils.flop_counter.FlopCounterMode`, whose hooks on modules refuse a gradient within a backward pass."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def seconds_of(run: Callable[[], None], rounds: int, device: torch.device) -> float:
    """Mean seconds of a call, after the one that has counted its operations."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(rounds):
        run()
    wait()
    return (time.perf_counter() - started) / rounds
