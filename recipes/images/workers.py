"""Processes that decode images: how many there are, and the error when one dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

# Below this many images, starting workers takes longer than they save.
_SMALL = 5000


class WorkerDiedError(OSError):
    """A process that decodes images has died."""


@contextmanager
def explain_dead_worker() -> Iterator[None]:
    """Report in one line that a worker has died.

    Torch notices it wherever the main process is at that time: mostly when it waits for a batch, but also in the midst
    of a training step.

    Raises:
        WorkerDiedError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        message = " ".join(str(error).split())
        if not message.startswith("DataLoader worker (pid"):
            raise
        raise WorkerDiedError(
            f"{message.removesuffix('.')}: a process that decodes images has died, mostly for want of memory; "
            "allowed: fewer workers, or 0 to decode in the main process"
        ) from error


class ImageLoader(DataLoader):
    """A DataLoader that chooses the number of its workers, and reports in one line that one has died.

    Torch's own draws a seed from the global generator in every iteration, at the first `next` or before it, once or,
    with workers that persist, now and then. This one has a generator for it: a model that is trained draws the same
    numbers whatever is loaded besides.

    Args:
        view: a data set with a length.
        batches: a batch sampler, or a list of batches.
        workers: processes that decode; for None as many as this rank has processors, 8 at most, and none for few
            images.
        persistent: keep the workers from one iteration to the next.
    """

    def __init__(self, view: Any, batches: Any, *, workers: int | None, pin_memory: bool, persistent: bool):
        if workers is None:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = 0 if len(view) < _SMALL else max(1, min(8, _processors() // ranks_here))
        persistent = persistent and workers > 0
        super().__init__(
            view,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=persistent,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:
        with explain_dead_worker():
            yield from super().__iter__()


def _processors() -> int:
    """Processors that this process may use; macOS tells only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
