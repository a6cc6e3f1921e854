"""Stub solvers and maps, which test the loop alone."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from timm_deq.solvers import Solver


class Step(NamedTuple):
    number: int


@dataclass(frozen=True)
class Scripted(Solver):
    """Proposes given iterates, whatever f says: sample i goes to `points[i]`, one entry per step."""

    points: tuple[tuple[float, ...], ...] = ()

    def init(self, z: Tensor) -> Step:
        return Step(0)

    def update(self, z: Tensor, fz: Tensor, state: Step, active: Tensor) -> tuple[Tensor, Step]:
        column = torch.tensor([sample[min(state.number, len(sample) - 1)] for sample in self.points], dtype=z.dtype)
        return column.unsqueeze(1).expand_as(z).clone(), Step(state.number + 1)


class Counted:
    """A map that counts its calls and keeps what it was called with."""

    def __init__(self, f) -> None:
        self.f, self.inputs = f, []

    def __call__(self, z: Tensor) -> Tensor:
        self.inputs.append(z.detach().clone())
        return self.f(z)
