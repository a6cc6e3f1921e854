"""Features kept for a second look.

Some measures need the class means of the whole pass: to which mean a feature is nearest (NC4), and how far it lies from
its own along the directions in which the means differ (NC1, exactly and without a d x d matrix for each class). So
features are kept: in the memory of the host up to one budget, on its disk up to another. Beyond both, all are given up.
"""

import tempfile
import weakref
from collections.abc import Iterator
from numbers import Real
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from nc_probe.moments import ranks
from nc_probe.moments.precision import DTYPES

__all__ = ["FeatureCache", "CachedBatch"]


class CachedBatch(NamedTuple):
    """A batch: features (B, d), labels (B,), and what each classifier chose (B, H)."""

    features: Tensor
    labels: Tensor
    chosen: Tensor


class Budget:
    """What is left of the host's memory, and of its disk, for the caches that share them."""

    def __init__(self, memory_bytes: int, disk_bytes: int) -> None:
        self.memory, self.disk = memory_bytes, disk_bytes


class FeatureCache:
    """Batches of features, in the order in which they came.

    Args:
        memory_bytes: of features on the host.
        disk_bytes: of features in a temporary file, which nobody else sees and which is gone with this object.
        dtype: to keep features in; float16 and bfloat16 halve them, and round those that are wider. Default: their own.
        budget: shared with other caches of the same limits. Default: its own.

    Attributes:
        over: features were more than both budgets, or than the disk could take: from then on none is kept.
    """

    def __init__(
        self, memory_bytes: int, disk_bytes: int, dtype: torch.dtype | None = None, *, budget: Budget | None = None
    ) -> None:
        for name, value in (("cache_bytes", memory_bytes), ("spill_bytes", disk_bytes)):
            if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"cache_dtype must be a floating-point dtype, got {dtype!r}")
        self.memory_bytes, self.disk_bytes, self.dtype = memory_bytes, disk_bytes, dtype
        self._budget = Budget(memory_bytes, disk_bytes) if budget is None else budget
        self._file: BinaryIO | None = None
        self._copied_from: torch.device | None = None
        self._memory = self._written = 0
        self.clear()

    def beside(self) -> "FeatureCache":
        """Make another cache, which shares the budget of this one."""
        return FeatureCache(self.memory_bytes, self.disk_bytes, self.dtype, budget=self._budget)

    def clear(self) -> None:
        """Forgets every batch; a new pass may begin."""
        self._empty()
        self.budget_exceeded = self.memory_bytes + self.disk_bytes == 0

    def append(self, batch: CachedBatch) -> None:
        """Keeps a batch, or finds that it is too much: those before it are there until `discard`.

        Features on the CPU are not copied, and so may not be changed afterwards. Those on an accelerator are copied
        without waiting for it: who reads them waits.
        """
        if self.budget_exceeded:
            return
        features = batch.features.detach()
        there = features.device if features.is_cuda else None  # others can be read before they have been copied
        kept = features.to("cpu", self.dtype or features.dtype, non_blocking=there is not None)
        if kept.untyped_storage().nbytes() > kept.nbytes:  # a view would hold more than it counts
            kept = kept.clone()
        labels, chosen = (t.to("cpu", non_blocking=there is not None) for t in (batch.labels, batch.chosen))
        self._copied_from = there or self._copied_from
        if kept.nbytes <= self._budget.memory:
            self._budget.memory -= kept.nbytes
            self._memory += kept.nbytes
            self._batches.append(CachedBatch(kept, labels, chosen))
        elif kept.nbytes <= self._budget.disk and self._write(kept):
            self._batches.append(CachedBatch(kept[:0], labels, chosen))
        else:
            self.budget_exceeded = True

    @property
    def labels(self) -> Tensor:
        """(N,) of all batches, in their order."""
        self._wait()
        return torch.cat([batch.labels for batch in self._batches] or [torch.zeros(0, dtype=torch.int64)])

    def chosen(self, classifier: int) -> Tensor | None:
        """(N,) what a classifier chose, of all batches, in their order; None if there is no classifier."""
        if any(not batch.chosen.shape[1] for batch in self._batches):
            return None
        self._wait()
        return torch.cat([b.chosen[:, classifier] for b in self._batches] or [torch.zeros(0, dtype=torch.int64)])

    @property
    def in_float64(self) -> bool:
        """Whether some are, of this rank."""
        return any(batch.features.dtype == torch.float64 for batch in self._batches)

    def __iter__(self) -> Iterator[CachedBatch]:
        self._wait()
        if self._file is not None:
            self._file.seek(0)
        for features, labels, chosen in self._batches:
            if len(features) < len(labels):
                assert self._file is not None
                raw = bytearray(self._file.read(len(labels) * features.shape[1] * features.element_size()))
                features = torch.frombuffer(raw, dtype=features.dtype).view(len(labels), -1)
            yield CachedBatch(features, labels, chosen)

    def discard(self) -> None:
        """Forgets every batch, and keeps none of those to come."""
        self._empty()
        self.budget_exceeded = True

    def where(self, *, sync: bool) -> str:
        """Say where features are, for the report: those of all ranks, every one of which must call it, or of this."""
        known = {batch.features.dtype for batch in self._batches}
        used = [int(self._file is not None), *(int(dtype in known) for dtype in DTYPES)]
        disk, *used = ranks.all_reduce_max(used) if sync else used
        names = sorted(str(dtype).removeprefix("torch.") for dtype, here in zip(DTYPES, used, strict=True) if here)
        place = "the host's memory" + (" and disk" if disk else "")
        return f"a second look at the features, kept in {place} as {' and '.join(names)}"

    def _empty(self) -> None:
        self._batches: list[CachedBatch] = []
        self._budget.memory += self._memory
        self._budget.disk += self._written
        self._memory = self._written = 0
        if self._file is not None:
            self._file.close()
        self._file = None

    def _wait(self) -> None:
        """Wait for the copies that an accelerator still has to make."""
        if self._copied_from is not None:
            torch.cuda.synchronize(self._copied_from)
            self._copied_from = None

    def _write(self, features: Tensor) -> bool:
        """Whether the disk took them."""
        self._wait()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # unbuffered: a full disk is noticed here
                weakref.finalize(self, self._file.close)
            self._file.seek(self._written)
            raw = memoryview(features.contiguous().view(torch.uint8).numpy().tobytes())
            while raw:
                raw = raw[self._file.write(raw) :]
        except OSError:
            return False
        self._budget.disk -= features.nbytes
        self._written += features.nbytes
        return True
