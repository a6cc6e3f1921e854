"""The equilibrium layer: a cell, a solver that finds its fixed point, a gradient that differentiates it."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from timm_deq.fixed_point import fixed_point
from timm_deq.gradients.base import Gradient
from timm_deq.gradients.implicit import Implicit
from timm_deq.solution import Solution
from timm_deq.solvers.anderson import Anderson
from timm_deq.solvers.base import Solver, autocasts

SolutionHook = Callable[["Equilibrium", str, Solution, list[Tensor]], None]
"""Called with the layer, "forward" or "backward", the solution, and the residuals `(B,)` after each evaluation."""


class Equilibrium(nn.Module):
    """`z* = cell(z*, x)`, found by `solver` and differentiated by `gradient`.

    The output has the value of the equilibrium itself in training and in evaluation alike.

    Args:
        cell: A module called as `cell(z, x)` that returns the shape of z, treats samples independently, and is one
            deterministic function for the length of a solve (so: no batch statistics). It may define
            `initial_state(x)`; otherwise the solve starts from zeros of the shape of x. Parametrised weights
            (`torch.nn.utils.parametrize`) are computed once per solve.
        solver: Finds the equilibrium.
        gradient: Differentiates it.
    """

    def __init__(self, cell: nn.Module, *, solver: Solver | None = None, gradient: Gradient | None = None) -> None:
        super().__init__()
        self.cell = cell
        self.solver = Anderson() if solver is None else solver
        self.gradient = Implicit(self.solver) if gradient is None else gradient
        self._solution_hooks: OrderedDict[int, SolutionHook] = OrderedDict()

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """Solves for the equilibrium.

        Args:
            x: The input injected into the cell, `(B, ...)`.
            z0: Where to start; the cell's initial state by default.

        Returns:
            The equilibrium, of the shape and dtype of the initial state.
        """
        if z0 is None:
            z0 = self.initial_state(x)
        f = partial(self.cell, x=x)
        trace = [] if self._solution_hooks else None
        differentiable = torch.is_grad_enabled() and self._requires_grad(x)
        with torch.set_grad_enabled(differentiable and self.gradient.records_solve), self._cached_weights():
            solution = fixed_point(f, z0, self.solver, trace=trace)
        if trace is not None:
            self._report("forward", solution, trace)
        z_star = solution.value.to(z0.dtype)
        if not differentiable:
            return z_star
        with self._cached_weights():  # anew: weights computed off the tape have no derivative
            return self.gradient.attach(f, z_star, report=self._report_backward if self._solution_hooks else None)

    def initial_state(self, x: Tensor) -> Tensor:
        """Where a solve starts by default: the cell's `initial_state(x)` or zeros, in float32 under autocast."""
        initial_state: Callable[[Tensor], Tensor] = getattr(self.cell, "initial_state", torch.zeros_like)
        z0 = initial_state(x)
        return z0.to(torch.promote_types(z0.dtype, torch.float32)) if autocasts(z0) else z0

    def register_solution_hook(self, hook: SolutionHook) -> RemovableHandle:
        """Has `hook` called after each solve; the handle removes it."""
        handle = RemovableHandle(self._solution_hooks)
        self._solution_hooks[handle.id] = hook
        return handle

    def _report(self, phase: str, solution: Solution, trace: list[Tensor]) -> None:
        for hook in tuple(self._solution_hooks.values()):
            hook(self, phase, solution, trace)

    def _report_backward(self, solution: Solution) -> None:
        self._report("backward", solution, [])

    def _requires_grad(self, x: Tensor) -> bool:
        """Whether anything that the cell depends on wants a gradient: a frozen model is to leave no tape."""
        weights = any(p.requires_grad for p in self.cell.parameters())
        return weights or isinstance(x, torch.fx.Proxy) or x.requires_grad

    def _cached_weights(self) -> AbstractContextManager:
        parametrized = any(parametrize.is_parametrized(m) for m in self.cell.modules())
        return parametrize.cached() if parametrized else nullcontext()

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript, which knows no solver objects, is given the recorded steps of the solve."""
        return torch.fx.symbolic_trace(nn.Sequential(self))  # as a child, so that z0 keeps its default

    def extra_repr(self) -> str:
        return f"solver={self.solver}, gradient={self.gradient}"
