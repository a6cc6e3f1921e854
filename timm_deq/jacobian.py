r"""Products with the transposed Jacobian $J^\top = (\partial f / \partial z)^\top$ of a map at a point."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from timm_deq.fixed_point import Map
from timm_deq.solvers.base import is_exporting
from timm_deq.transforms import func_transforms


class TransposedJacobian(NamedTuple):
    r"""The linear operator $u \mapsto J^\top u$, by products along one recorded evaluation of f.

    Attributes:
        z: The point, `(B, ...)`, a leaf that requires a gradient.
        fz: `f(z)`, recorded by autograd.
    """

    z: Tensor
    fz: Tensor

    @classmethod
    def at(cls, f: Map, z: Tensor) -> "TransposedJacobian":
        """Evaluate f once, recorded by autograd, at a leaf with the value of `z` `(B, ...)`.

        Raises:
            RuntimeError: Inside a transform of `torch.func` or a recorded program, which knows no such leaf.
        """
        if isinstance(z, fx.Proxy) or is_exporting() or (not torch.compiler.is_compiling() and func_transforms()):
            raise RuntimeError(
                "products with a Jacobian, as of JacobianPenalty and SolveLog(spectral_steps=...), must not be taken"
                " inside transforms of torch.func or programs that are recorded: call these outside of their context"
            )
        with torch.enable_grad(), _saved_as_they_are():
            z = z.detach().requires_grad_()
            return cls(z, f(z.view_as(z)))  # hooks on a leaf inside f would fail: `FlopCounterMode` sets some

    @property
    def is_zero(self) -> bool:
        """Whether `f(z)` depends on nothing that requires a gradient, not even on z."""
        return not self.fz.requires_grad

    def __call__(self, u: Tensor, *, create_graph: bool = False) -> Tensor:
        """Return the product with `u` `(B, ...)`, in the dtype of z; differentiable with `create_graph`."""
        (product,) = torch.autograd.grad(
            self.fz, self.z, u.to(self.fz.dtype), retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        return product


def _saved_as_they_are() -> AbstractContextManager:
    """Disable the caller's hooks on saved tensors, which are called again at each product.

    Activation checkpointing would then evaluate all that it covers again, and offloading copy from the host.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    return nullcontext() if hooks is None else saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> tuple[Tensor, int | None]:
    return tensor, None if tensor.is_inference() else tensor._version


def _unpack(packed: tuple[Tensor, int | None]) -> Tensor:
    """Check what autograd itself checks where there are no hooks."""
    tensor, version = packed
    if version is not None and tensor._version != version:
        raise RuntimeError(
            "a tensor that the gradient of an equilibrium needs must not be changed in place between its solve and its"
            f" backward pass, got one of shape {tuple(tensor.shape)} that was"
        )
    return tensor
