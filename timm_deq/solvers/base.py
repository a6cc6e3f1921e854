"""What a solver is: an update rule, told `f(z)`, that says where to evaluate f next.

A solver never calls f, measures nothing and decides nothing about stopping; `fixed_point` does. So a solver is a few
lines of algebra on flat states `(B, D)`, one system per row, and rows never mix.
"""

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, fx

State = Any
"""What a solver carries from step to step: a tuple of tensors, or nothing."""


def check_at_least(name: str, value: float, least: float, *, strictly: bool = False) -> None:
    """Raises ValueError, naming the argument, unless `value` is at least (or above) `least`."""
    if not (value > least if strictly else value >= least):  # written so that NaN fails
        raise ValueError(f"{name} must be {'above' if strictly else 'at least'} {least}, got {value!r}")


@dataclass(frozen=True)
class Solver(ABC):
    """Settings common to all solvers.

    Args:
        tol: Relative residual `||f(z) - z|| / ||f(z)||` at which a sample has converged, above 0.
        max_steps: Most evaluations of f, at least 1.
        check_every: Evaluations between two questions to the device whether every sample has finished, at least 1. An
            answer costs an accelerator a synchronisation; a late one costs evaluations whose results are thrown away.
            None asks after each evaluation on a CPU and after every fourth elsewhere. The numbers do not depend on it.

    Raises:
        ValueError: A setting out of its range.
    """

    tol: float = 1e-3
    max_steps: int = 20
    _: KW_ONLY
    check_every: int | None = None

    def __post_init__(self) -> None:
        check_at_least("tol", self.tol, 0, strictly=True)
        check_at_least("max_steps", self.max_steps, 1)
        if self.check_every is not None:
            check_at_least("check_every", self.check_every, 1)

    @abstractmethod
    def init(self, z: Tensor) -> State:
        """The state before the first update, for an initial iterate `(B, D)`."""

    @abstractmethod
    def update(self, z: Tensor, fz: Tensor, state: State) -> tuple[Tensor, State]:
        """The next iterate `(B, D)` and the next state, from `z` and `fz = f(z)`, both `(B, D)`."""


def is_static(z: Tensor) -> bool:
    """Whether the program is being recorded, or runs on shapes alone, so that no value may be asked for."""
    return (
        isinstance(z, fx.Proxy)
        or torch.compiler.is_compiling()  # torch.compile and torch.export
        or torch.jit.is_tracing()
        or z.is_meta
    )


def autocasts(z: Tensor) -> bool:
    """Whether matrix products with `z` would be run in lower precision."""
    return not isinstance(z, fx.Proxy) and not z.is_meta and torch.is_autocast_enabled(z.device.type)


def write(history: Tensor, slot: int, row: Tensor) -> Tensor:
    """`history` `(B, m, D)` with `row` `(B, D)` at `slot`: in place where nobody could notice.

    Autograd may have saved the old history, and `fx` records no assignment; there it is copied.
    """
    if isinstance(history, fx.Proxy) or torch.is_grad_enabled():
        return torch.cat([history[:, :slot], row.unsqueeze(1), history[:, slot + 1 :]], dim=1)
    history[:, slot] = row
    return history
