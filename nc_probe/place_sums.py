"""Sums at the layers of a model and at the iterates of its solves, and the reports that come of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nc_probe.hooks.streams import CaptureStream
from nc_probe.measures.agreement import Agreement
from nc_probe.moments import ranks
from nc_probe.moments.cache import CachedBatch, FeatureCache
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.second_pass import SecondPass
from nc_probe.report import CollapseReport, measure

__all__ = ["PlaceSums"]


class PlaceSums:
    """Moments of places, and their features, kept in what room the classifier's leave: of all places, or of none.

    Args:
        streams: of layers, and of solves, by kind.
        make_cache: a cache for the features of a stream.
        classifier: whether there is one to agree with.
    """

    def __init__(
        self,
        streams: Mapping[str, Sequence[CaptureStream]],
        make_cache: Callable[[], FeatureCache],
        *,
        classifier: bool,
    ) -> None:
        self.kinds, self.classifier = streams, classifier
        self.streams = [stream for of in streams.values() for stream in of]
        self._caches = [make_cache() for _ in self.streams]
        self.reset()

    def reset(self) -> None:
        """Drop every sample."""
        for stream, cache in zip(self.streams, self._caches, strict=True):
            stream.reset()
            cache.clear()
        # Of each stream: places and lengths of their features, in each batch that is kept; its second passes.
        self._columns: list[list[dict[str, int]]] = [[] for _ in self.streams]
        self._again: list[dict[str, SecondPass]] = []

    @property
    def exceeded(self) -> bool:
        """Whether the features of some place are not kept."""
        return any(cache.budget_exceeded for cache in self._caches)

    def pop(self, labels: Tensor, mask: Tensor | None) -> list[dict[str, Tensor]]:
        """Return the features (B, d) by place of each stream, of the last forward pass; see `CaptureStream.pop`."""
        return [stream.pop(labels, mask) for stream in self.streams]

    def add(self, captured: Sequence[dict[str, Tensor]], labels: Tensor) -> None:
        """Add a batch: features (B, d) by place of each stream, labels (B,)."""
        for stream, places in zip(self.streams, captured, strict=True):
            stream.add(places, labels)

    def keep(self, captured: Sequence[dict[str, Tensor]], labels: Tensor, chosen: Tensor) -> None:
        """Keep a batch that was added, and what the classifier chose (B, 1), or (B, 0) without one."""
        for places, cache, columns in zip(captured, self._caches, self._columns, strict=True):
            cache.append(CachedBatch(torch.cat([*places.values()], 1), labels, chosen))
            columns.append({name: x.shape[1] for name, x in places.items()})
        if self.exceeded:
            self.discard()

    def discard(self) -> bool:
        """Forget the features kept, and keep none of those to come; tell whether that has made room."""
        held = any(not cache.budget_exceeded for cache in self._caches)
        for cache, columns in zip(self._caches, self._columns, strict=True):
            cache.discard()
            columns.clear()
        return held

    def begin_second_pass(self) -> None:
        """Take the samples to come for those that are there already, on every rank."""
        gathered = [stream.gathered(sync=True) for stream in self.streams]
        self._again = [{name: SecondPass(m) for name, m in moments.items()} for moments in gathered]

    def show_again(self, captured: Sequence[dict[str, Tensor]], labels: Tensor, chosen: Tensor) -> None:
        """Look at a batch again, of a second pass over the samples."""
        for places, seconds in zip(captured, self._again, strict=True):
            _look(seconds, places, labels, chosen)

    def reports(self, settings: Mapping[str, Any], *, sync: bool) -> dict[str, dict[str, CollapseReport]]:
        """Make the reports by kind and place; over all ranks, every one of which must call it, or of this rank."""
        exceeded = [int(self.exceeded)]
        exceeded = any(ranks.all_reduce_max(exceeded) if sync else exceeded)
        found: dict[str, dict[str, CollapseReport]] = {kind: {} for kind in self.kinds}
        for i, kind in enumerate(kind for kind, streams in self.kinds.items() for _ in streams):
            moments = self.streams[i].gathered(sync=sync)
            agreements = self._agreements(i, moments, exceeded, sync=sync)
            found[kind] |= {
                name: measure(m, None, agreement=agreements[name], **settings) for name, m in moments.items()
            }
        return found

    def _agreements(
        self, index: int, moments: Mapping[str, ClassMoments], exceeded: bool, *, sync: bool
    ) -> dict[str, Agreement]:
        """Count the samples of a stream by place that the nearest class mean gets right, and where it agrees."""
        cache = self._caches[index]
        if not exceeded:
            seconds = {name: SecondPass(m) for name, m in moments.items()}
            for batch, columns in zip(cache, self._columns[index], strict=True):
                places = dict(zip(columns, batch.features.split([*columns.values()], 1), strict=True))
                _look(seconds, places, batch.labels, batch.chosen)
            source = f"from {cache.where(sync=sync)}"
        elif self._again:
            seconds, source = self._again[index], "from a second pass over the samples"
        else:
            source = "absent: features exceed cache_bytes and spill_bytes, and there was no second pass"
            return dict.fromkeys(moments, Agreement(None, None, None, source))
        found = {}
        for name, second in seconds.items():
            stats = second.compute(sync=sync)
            found[name] = Agreement(None, stats.nearest, stats.agree if self.classifier else None, source)
        return found


def _look(seconds: Mapping[str, SecondPass], places: Mapping[str, Tensor], labels: Tensor, chosen: Tensor) -> None:
    """Look again at features (B, d) by place; a solve that has ended stands still at its last place."""
    *_, final = places
    for name, second in seconds.items():
        second.add([places.get(name, places[final])], labels, chosen[:, 0] if chosen.shape[1] else None)
