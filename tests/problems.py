"""Fixed-point problems with known behaviour, shared by the tests of solvers and gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_deq.models.deq_resnet import ResidualCell

Map = Callable[[Tensor], Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Linear:
    """`f(z) = z A^T + b` with `A` a random rotation times `radius`: every eigenvalue has that modulus."""

    size: int = 6
    batch: int = 4
    radius: float = 0.8
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __post_init__(self) -> None:
        rng = generator(self.seed)
        q, _ = torch.linalg.qr(torch.randn(self.size, self.size, generator=rng, dtype=torch.float64))
        self.A = (self.radius * q).to(self.dtype)
        self.b = torch.randn(self.batch, self.size, generator=rng, dtype=torch.float64).to(self.dtype)
        self.z0 = torch.zeros_like(self.b)

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.A.T + self.b

    @property
    def solution(self) -> Tensor:
        return torch.linalg.solve(torch.eye(self.size, dtype=torch.float64) - self.A.double(), self.b.double().T).T


class AttentionCell(nn.Module):
    """`f(z, x) = LayerNorm(x + gain * softmax(q k^T) v)` on tokens `(B, T, D)`: dense coupling within a sample."""

    def __init__(self, size: int = 4, gain: float = 0.5) -> None:
        super().__init__()
        self.qkv = nn.Linear(size, 3 * size)
        self.norm = nn.LayerNorm(size)
        self.gain = gain

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        q, k, v = self.qkv(z).chunk(3, dim=-1)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.norm(x + self.gain * (weights @ v))


def conv_cell(channels: int = 4) -> nn.Module:
    cell = ResidualCell(channels, width=channels, bottleneck=False, num_groups=2)
    cell.init_weights()
    return cell


def cell_and_input(name: str, *, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A cell, "conv" or "attention", and an input, large enough that the plain iteration contracts well."""
    torch.manual_seed(0)
    cell, shape = (conv_cell(), (4, 2, 2)) if name == "conv" else (AttentionCell(), (3, 4))
    return cell.to(dtype), (4 * torch.randn(batch, *shape, dtype=torch.float64)).to(dtype).requires_grad_()
