"""The same answers by other means: dense Jacobians and direct solves in float64."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def newton(f: Callable[[Tensor], Tensor], z: Tensor, *, steps: int = 8) -> Tensor:
    """The fixed point of each sample `(1, ...)` by Newton's method with a dense Jacobian."""
    roots = []
    for i in range(len(z)):
        zi = z[i : i + 1].detach()
        for _ in range(steps):
            residual = (f_of_sample(f, i, z)(zi) - zi).flatten()
            J = dense_jacobian(f_of_sample(f, i, z), zi)
            zi = zi + torch.linalg.solve(torch.eye(len(J), dtype=J.dtype) - J, residual).view_as(zi)
        roots.append(zi)
    return torch.cat(roots)


def f_of_sample(f: Callable[[Tensor], Tensor], i: int, z: Tensor) -> Callable[[Tensor], Tensor]:
    """f of sample i alone: the others are held at `z`."""

    def alone(zi: Tensor) -> Tensor:
        return f(torch.cat([z[:i], zi, z[i + 1 :]]))[i : i + 1]

    return alone


def dense_jacobian(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """`d f / d z` as a matrix over all elements."""
    J = torch.autograd.functional.jacobian(f, z.detach())
    assert isinstance(J, Tensor)
    return J.reshape(z.numel(), z.numel())


def implicit_gradients(cell: nn.Module, x: Tensor, z_star: Tensor, g: Tensor) -> list[Tensor]:
    """`g^T (I - J)^{-1} df/d(x, parameters)`, with one dense solve over the whole batch."""
    J = dense_jacobian(lambda z: cell(z, x), z_star)
    u = torch.linalg.solve(torch.eye(len(J), dtype=J.dtype) - J.T, g.flatten()).view_as(g)
    return vjp_of_inputs(cell, x, z_star, u)


def phantom_gradients(
    cell: nn.Module, x: Tensor, z_star: Tensor, g: Tensor, *, steps: int, damping: float
) -> list[Tensor]:
    """`g^T damping sum_i ((1 - damping) I + damping J)^i df/d(x, parameters)`, summed with dense matrices."""
    J = dense_jacobian(lambda z: cell(z, x), z_star)
    M = (1 - damping) * torch.eye(len(J), dtype=J.dtype) + damping * J
    series = sum(torch.linalg.matrix_power(M, i) for i in range(steps))
    u = damping * (series.T @ g.flatten()).view_as(g)
    return vjp_of_inputs(cell, x, z_star, u)


def vjp_of_inputs(cell: nn.Module, x: Tensor, z: Tensor, u: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(cell(z.detach(), x), [x, *cell.parameters()], u))


def relative_error(values: list[Tensor], references: list[Tensor]) -> float:
    """The largest relative error, in norm, over a list of tensors."""
    pairs = zip(values, references, strict=True)
    return torch.stack([(v - r).norm() / r.norm().clamp_min(1e-300) for v, r in pairs]).max().item()  # keeps a NaN
