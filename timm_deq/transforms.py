"""The derivative transforms that are active around a solve: forward mode, and those of `torch.func`."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def forward_mode(z: Tensor) -> bool:
    """Return whether tangents may be propagated: inside `forward_ad.dual_level` or `torch.func.jvp`."""
    return not isinstance(z, fx.Proxy) and tangents_enabled()


def tangents_enabled() -> bool:
    """Return the same outside programs that `torch.fx` records."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def without_tangents() -> AbstractContextManager:
    """Disable forward mode, as `no_grad` disables reverse mode."""
    return forward_ad._set_fwd_grad_enabled(False)


def tangent_of(z: Tensor) -> Tensor | None:
    """Return the tangent of a dual tensor; None of another."""
    return forward_ad.unpack_dual(z).tangent


def with_tangent(z: Tensor, tangent: Tensor | None) -> Tensor:
    """Return `z` as a dual tensor."""
    return z if tangent is None else forward_ad.make_dual(z, tangent.to(z.dtype))


def func_transforms() -> list[str]:
    """Return the active transforms of `torch.func`, outermost first: "Grad" (also of vjp, jacrev), "Jvp", "Vmap"."""
    stack = _functorch.get_interpreter_stack()  # None outside of all
    return [level.key().name for level in stack] if stack else []


def inside_vmap() -> bool:
    """Return whether a transform batches the program; false in a program that is compiled."""
    return not torch.compiler.is_compiling() and "Vmap" in func_transforms()


def requires_grad(tensor: Tensor) -> bool:
    """Return whether autograd, or any transform in reverse mode, records what is done with a tensor.

    `tensor.requires_grad` alone tells of the innermost transform.
    """
    while not tensor.requires_grad:
        if torch.compiler.is_compiling() or not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def inside_backward() -> bool:
    """Return whether a backward pass is going on: a forward in it is one that a checkpoint repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recorded_by_proxies() -> bool:
    """Return whether `make_fx`, on which `torch.func.linearize` rests, records the program."""
    return torch._C._get_dispatch_mode(_PROXY) is not None


def refuse_reverse(z: Tensor, message: str, *anchors: Tensor) -> Tensor:
    """Return `z`, whose reverse-mode derivative is an error, connected to `anchors` that require a gradient."""
    return _Refused.apply(z, message, *anchors)


class _Refused(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, message: str, *anchors: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)
