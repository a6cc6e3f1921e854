"""What takes a second look at the features, once the class means are known.

A feature x of class y is taken relative to its class mean, and only within the span of the differences of class means,
in which everything asked here lies: with V (d, q) an orthonormal basis of that span,

    p = V^T (x - mu_y),    argmin_k ||x - mu_k|| = argmax_k (p + V^T mu_y) . V^T mu_k - ||V^T mu_k||^2 / 2,
    tr(B^T S_k B) = sum over class k of ||(V^T B)^T p||^2   for any B in the span,

so that one product of d x q a sample serves the nearest class mean (NC4) and NC1 of all classes, of each group and by
each convention: with B B^T = S_B^+, tr(S_W S_B^+) is a weighted sum of the tr(B^T S_k B). The columns of B are
orthogonal: of all classes, unless means coincide, they are a basis of the span, in which V^T B is diagonal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nc_probe.moments import ranks
from nc_probe.moments.blocks import block_rows, deviations
from nc_probe.moments.cache import CachedBatch
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.decisions import Scores
from nc_probe.moments.precision import float64_context

__all__ = ["SecondPassStats", "SecondPass"]


class SecondPassStats(NamedTuple):
    """Sums over samples.

    nearest: (K,) samples whose nearest class mean is that of their class. agree: (K,) those whose nearest class mean is
    that of the class chosen. projected: for each basis (K,) tr(B^T S_k B), zero for classes that are not its own.
    within: (d, d) the scatter, if wanted.
    """

    nearest: Tensor
    agree: Tensor
    projected: list[Tensor]
    within: Tensor | None


class SecondPass:
    """Looks at every sample of a pass again.

    Args:
        moments: of the whole pass, over all ranks.
        bases: (B (d, r), classes) whose projected tr(B^T S_k B) are wanted, in the span of differences of class means.
            The columns of the first are orthogonal.
        class_weights: (K,) if the scatter sum_k class_weights[k] S_k is wanted.
    """

    def __init__(
        self,
        moments: ClassMoments,
        bases: Sequence[tuple[Tensor, Tensor]] = (),
        class_weights: Tensor | None = None,
    ) -> None:
        self.moments, self.class_weights = moments, class_weights
        with float64_context(moments.device):
            seen = moments.count > 0
            # Samples; those whose nearest class mean is that of their class; that of the class chosen.
            self._tally = moments.count.new_zeros(moments.num_classes, 3)
            self.projected = [torch.zeros_like(moments.trace) for _ in bases]
            self.within = None if class_weights is None else moments.mean.new_zeros(*[moments.num_features] * 2)
            # About the centre of the means, so that a large common offset cancels no digits.
            means = moments.mean - moments.mean[seen].mean(0)
            directions = int(seen.sum()) - 1
            self._span = lengths = None  # of all features, where classes are as many
            if 0 < directions < moments.num_features - 1 and bases and bases[0][0].shape[1] == directions:
                lengths = bases[0][0].norm(dim=0)
                self._span = bases[0][0] / lengths
            elif directions < moments.num_features - 1:
                self._span = torch.linalg.qr(means[seen].T)[0]
            self._means = means if self._span is None else means @ self._span
            self._scores = Scores(self._means, torch.where(seen, -self._means.square().sum(1) / 2, -torch.inf))
            self._bases = []
            for basis, classes in bases:
                member = torch.zeros_like(seen).index_fill_(0, classes.to(moments.device), True)
                inside = basis if self._span is None else self._span.T @ basis
                self._bases.append((inside, None if bool(member[seen].all()) else member))
            if lengths is not None:
                self._bases[0] = lengths, self._bases[0][1]  # V^T B is diagonal

    def add(self, batch: CachedBatch, columns: slice = slice(None), classifier: int = 0) -> None:
        """Looks at a batch again.

        Args:
            batch: features (B, D), labels (B,), and what classifiers chose (B, H).
            columns: those of the D that are the features looked at.
            classifier: which of the H. None is asked if H = 0.
        """
        moments = self.moments
        rows = block_rows(moments.device, moments.num_features)
        chosen = batch.chosen[:, classifier].to(moments.device) if batch.chosen.shape[1] else None
        with float64_context(moments.device):
            blocks = deviations(batch.features[:, columns], batch.labels, moments.mean, rows=rows)
            for i, (x, labels) in enumerate(blocks):
                self._add(x, labels, None if chosen is None else chosen[i * rows : (i + 1) * rows])

    def _add(self, x: Tensor, labels: Tensor, chosen: Tensor | None) -> None:
        if self.within is not None and self.class_weights is not None:
            weighted = x * self.class_weights[labels, None]
            step = -(-x.shape[1] // 4)
            for start in range(0, x.shape[1], step):  # of the lower triangle, of which the upper is the mirror
                stop = start + step
                self.within[start:stop, :stop].addmm_(weighted[:, start:stop].T, x[:, :stop])
        p = x if self._span is None else x @ self._span
        for spread, (basis, member) in zip(self.projected, self._bases, strict=True):
            mine, of = (p, labels) if member is None else (p[member[labels]], labels[member[labels]])
            mine = mine * basis if basis.ndim == 1 else mine @ basis
            spread.index_add_(0, of, mine.square().sum(1))
        nearest = self._scores.highest(p + self._means[labels])
        agree = torch.zeros_like(labels) if chosen is None else nearest == chosen
        self._tally.index_add_(0, labels, torch.stack([torch.ones_like(labels), nearest == labels, agree], 1))

    def compute(self, *, sync: bool = True) -> SecondPassStats:
        """Sum over all ranks, every one of which must call it; or with `sync=False` over this one.

        Raises:
            ValueError: the samples were not those of the first look.
        """
        total = ranks.all_reduce_sum if sync else lambda tensor: tensor
        count, nearest, agree = total(self._tally).unbind(1)
        within = None if self.within is None else total(self.within.tril() + self.within.tril(-1).T)
        looked = SecondPassStats(nearest, agree, [*map(total, self.projected)], within)
        if not torch.equal(count, self.moments.count):
            k = int((count != self.moments.count).nonzero()[0, 0])
            raise ValueError(
                f"the second pass must show the samples of the first, got {int(count[k])} of class {k}, which had "
                f"{int(self.moments.count[k])}"
            )
        return looked
