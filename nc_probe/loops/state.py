"""Contexts that leave a model and the random generators as they were."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nc_probe.loops.samplers import samplers

__all__ = ["evaluation_mode", "random_state_kept"]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards each of its modules back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # a parent before its children, which its `train` takes along
            if module.training != training:
                module.train(training)


@contextlib.contextmanager
def random_state_kept(loader: Any, device: torch.device) -> Iterator[None]:
    """Leave the random generators of this process and those of a loader as they were.

    A loader draws a seed whenever it is iterated over: training would go on with other random numbers.
    """
    numpy = sys.modules.get("numpy")
    known = [getattr(x, "generator", None) for x in (loader, *samplers(loader))]
    generators = [(g, g.get_state()) for g in known if isinstance(g, torch.Generator)]
    python, numbers = random.getstate(), numpy.random.get_state() if numpy else None
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(numbers)
            for generator, state in generators:
                generator.set_state(state)
