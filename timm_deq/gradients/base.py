"""What a gradient is: a way to make the answer of a solve differentiable."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from timm_deq.solution import Solution

Report = Callable[[Solution], None]
"""Told the solution of a backward solve, when there is one."""


class Gradient(ABC):
    """Attaches a derivative to an equilibrium.

    Attributes:
        records_solve: Whether the solve itself must run on the tape.
    """

    records_solve: ClassVar[bool] = False

    @abstractmethod
    def attach(self, f: Callable[[Tensor], Tensor], z_star: Tensor, *, report: Report | None = None) -> Tensor:
        """A tensor with the value of `z_star` that is differentiable in what f depends on.

        Args:
            f: The map, recorded on the tape when called.
            z_star: The equilibrium, `(B, ...)`; detached, unless `records_solve`.
            report: Told the solution of the backward solve, when there is one.
        """


def same_value(z_star: Tensor, tracked: Tensor) -> Tensor:
    """The value of `z_star` with the derivatives of `tracked`, both `(B, ...)`."""
    if isinstance(tracked, fx.Proxy):  # fx records no autograd function
        return tracked
    return _SameValue.apply(tracked, z_star)


class _SameValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tracked: Tensor, z_star: Tensor) -> Tensor:
        ctx.dtype = tracked.dtype
        return z_star.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None
