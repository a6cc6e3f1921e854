"""Which class scores highest in float64, found in float32 wherever rounding cannot change the answer.

The score of class k is w_k . x + b_k. A sum of d products with unit roundoff u is off by d u ||w|| ||x|| at most, to
first order and in any order of summation (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, ch. 3);
rounding w, x and b beforehand and adding b adds four u. So a class that leads all others by more than

    2 (d + 4) u (||w|| ||x|| + |b|),    u = 2^-24, with the largest ||w|| and |b|,

leads in exact arithmetic. Where none does, ties among them, the classes within that of the first are scored again in
float64: most often two for each of a few samples.

Scores that a classifier has just given need no product of their own: it is enough that they are what they should be,
which a random combination of the classes shows (Freivalds 1977), sum_k r_k s_k = (sum_k r_k w_k) . x + sum_k r_k b_k.
With |r_k| >= 1 a single score that was changed by more than the tolerance of this check is found; changed by less, it
is within the lead that is asked for, which is larger by twice the tolerance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nc_probe.moments.blocks import block_rows
from nc_probe.moments.precision import float32_has_all_bits

__all__ = ["Scores", "UNIT"]

# Unit roundoff of float32.
UNIT = 2.0**-24

# Numbers of contenders scored at once: 512 KB.
PAIRS = 2**16

# Numbers of logits copied at once, 1 MB: of tens of thousands of classes those of a batch are many.
COPIED = 2**18

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
        self._rounded: tuple[Tensor, Tensor] | None = None
        self._check: tuple[Tensor, Tensor, float, float, float] | None = None
        d = weight.shape[1]
        self._unit = 2 * (d + 4) * UNIT if d <= 2**16 else torch.inf
        # A hundredth more for what is of second order, and for the norm of x in float32.
        self._size = 1.01 * (weight.norm(dim=1).amax() + TINY)
        finite = bias.isfinite()
        self._offset = 1.01 * bias[finite].abs().amax()
        self._all_finite = bool(finite.all())

    def highest(
        self, x: Tensor, *, error: Tensor | None = None, exact: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Find the class of the highest score, the first of equals: (B,) for features of any precision.

        Args:
            x: (B, d).
            error: (B,) bound on the norm of the error of x itself. Default: it is exact.
            exact: gives x in float64 for indices (n,), where it is not.
        """
        # Elsewhere float64 costs less than waiting to hear which samples are undecided.
        if not float32_has_all_bits(x.device):
            if exact is not None:
                x = exact(torch.arange(len(x), device=x.device))
            return torch.cat([self._exactly(part) for part in x.split(block_rows(x.device, x.shape[1]))])
        chosen = []
        start = 0
        for part in x.split(block_rows(x.device, x.shape[1])):
            scores, lead = self._roughly(part, None if error is None else error[start : start + len(part)])
            chosen.append(self._decide(scores, lead, part.__getitem__ if exact is None else _shifted(exact, start)))
            start += len(part)
        return torch.cat(chosen)

    def sketch(self, x: Tensor) -> Tensor:
        """Return (2, B) float32 of x (B, d): norms, and what a random combination of the scores is, but for the bias.

        In one look at each block, as reading x takes longer than the arithmetic on it.
        """
        image, found = self._checksum()[1], torch.empty(2, len(x), dtype=torch.float32)
        rows = 2 * block_rows(x.device, x.shape[1])
        for part, out in zip(x.split(rows), found.split(rows, 1), strict=True):
            part = part.float()
            torch.linalg.vector_norm(part, dim=1, out=out[0])
            torch.mv(part, image, out=out[1])
        return found

    def highest_of(self, logits: Tensor, x: Tensor, labels: Tensor, sketch: Tensor | None = None) -> Tensor:
        """Find the class of the highest score where the scores have been computed before.

        Args:
            logits: (B, K) that are believed to be the scores of x. Where they are not, they are not used.
            x: (B, d).
            labels: (B,) classes that are likely to be the highest, each asked for first.
            sketch: of x, if known.
        """
        usable = logits.dtype == torch.float32 and x.dtype != torch.float64 and float32_has_all_bits(x.device)
        if not usable or logits.device != x.device or not self._all_finite:
            return self.highest(x)
        norms, combined = self.sketch(x) if sketch is None else sketch
        signs, _, constant, slope, least = self._checksum()
        tolerance = (norms * slope).add_(least)
        known = (logits @ signs).sub_(combined).sub_(constant).abs_() <= tolerance
        lead = 3 * tolerance
        slot, rows = labels[:, None], max(COPIED // logits.shape[1], 16)
        own, parts = logits.gather(1, slot), zip(logits.split(rows), slot.split(rows), strict=True)
        rest = torch.cat([part.scatter(1, mine, -torch.inf).amax(1) for part, mine in parts])
        chosen = labels.clone()
        others = (~(known & (own[:, 0] - rest > lead))).nonzero()[:, 0]  # NaN is
        if len(others):
            unknown, others = others[~known[others]], others[known[others]]
            if len(unknown):
                chosen[unknown] = self.highest(x[unknown])
            for some in others.split(rows):
                chosen[some] = self._decide(logits[some], lead[some], lambda rows, some=some: x[some[rows]])
        return chosen

    def _decide(self, scores: Tensor, lead: Tensor, exact: Callable[[Tensor], Tensor]) -> Tensor:
        """Find the highest of scores (n, K) in float32, which are overwritten.

        Args:
            scores: of which any two are off by `lead` together, or less.
            lead: (n,).
            exact: gives x (m, d) for indices (m,).
        """
        top, chosen = scores.max(1)
        second = scores.scatter_(1, chosen[:, None], -torch.inf).amax(1)
        undecided = (~(top - second > lead)).nonzero()[:, 0]  # NaN is
        if len(undecided):
            contenders = ~(scores[undecided] < (top - lead)[undecided, None])
            contenders.scatter_(1, chosen[undecided, None], True)
            chosen[undecided] = self._among(contenders, exact(undecided))
        return chosen

    def _among(self, contenders: Tensor, x: Tensor) -> Tensor:
        """Find the class of the highest score in float64, of those that (n, K) marks, for x (n, d)."""
        rows, classes = contenders.nonzero().unbind(1)
        (n, K), d = contenders.shape, self.weight.shape[1]
        if 32 * len(rows) > K * (n + 8):  # one product for all, which reads the weight once
            return self._exactly(x)
        x, size = x.to(self.weight), max(PAIRS // d, 1)
        scores = [
            (x[i] * self.weight[k]).sum(1).add_(self.bias[k])
            for i, k in zip(rows.split(size), classes.split(size), strict=True)
        ]
        scores = torch.cat(scores)
        highest = scores.new_full((n,), -torch.inf).scatter_reduce_(0, rows, scores, "amax")
        first = scores == highest[rows]
        return classes.new_full((n,), K).scatter_reduce_(0, rows[first], classes[first], "amin")

    def _exactly(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.to(self.weight), self.weight.T).argmax(1)

    def _roughly(self, x: Tensor, error: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute scores (B, K) in float32, and the lead (B,) of one that leads in exact arithmetic too."""
        if self._rounded is None:
            self._rounded = self.bias.float(), self.weight.float().T
        rounded = x.float()
        scores = torch.addmm(*self._rounded[:1], rounded, self._rounded[1])
        lead = self._unit * ((rounded.norm(dim=1) + TINY) * self._size + self._offset)
        return scores, lead if error is None else lead + 2 * self._size * error

    def _checksum(self) -> tuple[Tensor, Tensor, float, float, float]:
        """r (K,), sum_k r_k w_k (d,) and sum_k r_k b_k, with 1 <= |r_k| <= 2; a and b of the tolerance a ||x|| + b."""
        if self._check is None:
            gen = torch.Generator().manual_seed(0)
            r = torch.rand(len(self.bias), generator=gen, dtype=torch.float64) * 2 - 1
            r = (r + r.sign()).to(self.weight)
            slope, offset = self._unit * float(self._size), self._unit * float(self._offset)
            self._check = r.float(), (r @ self.weight).float(), float(r @ self.bias), slope, slope * TINY + offset
        return self._check


def _shifted(exact: Callable[[Tensor], Tensor], start: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: exact(rows + start)
