"""Unrolled differentiation: back-propagation through the steps of the solver (BPTT).

Exact for the truncated iteration that was run, whatever its residual; its memory grows with the steps. The number of
steps is the solver's `max_steps`, so it is no argument here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from timm_deq.fixed_point import Map
from timm_deq.gradients.base import BackwardCallback, Gradient, connect_to_graph
from timm_deq.solvers.base import State


@dataclass(frozen=True)
class Unrolled(Gradient):
    """Differentiates through every update of the solver."""

    differentiates_solver: ClassVar[bool] = True

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
        return connect_to_graph(f, z_star)
