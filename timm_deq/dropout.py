"""Variational dropout (Gal & Ghahramani, NeurIPS 2016): one mask for the length of a solve.

A mask drawn again at each evaluation would leave nothing to converge to. As in Bai, Koltun & Kolter (NeurIPS 2020), the
mask is drawn per sample and element at the first evaluation, and f keeps it for the solve and for its gradient.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deq.fixed_point import Map
from timm_deq.solvers.base import check_number
from timm_deq.transforms import inside_vmap

_PRESENT = threading.local()
"""`layers`: the dropouts of the f that this thread evaluates now, each with its masks."""


class VariationalDropout(nn.Module):
    """Dropout for the inside of a cell; elsewhere it is ordinary dropout.

    Args:
        p: Probability that an element is zeroed, in [0, 1).

    Raises:
        ValueError: p is out of its range.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_number("p", p)
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), got {p!r}")
        self.p = p

    def forward(self, z: Tensor) -> Tensor:
        """Return z `(B, ...)` with elements zeroed, and the others scaled by `1 / (1 - p)`."""
        if not torch.jit.is_scripting():
            for layer, masks in getattr(_PRESENT, "layers", ()):
                if layer is self:
                    return z * masks.next(z, 1 - self.p)
        return F.dropout(z, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Masks:
    """The masks of one dropout in one solve: the cell may call it more than once in an evaluation."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []
        self.calls = 0

    def next(self, z: Tensor, keep: float) -> Tensor:
        """Return the mask of the next call in this evaluation, for z `(B, ...)`; the first evaluation draws it."""
        if self.calls == len(self.drawn):
            if inside_vmap():  # the state may be one for all programs where their masks are not
                mask = torch.full_like(z, keep, requires_grad=False).bernoulli()
            else:
                mask = torch.empty_like(z, requires_grad=False).bernoulli_(keep)
            self.drawn.append(mask.div_(keep))
        self.calls += 1
        return self.drawn[self.calls - 1]


def one_mask_per_solve(cell: nn.Module, f: Map) -> Map:
    """Let the variational dropouts of f keep the masks of its first evaluation; return f itself if none drops."""
    dropping = [m for m in cell.modules() if isinstance(m, VariationalDropout) and m.training and m.p > 0]
    if not dropping:
        return f
    layers = [(layer, _Masks()) for layer in dropping]

    def masked(z: Tensor) -> Tensor:
        outer = getattr(_PRESENT, "layers", ())
        _PRESENT.layers = layers
        for _, masks in layers:
            masks.calls = 0
        try:
            return f(z)
        finally:  # nothing of one solve may reach another
            _PRESENT.layers = outer

    return masked
