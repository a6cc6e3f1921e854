"""What the ranks of torch.distributed tell each other; with one rank, or without it, nothing."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["in_turn", "largest", "several", "total"]


def several() -> bool:
    """Whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total(tensor: Tensor) -> Tensor:
    """The sum over ranks, on the device of `tensor`."""
    return _reduced(tensor, dist.ReduceOp.SUM) if several() else tensor


def largest(values: Sequence[int]) -> list[int]:
    """The largest over ranks of each number."""
    return _reduced(torch.tensor(values), dist.ReduceOp.MAX).tolist() if several() and values else list(values)


def in_turn(state: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The state of each rank, in the order of ranks, on every rank: tensors of the same shapes everywhere."""
    if not several():
        yield list(state)
        return
    for rank in range(dist.get_world_size()):
        turn = [tensor.to(_wire(), copy=True) for tensor in state]
        for tensor in turn:
            if tensor.numel():
                dist.broadcast(tensor, src=rank)
        yield [tensor.to(original.device) for tensor, original in zip(turn, state, strict=True)]


def _reduced(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    sent = tensor.to(_wire(), copy=True)
    dist.all_reduce(sent, op)
    return sent.to(tensor.device)


def _wire() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"  # NCCL carries no CPU tensors
