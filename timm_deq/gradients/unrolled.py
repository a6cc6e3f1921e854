"""Unrolled differentiation: back-propagation through the steps of the solver (BPTT).

Exact for the truncated iteration that was run, whatever its residual; its memory grows with the steps. The number of
steps is the solver's `max_steps`, so it is no argument here.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from timm_deq.fixed_point import Map
from timm_deq.gradients.base import Gradient, Report, on_the_tape
from timm_deq.solvers.base import State


@dataclass(frozen=True)
class Unrolled(Gradient):
    """Differentiates through every update of the solver."""

    records_solve: ClassVar[bool] = True

    def attach(
        self,
        f: Map,
        z_star: Tensor,
        *,
        state: State | None = None,
        start: Tensor | None = None,
        report: Report | None = None,
    ) -> Tensor:
        return on_the_tape(f, z_star)
