r"""Reversible differentiation (McCallum, Arora & Foster, "Reversible Deep Equilibrium Models", arXiv 2509.12917, 2025).

The exact gradient of the iteration that was run, as of :class:`timm_deq.Unrolled`, but in memory that does not grow
with its steps: of each evaluation $f(p_k)$ nothing is kept. In the backward pass the iteration of
:class:`timm_deq.ReversibleIteration` runs backwards,

$$ p_{k-1} = (p_{k+1} - \beta f(p_k)) / (1-\beta), $$

and each evaluation is repeated, at the iterate found in this way, when its turn comes. The steps between evaluations
are linear, so autograd saves no state for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from timm_deq.bound_cell import lasting
from timm_deq.fixed_point import Map
from timm_deq.gradients.base import BackwardCallback, Gradient, connect_to_graph
from timm_deq.layout import Layout
from timm_deq.solvers.base import Solver, State, is_tracing, where_rows
from timm_deq.solvers.reversible import ReversibleIteration, ReversibleState
from timm_deq.transforms import func_transforms, tangents_enabled


@dataclass(frozen=True)
class Reversible(Gradient):
    """Differentiates through every step of :class:`timm_deq.ReversibleIteration` in constant memory.

    Rounding grows by about 1 / (1 - damping) for every two steps reversed, and faster where f expands: from float64, 30
    steps at 0.8 are well within reach; for more, lower the damping. Programs that are recorded store the steps.
    """

    differentiates_solver: ClassVar[bool] = True
    required_solver: ClassVar[type[Solver]] = ReversibleIteration

    def prepare(self, f: Map, solver: Solver) -> Map:
        assert isinstance(solver, ReversibleIteration)
        if func_transforms() or tangents_enabled():  # none repeats an evaluation as it was: the steps are stored
            return f
        return _ReversedMap(f, solver.damping)

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
        if not isinstance(f, _ReversedMap):
            return connect_to_graph(f, z_star)
        assert isinstance(state, ReversibleState)
        f.end = ReversibleState(*(t.detach() for t in state))
        if not is_tracing(z_star):
            f.again = lasting(f.f)
        return connect_to_graph(f.f, z_star)


class _ReversedMap:
    """f, which is evaluated again in the backward pass, last iterate first, at iterates found by going back."""

    def __init__(self, f: Map, damping: float) -> None:
        self.f, self.damping = f, damping
        self.again = f  # as it lasts; known when the solve is over
        self.calls = 0
        self.start = torch.empty(0)
        self.end: ReversibleState | None = None  # where each sample's iteration ended; known when the solve is over
        self.number = -1  # of the present iterate below, `(B, D)`, stored with the one after it
        self.present = self.following = torch.empty(0)

    def __call__(self, z: Tensor) -> Tensor:
        if is_tracing(z):
            return self.f(z)
        number, tracked = self.calls, z.requires_grad
        self.calls = number + 1
        if number == 0:
            self.start = z.detach()
        first = [z]  # taken out by the first evaluation, so that nothing holds the iterate afterwards

        def evaluate() -> Tensor:
            return self.f(first.pop()) if first else self._again(number, tracked)

        with set_checkpoint_early_stop(False):  # the whole evaluation is wanted: it leads to the iterate before
            fz = checkpoint(evaluate, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(fz, Tensor)
        return fz

    def _again(self, number: int, tracked: bool) -> Tensor:
        """Repeat the evaluation of a given number; afterwards `present` is the iterate before it."""
        assert self.end is not None
        if self.number < number:  # a backward pass begins; the last evaluation of a solve led to no iterate
            self.number = self.calls - 2
            self.present = where_rows(self.end.index == self.calls - 1, self.end.previous, self.end.last)
            self.following = self.end.last
        while self.number > number:  # these led to no iterate that was any sample's best
            with torch.no_grad():
                self._go_back(self._evaluate(tracked=False))
        fz = self._evaluate(tracked=tracked)
        self._go_back(fz.detach())
        return fz

    def _evaluate(self, *, tracked: bool) -> Tensor:
        # The start is known, and kept: it is most often zero, where rounding would put a ReLU on its other side.
        z = self.start
        if self.number:
            z = Layout.of(z).state(self.present, z.shape).to(z.dtype)
        return self.again(z.detach().clone().requires_grad_(tracked))

    def _go_back(self, fz: Tensor) -> None:
        """Go from the iterate at which f was evaluated to the one before; a sample that ended later waits."""
        assert self.end is not None
        fz = Layout.of(self.start).rows(fz).to(self.following.dtype)
        before = (self.following - self.damping * fz) / (1 - self.damping)
        self.number -= 1
        before = where_rows(self.end.index == self.number + 1, self.end.previous, before)
        self.following, self.present = self.present, where_rows(self.end.index <= self.number, self.end.last, before)
