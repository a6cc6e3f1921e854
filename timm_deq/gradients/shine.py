r"""SHINE: the inverse that the forward solve has found is shared with the backward pass (Ramzi et al., ICLR 2022).

Broyden's method leaves $B \approx (J - I)^{-1}$, so the adjoint is at hand without a product with the Jacobian:

$$ u = (I - J^\top)^{-1} g \;\approx\; -B^\top g . $$

It is as good as $B$, which is right along the directions that the solve went since its last restart, not in all: give
Broyden's method a memory of `max_steps`. `refine` steps of Broyden's method on the adjoint system, from this u and with
$B^\top$ as its inverse, mend the rest.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from timm_deq.fixed_point import Map, fixed_point
from timm_deq.gradients.adjoint import AdjointGradient
from timm_deq.layout import Layout
from timm_deq.solution import Solution
from timm_deq.solvers.base import Solver, State, autocast_enabled, check_integer, where_rows
from timm_deq.solvers.broyden import Broyden, BroydenState, apply_inverse


@dataclass(frozen=True)
class Shine(AdjointGradient):
    """SHINE gradient, for :class:`timm_deq.Broyden`.

    Args:
        refine: Broyden steps on the adjoint system that start from the shared inverse, at least 0. With any, one
            product with the Jacobian more measures the last, and each sample's best adjoint is taken.

    Raises:
        ValueError: A setting out of its range.
    """

    required_solver: ClassVar[type[Solver]] = Broyden

    refine: int = 0

    def __post_init__(self) -> None:
        check_integer("refine", self.refine, 0)

    def solve(
        self, system: Map, g: Tensor, start: Tensor | None, state: State | None, *, transposed: bool
    ) -> Solution | Tensor:
        if not isinstance(state, BroydenState):
            raise ValueError(f"state must be Broyden's for the gradient Shine, got {type(state).__name__}")
        us, vs = state.us.to(g.dtype), state.vs.to(g.dtype)
        if transposed:  # the factors change places
            us, vs = vs, us
        if start is None:
            layout = Layout.of(g)
            flat = layout.rows(g)
            with torch.autocast(g.device.type, enabled=False) if autocast_enabled(g) else nullcontext():
                u = -apply_inverse(flat, us, vs)
            start = layout.state(where_rows(torch.linalg.vector_norm(u, dim=1).isfinite(), u, flat), g.shape)
        if self.refine == 0:
            return start
        # A copy, for Broyden's method writes in place and the backward pass may be asked for again.
        seed = state._replace(us=us.clone(), vs=vs.clone(), step=max(state.step, 1))
        solver = _Refinement(memory=us.shape[1], seed=seed)
        return fixed_point(system, start, solver, tol=0, max_steps=self.refine + 1)


@dataclass(frozen=True)
class _Refinement(Broyden):
    """Broyden's method from an inverse that is there already."""

    seed: BroydenState | None = None

    def init(self, z: Tensor) -> BroydenState:
        assert self.seed is not None
        return self.seed._replace(z=z, g=z, bg=z, step=0)

    def update(self, z: Tensor, fz: Tensor, state: BroydenState, active: Tensor) -> tuple[Tensor, BroydenState]:
        if state.step:
            return super().update(z, fz, state, active)
        assert self.seed is not None
        g = fz - z
        bg = apply_inverse(g, state.us, state.vs)
        return z - bg, BroydenState(state.us, state.vs, z, g, bg, self.seed.step)
