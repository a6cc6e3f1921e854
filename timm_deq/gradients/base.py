"""The interface of a gradient: a way to make the answer of a solve differentiable."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from timm_deq.fixed_point import Map
from timm_deq.solution import Solution
from timm_deq.solvers.base import Solver, State
from timm_deq.transforms import func_transforms

BackwardCallback = Callable[[Solution], None]
"""Called with the solution of a backward solve, where there is one."""


class Gradient(ABC):
    """Attaches a derivative to an equilibrium.

    Attributes:
        differentiates_solver: Whether the solve itself must be recorded by autograd.
        attaches_tangent: Whether `attach` propagates tangents too, so that `tangent` is not called.
        required_solver: The solver whose state this gradient uses; None if any will do.
    """

    differentiates_solver: ClassVar[bool] = False
    attaches_tangent: ClassVar[bool] = False
    required_solver: ClassVar[type[Solver] | None] = None

    def check_solver(self, solver: Solver) -> None:
        """Raise ValueError unless the solver is one that this gradient can follow."""
        if self.required_solver is not None and not isinstance(solver, self.required_solver):
            name, needed, got = type(self).__name__, self.required_solver.__name__, type(solver).__name__
            raise ValueError(f"solver must be {needed} for the gradient {name}, got {got}")

    def prepare(self, f: Map, solver: Solver) -> Map:
        """Return f as the solve is to evaluate it; `attach` receives the result."""
        return f

    @abstractmethod
    def attach(
        self,
        f: Map,
        z_star: Tensor,
        *,
        state: State | None = None,
        start: Tensor | None = None,
        report: BackwardCallback | None = None,
        inputs: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return a tensor with the value of `z_star` that is differentiable in what f depends on.

        Args:
            f: The map, recorded by autograd when called.
            z_star: The equilibrium, `(B, ...)`; detached, unless `differentiates_solver`.
            state: The solver's last state, for a gradient with a `required_solver`.
            start: Where the backward solve starts, `(B, ...)`, for a gradient that has one.
            report: Called with the solution of the backward solve, where there is one.
            inputs: All tensors that f depends on, for a gradient whose second derivative needs them.
        """

    def tangent(self, f: Map, z_star: Tensor, *, state: State | None = None) -> Tensor | None:
        """Return the forward-mode derivative of `z_star`, with forward mode enabled; None if f has no tangent.

        Args:
            f: The map, of dual tensors.
            z_star: The equilibrium, `(B, ...)`, without a tangent.
            state: As of `attach`.

        Raises:
            RuntimeError: The gradient has none. One that differentiates the solver needs none: its steps have it.
        """
        name = type(self).__name__
        raise RuntimeError(
            f"the gradient {name} has no forward mode: define its `tangent`, or use the gradient Implicit"
        )


def with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """Return `value` with the derivatives of `source`, both `(B, ...)`."""
    if isinstance(source, fx.Proxy):  # fx records no autograd function
        return source
    # The compiler takes no function with a `jvp` of its own.
    function = _WithGradientOf if torch.compiler.is_compiling() else _WithDerivativesOf
    return function.apply(source, value)


def connect_to_graph(f: Map, z_star: Tensor) -> Tensor:
    """Connect a recorded `z_star` to what f depends on, even if no step of f led to it.

    Its derivative is then zero, but known: a rank without any would keep the others waiting. The result is a new
    tensor, because hooks that change an output in place, as FSDP's do, must not reach the recorded solve.
    """
    if isinstance(z_star, fx.Proxy) or z_star.requires_grad or func_transforms():
        return z_star.clone()
    return with_gradient_of(z_star, 0 * f(z_star))


class _WithGradientOf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(source: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype, ctx.value_dtype = inputs[0].dtype, output.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class _WithDerivativesOf(_WithGradientOf):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].to(ctx.value_dtype)
