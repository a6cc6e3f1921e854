"""What a gradient is: a way to make the answer of a solve differentiable."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from timm_deq.fixed_point import Map
from timm_deq.solution import Solution
from timm_deq.solvers.base import Solver, State

Report = Callable[[Solution], None]
"""Told the solution of a backward solve, when there is one."""


class Gradient(ABC):
    """Attaches a derivative to an equilibrium.

    Attributes:
        records_solve: Whether the solve itself must run on the tape.
        needs: The solver whose state this gradient uses; None if any will do.
    """

    records_solve: ClassVar[bool] = False
    needs: ClassVar[type[Solver] | None] = None

    def check_solver(self, solver: Solver) -> None:
        """Raises ValueError unless the solver is one that this gradient can follow."""
        if self.needs is not None and not isinstance(solver, self.needs):
            name, needed, got = type(self).__name__, self.needs.__name__, type(solver).__name__
            raise ValueError(f"solver must be {needed} for the gradient {name}, got {got}")

    def prepare(self, f: Map, solver: Solver) -> Map:
        """f as the solve is to evaluate it, and as `attach` will be given it."""
        return f

    @abstractmethod
    def attach(
        self,
        f: Map,
        z_star: Tensor,
        *,
        state: State | None = None,
        start: Tensor | None = None,
        report: Report | None = None,
    ) -> Tensor:
        """A tensor with the value of `z_star` that is differentiable in what f depends on.

        Args:
            f: The map, recorded on the tape when called.
            z_star: The equilibrium, `(B, ...)`; detached, unless `records_solve`.
            state: What the solver knew at the end, for a gradient that `needs` it.
            start: Where the backward solve starts, `(B, ...)`, for a gradient that has one.
            report: Told the solution of the backward solve, when there is one.
        """


def same_value(z_star: Tensor, tracked: Tensor) -> Tensor:
    """The value of `z_star` with the derivatives of `tracked`, both `(B, ...)`."""
    if isinstance(tracked, fx.Proxy):  # fx records no autograd function
        return tracked
    return _SameValue.apply(tracked, z_star)


def on_the_tape(f: Map, z_star: Tensor) -> Tensor:
    """A recorded `z_star`, connected with what f depends on even if no step of f led to it.

    Its derivative is then zero, but known: a rank without any would keep the others waiting. A tensor of its own,
    because hooks that change an output in place, as FSDP's do, may not reach the tape of the solve.
    """
    if isinstance(z_star, fx.Proxy) or z_star.requires_grad:
        return z_star.clone()
    return same_value(z_star, 0 * f(z_star))


class _SameValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tracked: Tensor, z_star: Tensor) -> Tensor:
        ctx.dtype = tracked.dtype
        return z_star.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None
