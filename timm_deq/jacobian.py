r"""Products with the transposed Jacobian $J^\top = (\partial f / \partial z)^\top$ of a map at a point."""

from typing import NamedTuple

import torch
from torch import Tensor

from timm_deq.fixed_point import Map


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
        """Evaluate f once, recorded by autograd, at a leaf with the value of `z` `(B, ...)`."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return cls(z, f(z))

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
