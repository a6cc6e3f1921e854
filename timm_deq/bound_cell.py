"""A cell and its input as one map of the state, also in a backward pass, when the cell may be in another state."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_deq.dropout import one_mask_per_solve
from timm_deq.fixed_point import Map
from timm_deq.parametrized import cached_again, present_weights, unparametrized


class BoundCell:
    """`z -> cell(z, x)`. Dropout masks inside the cell are drawn at the first evaluation, and kept."""

    def __init__(self, cell: nn.Module, x: Tensor) -> None:
        self.cell, self.x = cell, x
        self.evaluate = one_mask_per_solve(cell, partial(cell, x=x))

    def __call__(self, z: Tensor) -> Tensor:
        return self.evaluate(z)

    def lasting(self) -> Map:
        """Return the map as it is now, to be evaluated in the backward pass.

        By then `functional_call` has given the cell its own parameters back, autocast is over, and the model may have
        been put in another mode: all that is as now for the length of an evaluation. What was changed in place is gone.

        Raises:
            RuntimeError: In an evaluation: the input or a parameter was changed in place, as autograd has it too.
        """
        modules = [_ModuleState.of(module) for module in self.cell.modules()]
        weights = present_weights(self.cell)
        autocast = _present_autocast(self.x.device.type)
        named = [("x", self.x), *((f"cell.{name}", p) for name, p in unparametrized(self.cell))]
        versions = [(name, t, t._version) for name, t in named if not t.is_inference()]

        def evaluate(z: Tensor) -> Tensor:
            for name, tensor, version in versions:
                if tensor._version != version:
                    raise RuntimeError(
                        f"{name} must not be changed in place between a solve and its backward pass, which evaluates"
                        " the cell again: back-propagate first, or change a copy"
                    )
            with _in_state(modules), autocast(), cached_again(weights):
                return self(z)

        return evaluate


def lasting(f: Map) -> Map:
    """Return a map as it is now, to be evaluated in the backward pass."""
    return f.lasting() if isinstance(f, BoundCell) else f


class _ModuleState(NamedTuple):
    """What a module computes with, but its hooks, and integers, as it may count its calls."""

    module: nn.Module
    training: bool
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    numbers: dict[str, Tensor | float]

    @classmethod
    def of(cls, module: nn.Module) -> "_ModuleState":
        numbers = {name: value for name, value in vars(module).items() if isinstance(value, (Tensor, float))}
        return cls(module, module.training, {**module._parameters}, {**module._buffers}, numbers)

    def holds(self) -> bool:
        """Return whether the module is in this state."""
        present = self.of(self.module)
        if present.training != self.training:
            return False
        return all(
            a.keys() == b.keys() and all(a[name] is b[name] for name in a)
            for a, b in zip(present[2:], self[2:], strict=True)
        )

    def attributes(self) -> dict[str, Any]:
        return {**self.numbers, "training": self.training, "_parameters": self.parameters, "_buffers": self.buffers}


@contextmanager
def _in_state(states: list[_ModuleState]) -> Iterator[None]:
    """Put modules back in the given states; most often they are."""
    present: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for state in states:
            if not state.holds():
                then, now = state.attributes(), vars(state.module)
                present.append((state.module, {name: now[name] for name in then if name in now}))
                now.update(then)
        yield
    finally:
        for module, attributes in present:
            vars(module).update(attributes)


def _present_autocast(device: str) -> partial[AbstractContextManager]:
    if device == "meta":
        return partial(nullcontext)
    enabled = torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), enabled=enabled)
