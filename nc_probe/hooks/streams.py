"""What a probe sums at each place that it reads: at each linear map of the classifier, and at each tap besides."""

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from nc_probe.hooks.heads import Head, LinearMap
from nc_probe.hooks.taps import LayerTap, SolveTap
from nc_probe.moments import ranks
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.decisions import Scores
from nc_probe.moments.precision import exact_arithmetic

__all__ = ["ClassifierStream", "TapStream", "classifier_streams"]

MakeMoments = Callable[[int], ClassMoments]
"""Empty moments of features of a length."""


class ClassifierStream:
    """Moments of the features of a linear map, and how often it is right.

    Args:
        linear: weight (K, d) and bias, or None for features without a classifier.
        columns: where in the features of the whole head those of this map are.
        make: its moments; without a classifier to tell d there are none before the first batch.
    """

    def __init__(self, linear: Head | LinearMap | None, columns: slice, make: MakeMoments) -> None:
        self.linear, self.columns, self.make = linear, columns, make
        self.reset()

    def reset(self) -> None:
        self.moments = None if self.linear is None else self.make(self.linear.weight.shape[1])
        self.correct: Tensor | None = None
        self.dtype = torch.float32  # of the features
        self._snapshot: tuple[Tensor, Tensor | None] | None = None
        self._scores: Scores | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Counts a batch: features of the whole head (B, D), labels (B,)."""
        x = features[:, self.columns]
        self.dtype = x.dtype
        if self.moments is None:
            self.moments = self.make(x.shape[1])
        self.moments.update(x, labels)

    def choose(self, features: Tensor, labels: Tensor, *, count: bool) -> Tensor:
        """The class chosen for each sample, (B, 1), or (B, 0) without a classifier; `count` those that are right."""
        if self.linear is None:
            return labels.new_empty(len(labels), 0)
        weight, bias = self.snapshot()
        assert weight is not None
        with exact_arithmetic(weight.device):
            if self._scores is None:
                self._scores = Scores(weight, weight.new_zeros(len(weight)) if bias is None else bias)
            chosen = self._scores.highest(features[:, self.columns].detach().to(weight.device))
            if not count:
                return chosen[:, None]
            if self.correct is None:
                self.correct = torch.zeros(self.linear.weight.shape[0], dtype=torch.int64, device=chosen.device)
            labels = labels.to(chosen.device)
            self.correct.index_add_(0, labels, (chosen == labels).long())
        return chosen[:, None]

    def logits(self, features: Tensor) -> Tensor:
        """(B, K) float64."""
        weight, bias = self.snapshot()
        assert weight is not None
        with exact_arithmetic(weight.device):
            x = features[:, self.columns].to(weight)
            return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)

    def snapshot(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as they were at the first batch, so that training on before `compute` does not mix in."""
        if self.linear is None:
            return None, None
        if self._snapshot is None:
            assert self.moments is not None
            weight, bias = self.linear.weight, self.linear.bias
            with exact_arithmetic(self.moments.device):
                self._snapshot = (
                    weight.detach().to(self.moments.mean, copy=True),
                    None if bias is None else bias.detach().to(self.moments.mean, copy=True),
                )
        return self._snapshot


class TapStream:
    """Moments of what a tap reads, by the names of its places."""

    def __init__(self, tap: LayerTap | SolveTap, make: MakeMoments) -> None:
        self.tap, self.make = tap, make
        self.reset()

    def reset(self) -> None:
        self.tap.forget()
        self.moments: dict[str, ClassMoments] = {}

    def read(self, mask: Tensor | None) -> dict[str, Tensor]:
        """What the tap saw of the last forward pass, of the samples that `mask` (B,) keeps."""
        read = self.tap.take()
        return read if mask is None else {name: x[mask.to(x.device)] for name, x in read.items()}

    def add(self, read: dict[str, Tensor], labels: Tensor) -> None:
        """Counts a batch: features (B, d) by place, labels (B,)."""
        *_, final = read
        self._begin({name: x.shape[1] for name, x in read.items()}, final)
        for name, moments in self.moments.items():
            try:
                moments.update(read.get(name, read[final]), labels)  # a solve that has ended stands still
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None

    def gathered(self, *, sync: bool) -> dict[str, ClassMoments]:
        """The moments over all ranks, every one of which must call it, or of this rank."""
        if not sync:
            names = self.tap.names(len(self.moments))
            return {name: self.moments[name] for name in names}
        names = self.tap.names(*ranks.largest([len(self.moments)]))
        here = [self.moments[name].num_features if name in self.moments else 0 for name in names]
        if names:
            self._begin(dict(zip(names, ranks.largest(here), strict=True)), names[-1])
        return {name: self.moments[name].sync() for name in names}

    def _begin(self, sizes: dict[str, int], final: str) -> None:
        """Moments for places that there were none for: of a solve longer than those before, which stood still."""
        before = self.moments.get(final)
        for name, num_features in sizes.items():
            if name not in self.moments:
                self.moments[name] = self.make(num_features) if before is None else copy.deepcopy(before)


def classifier_streams(head: Head | None, make: MakeMoments) -> list[ClassifierStream]:
    """One for the whole head and, if it is the mean of several maps, one for each of them."""
    whole = ClassifierStream(head, slice(None), make)
    if head is None or len(head.maps) == 1:
        return [whole]
    ends = itertools.accumulate((linear.weight.shape[1] for linear in head.maps), initial=0)
    columns = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
    return [whole, *(ClassifierStream(*part, make) for part in zip(head.maps, columns, strict=True))]
