"""Variational dropout (Gal & Ghahramani, NeurIPS 2016): one mask for the length of a solve.

A mask drawn again at each evaluation would leave nothing to converge to. As in Bai, Koltun & Kolter (NeurIPS 2020), the
mask is drawn per sample and element at the first evaluation, and f keeps it for the solve and for its gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deq.fixed_point import Map
from timm_deq.solvers.base import check_number


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
        self.masks: list[Tensor] | None = None  # those of the present solve, while f is being evaluated
        self.calls = 0  # within one evaluation: the cell may call this module more than once

    def forward(self, z: Tensor) -> Tensor:
        """Return z `(B, ...)` with elements zeroed, and the others scaled by `1 / (1 - p)`."""
        if not self.training or self.p == 0 or self.masks is None:
            return F.dropout(z, self.p, self.training)
        if self.calls == len(self.masks):
            keep = 1 - self.p
            self.masks.append(torch.empty_like(z, requires_grad=False).bernoulli_(keep).div_(keep))
        mask = self.masks[self.calls]
        self.calls += 1
        return z * mask

    def extra_repr(self) -> str:
        return f"p={self.p}"


def one_mask_per_solve(cell: nn.Module, f: Map) -> Map:
    """Let the variational dropouts of f keep the masks of its first evaluation; return f itself if none drops."""
    layers = [m for m in cell.modules() if isinstance(m, VariationalDropout) and m.training and m.p > 0]
    if not layers:
        return f
    masks: list[list[Tensor]] = [[] for _ in layers]

    def masked(z: Tensor) -> Tensor:
        try:
            for layer, own in zip(layers, masks, strict=True):
                layer.masks, layer.calls = own, 0
            return f(z)
        finally:  # nothing of one solve may reach another
            for layer in layers:
                layer.masks = None

    return masked
