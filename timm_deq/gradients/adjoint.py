r"""The common part of the gradients that find the adjoint $u = (I - J^\top)^{-1} g$ of a cotangent $g$.

f is evaluated once at the equilibrium, recorded by autograd. An identity is applied to the result, whose backward pass
replaces $g$ by $u$; f's own backward pass then takes $u$ to the parameters.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, fx

from timm_deq.fixed_point import Map
from timm_deq.gradients.base import BackwardCallback, Gradient
from timm_deq.jacobian import TransposedJacobian
from timm_deq.solution import Solution
from timm_deq.solvers.base import State


class AdjointGradient(Gradient):
    """Base of the gradients that differ only in how they solve the adjoint system.

    Where f is recorded by `torch.fx`, which knows no autograd, the recorded steps are differentiated instead.
    """

    @abstractmethod
    def solve(self, adjoint: Map, g: Tensor, start: Tensor | None, state: State | None) -> Solution | Tensor:
        """Returns the adjoint u, or the solution that holds it.

        Args:
            adjoint: `u -> J^T u + g`, whose fixed point is u.
            g: The cotangent, `(B, ...)`, in float32 or better, scaled to at most one per sample.
            start: A first guess, in the same scale.
            state: The last state of the forward solver.
        """

    def attach(
        self,
        f: Map,
        z_star: Tensor,
        *,
        state: State | None = None,
        start: Tensor | None = None,
        report: BackwardCallback | None = None,
    ) -> Tensor:
        return z_star if isinstance(z_star, fx.Proxy) else self._attach(f, z_star, state, start, report)

    @torch.compiler.disable()  # a nested autograd.grad cannot be compiled: one graph break
    def _attach(
        self, f: Map, z_star: Tensor, state: State | None, start: Tensor | None, report: BackwardCallback | None
    ) -> Tensor:
        transposed = TransposedJacobian.at(f, z_star)
        if transposed.is_zero:  # a constant f: there is nothing to differentiate
            return z_star

        def solve(adjoint: Map, g: Tensor, scale: Tensor) -> Tensor:
            solution = self.solve(adjoint, g, _usable_start(start, g, scale), state)
            if isinstance(solution, Tensor):
                return solution * scale
            u = solution.value * scale
            if report is not None:
                report(solution._replace(value=u))
            return u

        return _Adjoint.apply(transposed.fz, transposed.z, z_star, solve)


def _usable_start(start: Tensor | None, g: Tensor, scale: Tensor) -> Tensor | None:
    """A first guess in the scale of `g`, or `g` itself in samples where either is not finite; None if it is no guess.

    So a cotangent that is not finite reaches the parameters, and a guess that one has left behind does no harm.
    """
    if start is None or start.shape != g.shape or start.device != g.device:
        return None
    start = start.detach().to(g.dtype) / scale
    finite = (start + g).flatten(1).isfinite().all(dim=1)
    return torch.where(finite.view(scale.shape), start, g)


class _Adjoint(torch.autograd.Function):
    """Forward: the value of `z_star`. Backward: hands `u` to `fz`, for a cotangent `g`."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, z_star: Tensor, solve: Any) -> Tensor:
        ctx.save_for_backward(fz, z)
        ctx.solve = solve
        return z_star.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the gradient of an equilibrium by its adjoint has no second derivative: it would miss how the "
                'equilibrium moves. Use gradient="unrolled", whose derivatives of every order are those of the steps '
                "taken."
            )
        fz, z = ctx.saved_tensors
        transposed = TransposedJacobian(z, fz)
        (g,) = grads
        # Per sample to unit size, so that no loss scale drives squared norms out of the range of float32.
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        scale = torch.linalg.vector_norm(g.flatten(1), ord=float("inf"), dim=1)
        scale = torch.where(scale > 0, scale, 1).view(-1, *[1] * (g.ndim - 1))
        g = g / scale

        def adjoint(u: Tensor) -> Tensor:
            return transposed(u).to(u.dtype) + g

        return ctx.solve(adjoint, g, scale).to(fz.dtype), None, None, None
