"""Sums of a pass: what is added up of its samples, and the reports that come of it."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nc_probe.hooks.heads import Head
from nc_probe.hooks.streams import CaptureStream, MakeMoments, classifier_streams
from nc_probe.measures.agreement import Agreement
from nc_probe.measures.assembly import Measurement
from nc_probe.moments import ranks
from nc_probe.moments.cache import CachedBatch, FeatureCache
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.class_sums import ClassSums
from nc_probe.moments.precision import float32_has_all_bits
from nc_probe.moments.second_pass import SecondPass, SecondPassStats, within_class_scatter
from nc_probe.moments.waiting import CheckedBatch, WaitingBatches
from nc_probe.moments.witness import ROWS, TOLERANCE, WitnessRows
from nc_probe.place_sums import PlaceSums
from nc_probe.report import CollapseReport

__all__ = ["PassSums"]


class PassSums:
    """Sums over the samples of a pass, at the classifier and at what is captured besides, and the features kept.

    Args:
        head: the classifier, if there is one.
        num_classes: K.
        make: empty moments; with `scatter=False` without a scatter.
        captured: a stream for each layer, and for each solve.
        cache: for features.
        settings: center, groups and conventions of reports.
        spectrum: whether the ranks of features are wanted.
    """

    def __init__(
        self,
        head: Head | None,
        num_classes: int,
        make: MakeMoments,
        *,
        captured: Mapping[str, Sequence[CaptureStream]],
        cache: FeatureCache,
        settings: Mapping[str, Any],
        spectrum: bool,
    ) -> None:
        self.head, self.num_classes, self.settings, self.spectrum = head, num_classes, settings, spectrum
        self._cache, self._waiting = cache, WaitingBatches()
        self._places = PlaceSums(captured, cache.beside, classifier=head is not None)
        # Variances and scatter wait for a second look at the features, unless they are gone by then, or rounded.
        self._deferred = not cache.budget_exceeded and cache.dtype is None
        self.classifiers = classifier_streams(
            head, lambda d: ClassSums(make(d, scatter=False)) if self._deferred else make(d)
        )
        self.reset()

    @property
    def captures(self) -> list[CaptureStream]:
        """The streams of layers and solves."""
        return self._places.streams

    def reset(self) -> None:
        """Drop every sample."""
        for stream in self.classifiers:
            stream.reset()
        self._cache.clear()
        self._places.reset()
        self._waiting.clear()
        self._sizes: list[list[int]] = []  # of the batches that were added together, and are kept so
        self._second_passes: list[SecondPass] = []
        self._reports: dict[bool, CollapseReport] = {}

    def begin_second_pass(self) -> None:
        """Take the samples to come for those that are there already.

        Raises:
            ValueError: there are none.
        """
        self._add_waiting()
        passes = [SecondPass(stream.gathered(sync=True)) for stream in self.classifiers]
        self._places.begin_second_pass()
        self._second_passes, self._reports = passes, {}

    def end(self) -> None:
        """Add what is waiting, and hold the weights of the classifier, on a rank without samples too."""
        self._add_waiting()
        for stream in self.classifiers:
            stream.snapshot()

    def add(self, features: Tensor, labels: Tensor, mask: Tensor | None, output: Sequence[Tensor] = ()) -> None:
        """Add a batch, and what was captured of it.

        Args:
            features: (B, D) of the whole head, which nobody changes from now on.
            labels: (B,).
            mask: True for these samples among those captured; None for all.
            output: (B, ...) tensors that the model gave, among which the logits may be.
        """
        self._reports = {}
        captured = self._places.pop(labels, mask)  # whatever is refused is refused before anything is added
        logits = next((x for x in output if x.shape == (len(labels), self.num_classes)), None)
        if self._second_passes:
            self._show_again(features, labels, captured, logits)
            return
        sketches = [stream.check(features, labels) for stream in self.classifiers]
        batch = CheckedBatch(features, labels.clone(), logits, sketches)
        if not self._waiting.fits(batch):
            self._add_waiting()
        if self._waiting.append(batch) or self.captures or not self._deferred:
            self._add_waiting(captured)

    def kept(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features (B, D) and labels (B,) of this rank, batch by batch."""
        self._add_waiting()
        for batch, sizes in zip(self._cache, self._sizes, strict=False):  # none, once they were too many
            yield from zip(batch.features.split(sizes), batch.labels.split(sizes), strict=True)

    def compute(self, *, sync: bool) -> CollapseReport:
        """Make the report, once; over all ranks, every one of which must call it, or of this rank."""
        missing = [int(sync not in self._reports)]
        if any(ranks.all_reduce_max(missing) if sync else missing):  # a rank that computes needs the others
            self._reports[sync] = self._compute(sync)
        return self._reports[sync]

    def covariance(self, *, sync: bool) -> tuple[Measurement, Tensor]:
        """Measure the features of the whole head, and find their within-class covariance (d, d), weighted as there.

        Over all ranks, every one of which must call it, or of this rank.

        Raises:
            ValueError: it was not summed, or not so that it can be weighted.
        """
        exceeded = self.exceeded(sync=sync)
        measurement = self._measurement(0, exceeded, sync=sync)
        if self._deferred and not exceeded:
            return measurement, self._within(0, measurement, sync=sync)
        return measurement, measurement.moments.within_class_scatter(measurement.class_weights)

    def exceeded(self, *, sync: bool, places: bool = False) -> bool:
        """Tell whether the features of some rank, or of this one, are not kept; with `places` those of layers too."""
        self._add_waiting()
        exceeded = [int(self._cache.budget_exceeded or (places and self._places.exceeded))]
        return any(ranks.all_reduce_max(exceeded) if sync else exceeded)

    def _add_waiting(self, captured: Sequence[dict[str, Tensor]] = ()) -> None:
        """Add the batches that wait; of the last of them, if it is the only one, what was captured too."""
        waiting = self._waiting.pop()
        if waiting is None:
            return
        (features, labels, logits, sketches), sizes = waiting
        for stream in self.classifiers:
            stream.add(features, labels)
        self._places.add(captured, labels)
        labels = labels.long().clamp(0, self.num_classes - 1)  # an accelerator's are checked later
        choices = [
            stream.choose(features, labels, given, sketch, count=True)
            for stream, given, sketch in zip(self.classifiers, self._given(logits), sketches, strict=True)
        ]
        self._keep(CachedBatch(features, labels, torch.cat(choices, 1) if choices[1:] else choices[0]))
        self._sizes.append(sizes)
        self._places.keep(captured, labels, choices[0])

    def _show_again(
        self, features: Tensor, labels: Tensor, captured: Sequence[dict[str, Tensor]], logits: Tensor | None
    ) -> None:
        """Look at a batch again, of a second pass over the samples."""
        labels = labels.long().clamp(0, self.num_classes - 1)
        choices = [
            stream.choose(features, labels, given, count=False)
            for stream, given in zip(self.classifiers, self._given(logits), strict=True)
        ]
        for stream, second, choice in zip(self.classifiers, self._second_passes, choices, strict=True):
            second.add([features[:, stream.columns]], labels, choice[:, 0] if choice.shape[1] else None)
        self._places.show_again(captured, labels, choices[0])

    def _given(self, logits: Tensor | None) -> list[Tensor | None]:
        """Logits for each classifier: of the whole head, and of none of its maps."""
        return [logits, *[None] * (len(self.classifiers) - 1)]

    def _keep(self, batch: CachedBatch) -> None:
        """Keep the features of a batch, in the room of layers and solves too if need be."""
        if self._cache.budget_exceeded:
            return
        self._cache.append(batch)
        if self._cache.budget_exceeded and self._places.discard():
            self._cache.budget_exceeded = False
            self._cache.append(batch)
        if self._cache.budget_exceeded:
            self._fall_back_to_scatter(batch)

    def _fall_back_to_scatter(self, last: CachedBatch) -> None:
        """Discard the features kept, and `last`, and go on with the within-class scatter."""
        if self._deferred:
            for stream in self.classifiers:
                stream.add_scatter(itertools.chain(self.kept(), [(last.features, last.labels)]))
        self._cache.discard()

    def _compute(self, sync: bool) -> CollapseReport:
        exceeded = self.exceeded(sync=sync)
        main, *heads = [self._report(i, exceeded, sync=sync) for i in range(len(self.classifiers))]
        names = [linear.name for linear in self.head.maps] if self.head and heads else []
        parts: dict[str, Any] = {"heads": dict(zip(names, heads, strict=True))}
        settings = {name: self.settings[name] for name in ("center", "groups", "weight_decay")}
        return dataclasses.replace(main, **parts, **self._places.reports(settings, sync=sync))

    def _measurement(self, index: int, exceeded: bool, *, sync: bool) -> Measurement:
        """Measure at a classifier; `exceeded`: the features of some rank are not kept."""
        stream = self.classifiers[index]
        # What another rank had to add, this one adds too.
        late = self.kept() if exceeded and self._deferred and not self._cache.budget_exceeded else None
        moments = stream.gathered(late, sync=sync)
        moments.check_counts()
        dtype = stream.features_dtype(sync=sync)
        return Measurement(moments, *stream.snapshot(), **self.settings, features_dtype=dtype)

    def _report(self, index: int, exceeded: bool, *, sync: bool) -> CollapseReport:
        """Make the report of a classifier; `exceeded`: the features of some rank are not kept."""
        stream, measurement = self.classifiers[index], self._measurement(index, exceeded, sync=sync)
        looked = within = None
        if self._deferred and not exceeded:
            looked, source = self._from_cache(index, measurement, sync=sync)
            stats = looked
            assert looked.trace is not None
            measurement.moments.trace = looked.trace
            if self.spectrum:
                within = self._within(index, measurement, sync=sync)
        elif self._second_passes:
            stats, source = self._second_passes[index].compute(sync=sync), "from a second pass over the samples"
        elif not exceeded:
            stats, source = self._from_cache(index, measurement, sync=sync)
        else:
            stats, source = None, "absent: features exceed cache_bytes and spill_bytes, and there was no second pass"
        agree = None if stats is None or stream.linear is None else stats.agree
        nearest = None if stats is None else stats.nearest
        agreement = Agreement(stream.correct_counts(sync=sync), nearest, agree, source)
        return CollapseReport.of(measurement.values(agreement, looked, within, ranks=self.spectrum))

    def _from_cache(self, index: int, measurement: Measurement, *, sync: bool) -> tuple[SecondPassStats, str]:
        """Look again at the features that are kept: at their scatter too, unless it was summed in the first pass."""
        moments, labels, chosen = measurement.moments, self._cache.labels, self._cache.chosen(index)
        bases = measurement.bases if self._deferred else []
        stats = None
        for dtype in self._precisions(moments, sync=sync):
            second = SecondPass(moments, bases, dtype=dtype)
            witness = None if dtype == torch.float64 else WitnessRows(labels)
            second.add(self._features(index, witness), labels, chosen)
            stats = second.compute(sync=sync, witness=witness)
            inexact = [int(stats.error > TOLERANCE)]
            if not any(ranks.all_reduce_max(inexact) if sync else inexact):
                break
        assert stats is not None
        return stats, f"from {self._cache.where(sync=sync)}"

    def _precisions(self, moments: ClassMoments, *, sync: bool) -> tuple[torch.dtype, ...]:
        """Of the arithmetic on features, in the order in which to try."""
        # Where the witness would be most of the data, float64 costs no more.
        exact = [int(self._cache.in_float64 or not self._deferred or not float32_has_all_bits(moments.device))]
        exact = any(ranks.all_reduce_max(exact) if sync else exact)
        return (torch.float64,) if exact or int(moments.count.sum()) <= 8 * ROWS else (torch.float32, torch.float64)

    def _features(self, index: int, witness: WitnessRows | None = None) -> Iterator[Tensor]:
        """Yield those kept for a classifier, batch by batch; a witness sees them too."""
        for batch in self._cache:
            features = batch.features[:, self.classifiers[index].columns]
            if witness is not None:
                witness.show(features)
            yield features

    def _within(self, index: int, measurement: Measurement, *, sync: bool) -> Tensor:
        """Sum the within-class covariance (d, d) of a classifier's features that are kept."""
        moments, weights = measurement.moments, measurement.class_weights
        within = within_class_scatter(moments, weights, self._features(index), self._cache.labels)
        return ranks.all_reduce_sum(within) if sync else within
