"""Stub solvers and maps, which test the loop alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from timm_deq.solvers import Solver


@dataclass(frozen=True)
class Scripted(Solver):
    """Proposes given iterates, whatever f says: sample i goes to `points[i]`, one entry per step."""

    points: tuple[tuple[float, ...], ...] = ()

    def init(self, z: Tensor) -> int:
        return 0

    def update(self, z: Tensor, fz: Tensor, state: int) -> tuple[Tensor, int]:
        column = torch.tensor([sample[min(state, len(sample) - 1)] for sample in self.points], dtype=z.dtype)
        return column.unsqueeze(1).expand_as(z).clone(), state + 1


class Counted:
    """A map that counts its calls and keeps what it was called with."""

    def __init__(self, f) -> None:
        self.f, self.inputs = f, []

    def __call__(self, z: Tensor) -> Tensor:
        self.inputs.append(z.detach().clone())
        return self.f(z)
