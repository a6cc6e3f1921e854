r"""Implicit differentiation (Bai, Kolter & Koltun, "Deep Equilibrium Models", NeurIPS 2019, Theorem 1).

At $z^* = f(z^*, \theta)$ with Jacobian $J = \partial f / \partial z$, a cotangent $g$ of $z^*$ pulls back to

$$ \frac{\partial \ell}{\partial \theta} = u^\top \frac{\partial f}{\partial \theta}, \qquad u = J^\top u + g, $$

a fixed point again, found by the same loop with products with $J^\top$ along one recorded evaluation of f.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from timm_deq.fixed_point import Map, fixed_point
from timm_deq.gradients.adjoint import AdjointGradient
from timm_deq.solution import Solution
from timm_deq.solvers.anderson import Anderson
from timm_deq.solvers.base import Solver, State


@dataclass(frozen=True)
class Implicit(AdjointGradient):
    """The exact gradient at the equilibrium, up to the tolerance of the backward solve.

    Args:
        solver: Solves the backward linear system, within its budget; its tolerance is relative, so the scale of the
            loss is of no matter.
    """

    twice_differentiable: ClassVar[bool] = True

    solver: Solver = field(default_factory=Anderson)

    def solve(self, system: Map, g: Tensor, start: Tensor | None, state: State | None, *, transposed: bool) -> Solution:
        return fixed_point(system, g if start is None else start, self.solver)
