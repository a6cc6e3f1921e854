r"""Implicit differentiation (Bai, Kolter & Koltun, "Deep Equilibrium Models", NeurIPS 2019, Theorem 1).

At $z^* = f(z^*, \theta)$ with Jacobian $J = \partial f / \partial z$, a cotangent $g$ of $z^*$ pulls back to

$$ \frac{\partial \ell}{\partial \theta} = u^\top \frac{\partial f}{\partial \theta}, \qquad u = J^\top u + g, $$

a fixed point again, found by the same loop. f is evaluated once, on the tape; above it stands an identity whose
backward pass turns $g$ into $u$ by products with $J^\top$ along that one evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from timm_deq.fixed_point import fixed_point
from timm_deq.gradients.base import Gradient, Report
from timm_deq.solvers.anderson import Anderson
from timm_deq.solvers.base import Solver


@dataclass(frozen=True)
class Implicit(Gradient):
    """The exact gradient at the equilibrium, up to the tolerance of the backward solve.

    Where `f` is recorded by `torch.fx`, which knows no autograd, the recorded steps are differentiated instead.

    Args:
        solver: Solves the backward linear system; its tolerance is relative, so the scale of the loss is of no matter.
    """

    solver: Solver = field(default_factory=Anderson)

    def attach(self, f: Callable[[Tensor], Tensor], z_star: Tensor, *, report: Report | None = None) -> Tensor:
        return z_star if isinstance(z_star, fx.Proxy) else self._attach(f, z_star, report)

    @torch.compiler.disable()  # a nested autograd.grad cannot be compiled: one graph break
    def _attach(self, f: Callable[[Tensor], Tensor], z_star: Tensor, report: Report | None) -> Tensor:
        z = z_star.detach().requires_grad_()
        fz = f(z)
        if not fz.requires_grad:  # a constant f: there is nothing to differentiate
            return z_star
        return _ImplicitFunction.apply(fz, z, z_star, self.solver, report)


class _ImplicitFunction(torch.autograd.Function):
    """Forward: the value of `z_star`. Backward: hands `u` to `fz`, for a cotangent `g`."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, z_star: Tensor, solver: Solver, report: Report | None) -> Tensor:
        ctx.save_for_backward(fz, z)
        ctx.solver, ctx.report = solver, report
        return z_star.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the implicit gradient has no second derivative: it would miss how the equilibrium moves. "
                'Use gradient="unrolled", whose derivatives of every order are those of the steps taken.'
            )
        fz, z = ctx.saved_tensors
        (g,) = grads
        # Per sample to unit size, so that no loss scale drives squared norms out of the range of float32.
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        scale = torch.linalg.vector_norm(g.flatten(1), ord=float("inf"), dim=1)
        scale = torch.where(scale > 0, scale, 1).view(-1, *[1] * (g.ndim - 1))
        g = g / scale

        def transposed(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(fz, z, u.to(fz.dtype), retain_graph=True, materialize_grads=True)
            return product.to(u.dtype) + g

        solution = fixed_point(transposed, g, ctx.solver)
        if ctx.report is not None:
            ctx.report(solution)
        return (solution.value * scale).to(fz.dtype), None, None, None, None
