"""Collectives of torch.distributed, which do nothing with one rank or without it."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_max", "all_reduce_sum", "broadcast_each", "is_distributed"]


def is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    """Tell whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, on the device of `tensor`."""
    return _all_reduce(tensor, dist.ReduceOp.SUM) if is_distributed() else tensor


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """Find the largest over ranks of each number."""
    if not is_distributed() or not values:
        return list(values)
    return _all_reduce(torch.tensor(values), dist.ReduceOp.MAX).tolist()


def broadcast_each(state: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Iterator[list[Tensor]]:
    """Yield the state of each rank, in the order of ranks, on every rank: tensors of the same shapes everywhere."""
    if not is_distributed(group):
        yield list(state)
        return
    for rank in range(dist.get_world_size(group)):
        turn = [tensor.to(_comm_device(group), copy=True) for tensor in state]
        for tensor in turn:
            if tensor.numel():
                dist.broadcast(tensor, group=group, group_src=rank)
        yield [tensor.to(original.device) for tensor, original in zip(turn, state, strict=True)]


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    sent = tensor.to(_comm_device(), copy=True)
    dist.all_reduce(sent, op)
    return sent.to(tensor.device)


def _comm_device(group: dist.ProcessGroup | None = None) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"  # NCCL carries no CPU tensors
