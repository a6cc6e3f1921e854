"""Samplers of a loader: those that draw a sample more than once, and what they pad the last batch with."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nc_probe.moments.ranks import is_distributed

__all__ = ["check_once", "counted", "samplers"]


def samplers(loader: Any) -> Iterator[Any]:
    """Yield the samplers that a loader draws from, those inside others too."""
    inner = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    seen: list[Any] = []
    while inner:
        sampler = inner.pop()
        if sampler is None or any(sampler is other for other in seen):
            continue
        seen.append(sampler)
        yield sampler
        inner += [getattr(sampler, "sampler", None), getattr(sampler, "batch_sampler", None)]


def check_once(loader: Iterable[Any]) -> None:
    """Check that a loader shows no sample twice, as far as its samplers say.

    Raises:
        ValueError: it draws with replacement or repeats, or pads what cannot be told from the rest.
    """
    for sampler in samplers(loader):
        if getattr(sampler, "replacement", False) or getattr(sampler, "num_repeats", 1) > 1:
            raise ValueError(
                f"loader must show every sample once, got one with a {type(sampler).__name__} that repeats some: give "
                "a loader of the same data set without it"
            )
    dataset = getattr(loader, "dataset", None)
    if is_distributed() and type(dataset).__name__ == "IterableDatasetShard":
        raise ValueError(
            "loader must show every sample once, got an iterable data set of unknown length that accelerate pads on "
            "the last rank: give each rank a loader of its own samples"
        )


def counted(loader: Any, size: int, before: int) -> Tensor | None:
    """Tell which samples of a batch are not duplicates that make all ranks have equally many.

    Known are loaders that accelerate has prepared, and samplers that deal out samples in turn, such as torch's
    `DistributedSampler` and timm's `OrderedDistributedSampler`.

    Args:
        loader: which has just given the batch.
        size: B, samples in the batch.
        before: samples that it has given this rank before.

    Returns:
        A mask (B,) bool; None if all count.
    """
    if hasattr(loader, "end_of_dataloader"):
        even = all(getattr(sampler, "even_batches", True) for sampler in samplers(loader))
        if not (loader.end_of_dataloader and loader.remainder > 0 and even):
            return None
        # Batches of all ranks, one after the other, hold `remainder` samples and then duplicates.
        known = [s.process_index for s in samplers(loader) if hasattr(s, "process_index")]
        rank = known[0] if known else dist.get_rank() if is_distributed() else 0
        return rank * size + torch.arange(size) < loader.remainder
    for sampler in samplers(loader):
        if all(hasattr(sampler, name) for name in ("dataset", "num_replicas", "rank", "total_size")):
            turn = sampler.rank + (before + torch.arange(size)) * sampler.num_replicas
            return turn < len(sampler.dataset) if sampler.total_size > len(sampler.dataset) else None
    return None
