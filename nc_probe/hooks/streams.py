"""Streams: the sums that a probe keeps for each linear map of the classifier, and for each layer or solve besides."""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nc_probe.hooks.captures import IterateCapture, LayerCapture
from nc_probe.hooks.heads import Head, LinearMap
from nc_probe.moments import ranks
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.class_sums import ClassSums
from nc_probe.moments.decisions import Scores
from nc_probe.moments.precision import DTYPES, float64_context
from nc_probe.moments.validation import check_batch, validate_features

__all__ = ["CaptureStream", "ClassifierStream", "MakeMoments", "classifier_streams"]


# Logits of the first batch that are compared with what the model gives: all of most batches, 192 rows of 21,841.
COMPARED = 2**22


class MakeMoments(Protocol):
    """Make empty moments of features of a length."""

    def __call__(self, num_features: int, *, scatter: bool = True) -> ClassMoments: ...


class ClassifierStream:
    """Moments of the features of a linear map, and how often it is right.

    Args:
        linear: weight (K, d) and bias, or None for features without a classifier.
        columns: where in the features of the whole head those of this map are.
        make: its moments, or its class sums if features are kept; without a classifier to tell d there are none before
            the first batch.
    """

    def __init__(
        self, linear: Head | LinearMap | None, columns: slice, make: Callable[[int], ClassMoments | ClassSums]
    ) -> None:
        self.linear, self.columns, self.make = linear, columns, make
        self.moments: ClassMoments | ClassSums | None = None
        self.reset()

    def reset(self) -> None:
        """Start a new pass."""
        if self.linear is None:
            self.moments = None
        elif self.moments is None or self.moments.batches:
            self.moments = self.make(self.linear.num_features)
        self.correct: Tensor | None = None
        self._dtype = 0  # in DTYPES, the coarsest that features came in
        self._snapshot: tuple[Tensor, Tensor | None] | None = None
        self._scores: Scores | None = None

    def check(self, features: Tensor, labels: Tensor) -> Tensor | None:
        """Check a batch, features of the whole head (B, D) and labels (B,), before it is added where class sums are.

        Returns:
            What `choose` makes use of too: `Scores.sketch`, norms (1, B) without a classifier, None where it does not.

        Raises:
            ValueError: as by `ClassMoments.update`.
        """
        x, sketch = features[:, self.columns].detach(), None
        if self.moments is None:
            self.moments = self.make(x.shape[1])
        scores = self._classifier()
        if x.device.type == "cpu" and x.dtype in DTYPES[1:]:
            with float64_context(x.device):
                sketch = torch.linalg.vector_norm(x.float(), dim=1)[None] if scores is None else scores.sketch(x)
        if isinstance(self.moments, ClassSums):
            self.moments.check(x, labels, None if sketch is None else sketch[0])
        return sketch

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features of the whole head (B, D), labels (B,)."""
        assert self.moments is not None
        x = features[:, self.columns]
        self.moments.update(x, labels)
        self._dtype = max(self._dtype, DTYPES.index(x.dtype))

    def choose(
        self,
        features: Tensor,
        labels: Tensor,
        logits: Tensor | None = None,
        sketch: Tensor | None = None,
        *,
        count: bool,
    ) -> Tensor:
        """Return the class chosen for each sample, (B, 1), or (B, 0) without a classifier; `count` the right ones.

        Args:
            features: (B, D) of the whole head.
            labels: (B,).
            logits: (B, K) that the model gave, which are not computed again where they are those of the classifier.
            sketch: of these features, if known.
            count: the right ones.
        """
        scores = self._classifier()
        if scores is None:
            return labels.new_empty(len(labels), 0)
        device = scores.weight.device
        with float64_context(device):
            x, labels = features[:, self.columns].detach().to(device), labels.to(device)
            chosen = scores.highest(x) if logits is None else scores.highest_of(logits, x, labels, sketch)
            if not count:
                return chosen[:, None]
            if self.correct is None:
                self.correct = torch.zeros(len(scores.weight), dtype=torch.int64, device=chosen.device)
            self.correct.index_add_(0, labels, (chosen == labels).long())
        return chosen[:, None]

    def _classifier(self) -> Scores | None:
        """Return the scores of the classifier, with its weights as they were at the first batch."""
        weight, bias = self.snapshot()
        if self._scores is None and weight is not None:
            with float64_context(weight.device):
                self._scores = Scores(weight, weight.new_zeros(len(weight)) if bias is None else bias)
        return self._scores

    def logits(self, features: Tensor) -> Tensor:
        """Compute weight @ feature + bias, (B, K) float64."""
        weight, bias = self.snapshot()
        assert weight is not None
        with float64_context(weight.device):
            x = features[:, self.columns].to(weight)
            return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)

    def snapshot(self) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias as they were at the first batch: training on before `compute` does not mix in."""
        if self.linear is None:
            return None, None
        if self._snapshot is None:
            assert self.moments is not None
            weight, bias = self.linear.weight, self.linear.bias
            device = self.moments.device
            with float64_context(device):
                self._snapshot = (
                    weight.detach().to(device, torch.float64, copy=True),
                    None if bias is None else bias.detach().to(device, torch.float64, copy=True),
                )
        return self._snapshot

    def linear_error(self, features: Tensor, output: Sequence[Tensor]) -> float | None:
        """Compare weight @ feature + bias with what the model gave, one of several tensors, in 4 million logits or so.

        Returns:
            The largest difference relative to the largest logit, of the tensor where it is smallest; None if none of
            them has the shape of logits.
        """
        weight, _ = self.snapshot()
        assert weight is not None
        given = [x for x in output if x.shape == (len(features), len(weight))]
        some = max(COMPARED // len(weight), 16)
        logits = self.logits(features[:some])
        size = logits.abs().max().clamp(min=1e-30)
        errors = [(logits - x[:some].to(logits)).abs().max() / size for x in given]
        return float(min(errors)) if errors else None

    def add_scatter(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add variances and scatter of batches of which sums are kept: features of the whole head (B, D), labels (B,).

        From then on they are summed as batches come.
        """
        assert isinstance(self.moments, ClassSums)
        self.moments = self.moments.moments()
        self._add_scatter(self.moments, batches)

    def gathered(self, late: Iterable[tuple[Tensor, Tensor]] | None = None, *, sync: bool) -> ClassMoments:
        """Return the moments over all ranks, every one of which must call it, or of this rank.

        Args:
            late: batches of `add_scatter`, whose variances and scatter are added to what is returned. Default: where
                features are kept there are none.
            sync: over all ranks.

        Raises:
            ValueError: there is no sample, or something bad was found on an accelerator.
        """
        moments = self.moments
        if sync:
            (num_features,) = ranks.all_reduce_max([0 if moments is None else moments.num_features])
            if moments is None and num_features:
                moments = self.make(num_features)  # of a rank without samples
        if moments is None:
            raise ValueError("compute needs at least one sample: call update first")
        if isinstance(moments, ClassSums):
            moments = moments.moments()
        if late is not None:
            self._add_scatter(moments, late)
        moments = moments.sync() if sync and ranks.is_distributed() else moments
        moments.check()
        if not moments.count.any():
            raise ValueError("compute needs at least one sample: call update first")
        return moments

    def features_dtype(self, *, sync: bool) -> torch.dtype:
        """Return the coarsest dtype that features came in, over all ranks or of this one."""
        (dtype,) = ranks.all_reduce_max([self._dtype]) if sync else [self._dtype]
        return DTYPES[dtype]

    def correct_counts(self, *, sync: bool) -> Tensor | None:
        """Return the samples (K,) of each class that the classifier gets right, over all ranks or of this one."""
        if self.linear is None:
            return None
        assert self.moments is not None  # a classifier tells how many features it takes
        correct = torch.zeros_like(self.moments.count) if self.correct is None else self.correct
        return ranks.all_reduce_sum(correct) if sync else correct

    def _add_scatter(self, moments: ClassMoments, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        allowed = True
        try:
            moments.add_scatter(moments.mean[:0], moments.count[:0])  # on every rank, also on one without samples
        except ValueError as error:
            text = f"features exceed cache_bytes and spill_bytes, so NC1 will be absent: {error}"
            warnings.warn(text, stacklevel=6)
            allowed = False
        for features, labels in batches:
            moments.add_trace(features[:, self.columns], labels)
            if allowed:
                moments.add_scatter(features[:, self.columns], labels)


class CaptureStream:
    """Moments of what a capture holds, by the names of its places."""

    def __init__(self, capture: LayerCapture | IterateCapture, make: MakeMoments) -> None:
        self.capture, self.make = capture, make
        self.reset()

    def reset(self) -> None:
        """Start a new pass."""
        self.moments: dict[str, ClassMoments] = {}

    def pop(self, labels: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Return features (B', d) by place of the last forward pass, of the samples that `mask` (B,) keeps.

        Args:
            labels: (B',) of these samples.
            mask: bool; None keeps all.

        Raises:
            ValueError: they cannot be added.
        """
        captured = self.capture.pop()
        if mask is not None:
            captured = {name: x[mask.to(x.device)] for name, x in captured.items()}
        for name, x in captured.items():
            with self._naming(name):
                known = self.moments.get(name)
                check_batch(x, labels, x.shape[1] if known is None else known.num_features)
                validate_features(x, batch=0 if known is None else known.batches)
        return captured

    def add(self, captured: dict[str, Tensor], labels: Tensor) -> None:
        """Add a batch: features (B, d) by place, labels (B,)."""
        *_, final = captured
        self._begin(self.moments, {name: x.shape[1] for name, x in captured.items()}, final)
        for name, moments in self.moments.items():
            with self._naming(name):
                moments.update(captured.get(name, captured[final]), labels)  # a solve that has ended stands still

    def gathered(self, *, sync: bool) -> dict[str, ClassMoments]:
        """Return the moments over all ranks, every one of which must call it, or of this rank."""
        moments = dict(self.moments)
        if not sync:
            return {name: moments[name] for name in self.capture.names(len(moments))}
        names = self.capture.names(*ranks.all_reduce_max([len(moments)]))
        here = [moments[name].num_features if name in moments else 0 for name in names]
        if names:
            self._begin(moments, dict(zip(names, ranks.all_reduce_max(here), strict=True)), names[-1])
        return {name: moments[name].sync() for name in names}

    @staticmethod
    @contextlib.contextmanager
    def _naming(name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None

    def _begin(self, moments: dict[str, ClassMoments], sizes: dict[str, int], final: str) -> None:
        """Add moments for places that there were none for: of a solve longer than those before, which stood still."""
        before = moments.get(final)
        for name, num_features in sizes.items():
            if name not in moments:
                moments[name] = self.make(num_features) if before is None else copy.deepcopy(before)


def classifier_streams(head: Head | None, make: Callable[[int], ClassMoments | ClassSums]) -> list[ClassifierStream]:
    """Make a stream for the whole head and, if it is the mean of several maps, one for each of them."""
    whole = ClassifierStream(head, slice(None), make)
    if head is None or len(head.maps) == 1:
        return [whole]
    ends = itertools.accumulate((linear.num_features for linear in head.maps), initial=0)
    columns = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
    return [whole, *(ClassifierStream(*part, make) for part in zip(head.maps, columns, strict=True))]
