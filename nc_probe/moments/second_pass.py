"""Second-pass statistics, which need the final class means.

A feature x of class y is taken relative to its class mean, and only within the span of the differences of class means,
in which everything asked here lies: with V (d, q) an orthonormal basis of that span,

    p = V^T (x - mu_y),    argmin_k ||x - mu_k|| = argmax_k (p + V^T mu_y) . V^T mu_k - ||V^T mu_k||^2 / 2,
    tr(B^T S_k B) = sum over class k of ||(V^T B)^T p||^2   for any B in the span,

so that one product of d x q a sample serves the nearest class mean (NC4) and NC1 of all classes, of each group and by
each convention: with B B^T = S_B^+, tr(S_W S_B^+) is a weighted sum of the tr(B^T S_k B). The columns of B are
orthogonal: of all classes, unless means coincide, they are a basis of the span, in which V^T B is diagonal.

A sample that is nearer to its own mean than half the way to any other needs no other comparison.

In float32 x is taken relative to the mean as rounded, m_y. Since x - mu_y sums to zero over a class,

    sum ||B^T (x - m_y)||^2 = sum ||B^T (x - mu_y)||^2 + n_y ||B^T (mu_y - m_y)||^2,

and the last term is taken back in float64. Decisions that rounding could change are made in float64; whether the sums
of squares are good enough is for a witness to say (`witness.py`).
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nc_probe.moments import ranks
from nc_probe.moments.blocks import block_rows, deviations, deviations_and_parts
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.decisions import UNIT, Scores
from nc_probe.moments.precision import float64_context
from nc_probe.moments.witness import WitnessRows, relative_error

__all__ = ["SecondPass", "SecondPassStats", "within_class_scatter"]

# Rows of a K x K matrix of distances held at once.
TILE = 512


class SecondPassStats(NamedTuple):
    """Sums over samples.

    nearest: (K,) samples whose nearest class mean is that of their class. agree: (K,) those whose nearest class mean is
    that of the class chosen. projected: for each basis (K,) tr(B^T S_k B), zero for classes that are not its own.
    trace: (K,) tr S_k; None without bases. error: what a witness finds for the relative error of the last two. dtype:
    of the arithmetic on features.
    """

    nearest: Tensor
    agree: Tensor
    projected: list[Tensor]
    trace: Tensor | None
    error: float
    dtype: torch.dtype


class SecondPass:
    """Look at every sample of a pass again.

    Inside, classes are those with samples, S of K, in their order: of a vocabulary most may be absent.

    Args:
        moments: of the whole pass, over all ranks: counts and means.
        bases: (B (d, r), classes) whose projected tr(B^T S_k B) are wanted, in the span of differences of class means.
            The columns of the first are orthogonal.
        dtype: of the arithmetic on features: float64, or float32 on a CPU.
    """

    def __init__(
        self,
        moments: ClassMoments,
        bases: Sequence[tuple[Tensor, Tensor]] = (),
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.moments, self.dtype = moments, dtype
        with float64_context(moments.device):
            seen = moments.count > 0
            # Of K classes: samples; those whose nearest class mean is that of their class; that of the class chosen.
            self._tally = moments.count.new_zeros(moments.num_classes, 3)
            self._seen, self._slot = seen.nonzero()[:, 0], (seen.cumsum(0) - 1).clamp(min=0)
            self._mean, self._count = moments.mean[self._seen], moments.count[self._seen]
            self._projected = [self._mean.new_zeros(len(self._seen)) for _ in bases]
            self._trace = self._mean.new_zeros(len(self._seen))
            # About the centre of the means, so that a large common offset cancels no digits.
            means = self._mean - self._mean.mean(0)
            directions = len(self._seen) - 1
            self._span = lengths = None  # of all features, where classes are as many
            if 0 < directions < moments.num_features - 1 and bases and bases[0][0].shape[1] == directions:
                lengths = bases[0][0].norm(dim=0)
                self._span = bases[0][0] / lengths
            elif directions < moments.num_features - 1:
                self._span = torch.linalg.qr(means.T)[0]
            self._means = means if self._span is None else means @ self._span
            self._scores = Scores(self._means, -self._means.square().sum(1) / 2)
            self._bases = []
            for basis, classes in bases:
                member = torch.zeros_like(seen).index_fill_(0, classes.to(moments.device), True)[self._seen]
                inside = basis if self._span is None else self._span.T @ basis
                self._bases.append((inside, None if bool(member.all()) else member))
            if lengths is not None:
                self._bases[0] = lengths, self._bases[0][1]  # V^T B is diagonal
            self._near = torch.zeros_like(self._trace)  # half the way to the next mean from its own, or less
            if moments.device.type == "cpu" and int(moments.count.sum()) > 4 * (directions + 1):
                self._near = _half_gaps(self._means)
            self._prepare()

    def add(self, features: Iterable[Tensor], labels: Tensor, chosen: Tensor | None = None) -> None:
        """Look at samples again.

        Args:
            features: (B, d) of each batch.
            labels: (N,) of all of them.
            chosen: (N,) by the classifier, if there is one.
        """
        moments = self.moments
        rows = block_rows(moments.device, moments.num_features) * (1 if self.dtype == torch.float64 else 4)
        with float64_context(moments.device):
            chosen = None if chosen is None else chosen.to(moments.device)
            labels = labels.to(moments.device).long()
            blocks = deviations_and_parts(features, self._slot[labels], self._rounded, rows=rows)
            nearest = self._seen[torch.cat([labels[:0], *(self._add(*block) for block in blocks)])]
            agree = torch.zeros_like(labels) if chosen is None else nearest == chosen
            self._tally.index_add_(0, labels, torch.stack([torch.ones_like(labels), nearest == labels, agree], 1))

    def compute(self, *, sync: bool = True, witness: WitnessRows | None = None) -> SecondPassStats:
        """Sum over all ranks, every one of which must call it; or with `sync=False` over this one.

        Args:
            sync: over all ranks.
            witness: rows of this rank, in float32.

        Raises:
            ValueError: the samples were not those of the first look.
        """
        total = ranks.all_reduce_sum if sync else lambda tensor: tensor
        count, nearest, agree = total(self._tally).unbind(1)
        sums, error = [*map(total, self._projected), total(self._trace)], 0.0
        if witness is not None:
            with float64_context(self.moments.device):
                sums, error = self._take_back(sums, *map(total, self._compare(witness)))
        *projected, trace = [torch.zeros_like(self.moments.trace).index_copy_(0, self._seen, x) for x in sums]
        looked = SecondPassStats(nearest, agree, projected, trace if projected else None, error, self.dtype)
        if not torch.equal(count, self.moments.count):
            k = int((count != self.moments.count).nonzero()[0, 0])
            raise ValueError(
                f"the second pass must show the samples of the first, got {int(count[k])} of class {k}, which had "
                f"{int(self.moments.count[k])}"
            )
        return looked

    def _prepare(self) -> None:
        """Round what features are multiplied with to the precision of the arithmetic on them."""
        dtype = self.dtype
        self._rounded = self._mean.to(dtype)
        self._lost = self._mean - self._rounded.double()
        self._lost_inside = self._lost if self._span is None else self._lost @ self._span
        span = None if self._span is None else self._span.to(dtype)
        bases = [(basis.to(dtype), member) for basis, member in self._bases]
        self._by_dtype = {torch.float64: (self._span, self._bases), dtype: (span, bases)}
        self._anchors = (self._means - self._lost_inside).to(dtype)
        self._near = (0.9999 * (self._near - self._lost_inside.norm(dim=1))).to(dtype)
        d, q = self.moments.num_features, self._means.shape[1]
        # A sum of d products is off by d u ||v|| ||x|| or less, and so are the q of them (`decisions.py`).
        self._unit = (d + 4) * torch.finfo(dtype).eps / 2 * math.sqrt(q) if d <= 2**16 else math.inf

    def _inside(self, x: Tensor) -> Tensor:
        """V^T x: (n, q) of deviations x (n, d)."""
        span = self._by_dtype[x.dtype][0]
        return x if span is None else x @ span

    def _squares(self, p: Tensor, labels: Tensor, norms: Tensor) -> list[Tensor]:
        """||B^T p||^2 for each basis, 0 for classes that are not its own, and the squares of norms: (n,) float64."""
        found = []
        for basis, member in self._by_dtype[p.dtype][1]:
            mine = None if member is None else member[labels]
            part = p if mine is None else p[mine]
            squares = (
                torch.linalg.vector_norm(part * basis if basis.ndim == 1 else part @ basis, dim=1).double().square()
            )
            found.append(squares if mine is None else squares.new_zeros(len(p)).masked_scatter_(mine, squares))
        return [*found, norms.double().square()]

    def _add(self, x: Tensor, labels: Tensor, parts: list[Tensor]) -> Tensor:
        """Add deviations x (n, d) of classes (n,) in 0..S-1, and find the nearest class means (n,)."""
        p, norms = self._inside(x), torch.linalg.vector_norm(x, dim=1)
        for total, squares in zip([*self._projected, self._trace], self._squares(p, labels, norms), strict=True):
            total.index_add_(0, labels, squares)
        return self._nearest(p, labels, norms, parts)

    def _nearest(self, p: Tensor, labels: Tensor, norms: Tensor, parts: list[Tensor]) -> Tensor:
        """Find the nearest class mean (n,) of samples, whose deviations from their own have `norms`."""
        if p.device.type != "cpu":
            return self._scores.highest(p + self._anchors[labels])
        distance = torch.linalg.vector_norm(p, dim=1).add_(norms, alpha=self._unit)
        open_ = (~(distance < self._near[labels])).nonzero()[:, 0]  # NaN is
        if not len(open_):
            return labels
        nearest, of = labels.clone(), labels[open_]
        place = p[open_] + self._anchors[of]
        if self.dtype == torch.float64:
            nearest[open_] = self._scores.highest(place)
            return nearest

        def exact(rows: Tensor) -> Tensor:
            x, mine = torch.cat(parts)[open_[rows]].double(), of[rows]
            return self._inside(x - self._mean[mine]) + self._means[mine]

        rounding = 2 * UNIT * (torch.linalg.vector_norm(place, dim=1) + torch.linalg.vector_norm(p[open_], dim=1))
        nearest[open_] = self._scores.highest(place, error=1.01 * (self._unit * norms[open_] + rounding), exact=exact)
        return nearest

    def _compare(self, witness: WitnessRows) -> tuple[Tensor, Tensor]:
        """Compute the squares of rows in both precisions.

        Returns:
            Sums (bases + 1, 3) for `relative_error`; and (S, 2) of each class the rows, and their squared norms.
        """
        found, x = self._trace.new_zeros(len(self._projected) + 1, 3), witness.features()
        shown = self._trace.new_zeros(len(self._seen), 2)
        rows = block_rows(self.moments.device, self.moments.num_features)
        for part, of in () if x is None else zip(x.split(rows), self._slot[witness.labels].split(rows), strict=True):
            y, rough = part.double() - self._mean[of], part.to(self.dtype) - self._rounded[of]
            exact = torch.stack(self._squares(self._inside(y), of, y.norm(dim=1)))
            p = self._inside(rough) - self._lost_inside[of].to(self.dtype)
            norms = (rough - self._lost[of].to(self.dtype)).norm(dim=1)
            off = torch.stack(self._squares(p, of, norms)) - exact
            found += torch.stack([off.sum(1), off.square().sum(1), exact.sum(1)], 1)
            shown.index_add_(0, of, torch.stack([torch.ones_like(exact[-1]), exact[-1]], 1))
        return found, shown

    def _take_back(self, sums: list[Tensor], compared: Tensor, shown: Tensor) -> tuple[list[Tensor], float]:
        """Take the rounding of the means out of the sums of squares.

        Args:
            sums: (S,) for each basis, and of norms, over all ranks.
            compared: what the witness found, over all ranks.
            shown: rows of the witness and their squared norms (S, 2), over all ranks.

        Returns:
            What is left, and the largest relative error of it.
        """
        n = self._count
        lost = self._squares(self._lost_inside, torch.arange(len(n), device=n.device), self._lost.norm(dim=1))
        left = [(value - n * over).clamp(min=0) for value, over in zip(sums, lost, strict=True)]
        # Of what is left, rounding is the larger part the more has been taken.
        before, after = (torch.stack([(x / n).sum() for x in values]) for values in (sums, left))
        # And it is larger where the few samples that are farthest from their means are none of the witness's rows.
        rows, squares = shown[shown[:, 0] > 0].unbind(1)
        farther = (before[-1] / len(n) / (squares / rows).mean()).clamp(min=1)
        error = torch.where(before == 0, before, relative_error(compared) * farther * before / after)
        return left, float(error.nan_to_num(torch.inf).max())


def within_class_scatter(
    moments: ClassMoments, class_weights: Tensor, features: Iterable[Tensor], labels: Tensor
) -> Tensor:
    """Sum the within-class scatters of samples, sum_k class_weights[k] S_k: (d, d) float64.

    Args:
        moments: of the whole pass, whose means they are about.
        class_weights: (K,).
        features: (B, d) of each batch.
        labels: (N,) of all of them.
    """
    d = moments.num_features
    with float64_context(moments.device):
        scatter, step = moments.mean.new_zeros(d, d), -(-d // 4)
        for x, of in deviations(features, labels, moments.mean):
            weighted = x * class_weights[of, None]
            for start in range(0, d, step):  # of the lower triangle, of which the upper is the mirror
                stop = start + step
                scatter[start:stop, :stop].addmm_(weighted[:, start:stop].T, x[:, :stop])
        return scatter.tril() + scatter.tril(-1).T


def _half_gaps(means: Tensor) -> Tensor:
    """Half the distance from each of m means (m, q) to the next, or less by what rounding may have added: (m,)."""
    squares = means.square().sum(1)
    slack = 8 * (means.shape[1] + 4) * torch.finfo(means.dtype).eps
    found = []
    for start in range(0, len(means), TILE):
        scale = squares[start : start + TILE, None] + squares
        gaps = torch.addmm(scale, means[start : start + TILE], means.T, alpha=-2) - slack * scale
        gaps.diagonal(start).fill_(torch.inf)
        found.append(gaps.amin(1))
    return torch.cat(found).clamp(min=0).sqrt() / 2
