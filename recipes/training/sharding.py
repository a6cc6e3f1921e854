"""Helpers for replicated (DDP) and sharded (FSDP2) training.

A sharded model is never evaluated itself: its forward is a collective, and ranks do not have equally many batches to
evaluate. Its weights are gathered into an unsharded copy, which is measured and saved like any timm model.
"""

import os
import sys
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from recipes.errors import UserError, check, user_errors


def start_accelerator(*, deterministic: bool = True, **settings: Any) -> Accelerator:
    """Create an Accelerator with these settings, and with FSDP2 wherever `accelerate launch --use_fsdp` asks for it.

    Args:
        deterministic: makes a GPU sum in one order, as a CPU does; an operation that cannot is told by a warning.
        settings: of the Accelerator.

    Raises:
        UserError: a precision that the device does not have, two numbers of accumulation steps, or FSDP1, which has no
            shards to save by parameter.
    """
    with user_errors():
        accelerator = Accelerator(**settings)
    precision, device = accelerator.mixed_precision, accelerator.device.type
    if deterministic and device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins, which it has not yet
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    check(precision != "fp16" or accelerator.native_amp, "mixed_precision", precision, f"no or bf16 on {device}")
    steps, wanted = accelerator.gradient_accumulation_steps, settings.get("gradient_accumulation_steps", 1)
    given = f"{steps}, as `accelerate launch` has it, or 1"
    check(wanted in (1, steps), "gradient_accumulation_steps", wanted, given)
    if accelerator.num_processes == 1 and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        print(
            "warning: this is one process: `accelerate launch --cpu` needs MPI for more. Without MPI: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/train.py ...",
            file=sys.stderr,
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true" or accelerator.num_processes == 1:
        return accelerator
    state: Any = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError(f"fsdp_version is {plugin.fsdp_version}; allowed: 2, by --fsdp_version 2")
    # All ranks build the same weights from the seed. Loading them from one fails in accelerate 1.15 on models with
    # buffers, for which it expects shards.
    plugin.cpu_ram_efficient_loading = False
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # where accelerate replicates without a word
        state.fsdp_plugin = plugin
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def unsharded_copy(net: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the model to measure and save: the model itself, or a copy if `prepare` is to shard it."""
    return deepcopy(net) if accelerator.distributed_type == DistributedType.FSDP else net


@torch.no_grad()
def gather(net: nn.Module, copy: nn.Module) -> None:
    """Copy the weights of a sharded model into its copy; to be called on all ranks."""
    if copy is not net:
        mine = copy.state_dict()
        for name, value in net.state_dict().items():
            mine[name].copy_(whole(value))


def whole(tensor: Tensor) -> Tensor:
    """Gather the whole of a tensor that may be a shard; to be called on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a whole tensor as another one is, if it is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
