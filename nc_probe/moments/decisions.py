"""Which class scores highest in float64, found in float32 wherever rounding cannot change the answer.

The score of class k is w_k . x + b_k. A sum of d products with unit roundoff u is off by d u ||w|| ||x|| at most, to
first order and in any order of summation (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, ch. 3);
rounding w, x and b beforehand and adding b adds four u. So a class that leads all others by more than

    2 (d + 4) u (||w|| ||x|| + |b|),    u = 2^-24, with the largest ||w|| and |b|,

leads in exact arithmetic. The few samples where none does, ties among them, are scored again in float64.
"""

import torch
from torch import Tensor

from nc_probe.moments.blocks import block_rows

__all__ = ["Scores"]

# Added to norms, so that what underflows is within the bound. What overflows has an infinite one.
TINY = 2.0**-50


class Scores:
    """Scores of K classes, linear in d features.

    Args:
        weight: (K, d) float64.
        bias: (K,) float64; -inf for a class that is never chosen.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self._rounded = (bias.float()[:, None], weight.float())
        d = weight.shape[1]
        self._unit = 2 * (d + 4) * 2.0**-24 if d <= 2**16 else torch.inf
        # A hundredth more for what is of second order, and for the norm of x in float32.
        self._size = 1.01 * (weight.norm(dim=1).amax() + TINY)
        self._offset = 1.01 * bias[bias.isfinite()].abs().amax()

    def highest(self, x: Tensor) -> Tensor:
        """The class of the highest score, the first of equals: (B,) for features x (B, d) of any precision."""
        # Elsewhere float64 costs less than waiting to hear which samples are undecided; and matrix products of float32
        # may have been allowed fewer bits.
        precision = torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
        find = self._roughly if x.device.type == "cpu" and precision in ("none", "ieee") else self._exactly
        return torch.cat([find(part) for part in x.split(block_rows(x.device, x.shape[1]))])

    def _exactly(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.to(self.weight), self.weight.T).argmax(1)

    def _roughly(self, x: Tensor) -> Tensor:
        rounded = x.float()
        bias, weight = self._rounded
        scores = torch.addmm(bias, weight, rounded.T)
        top, chosen = scores.max(0)
        second = scores.scatter_(0, chosen[None], -torch.inf).amax(0)
        reach = (rounded.norm(dim=1) + TINY) * self._size + self._offset
        undecided = (~(top - second > self._unit * reach)).nonzero()[:, 0]  # NaN is
        if len(undecided):
            chosen[undecided] = self._exactly(x[undecided])
        return chosen
