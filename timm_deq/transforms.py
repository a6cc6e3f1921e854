"""The derivative transforms that are active around a solve: forward mode, and those of `torch.func`."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad


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


def func_transforms() -> set[str]:
    """Return the transforms of `torch.func` that are active, of "Grad" (also of vjp and jacrev), "Jvp" and "Vmap"."""
    stack = _functorch.get_interpreter_stack()
    return {level.key().name for level in stack} if stack else set()


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
