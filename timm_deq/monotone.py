r"""Monotone operator equilibria (Winston & Kolter, "Monotone operator equilibrium networks", NeurIPS 2020).

$z^* = \mathrm{relu}(W z^* + x)$ has one solution for every x where $I - W \succeq m I$ for an $m > 0$. All such W are

$$ W = (1 - m) I - A^\top A + B - B^\top. $$

The solution is a zero of the sum of two monotone operators, $(I - W) z - x$ and the normal cone of $z \ge 0$, which a
splitting method finds where the plain iteration may diverge. A splitting method is a cell's map run by Picard: so there
is one cell for each, and both find the same equilibrium of the same weights, which they keep under the same names.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from timm_deq.solvers.base import check_at_least


class Monotone(nn.Module):
    r"""Parametrisation `A, B -> W`, all `(n, n)`, such that $I - W \succeq m I$ (Proposition 1 of the paper).

    Args:
        monotonicity: The bound m, above 0.

    Raises:
        ValueError: `monotonicity` is not above 0.
    """

    def __init__(self, monotonicity: float) -> None:
        super().__init__()
        check_at_least("monotonicity", monotonicity, 0, strictly=True)
        self.monotonicity = monotonicity

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        return (1 - self.monotonicity) * _eye_like(A) - A.mT @ A + B - B.mT

    def right_inverse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `A, B` whose W is the nearest in the Frobenius norm: the symmetric part is projected."""
        symmetric = (1 - self.monotonicity) * _eye_like(W) - (W + W.mT) / 2
        values, vectors = torch.linalg.eigh(symmetric.to(torch.promote_types(W.dtype, torch.float32)))
        A = values.clamp_min(0).sqrt().unsqueeze(1) * vectors.mT
        return A.to(W.dtype), (W - W.mT) / 4


class Resolvent(nn.Module):
    r"""Parametrisation `W -> V`, both `(n, n)`: the resolvent $V = (I + \alpha (I - W))^{-1}$ of $I - W$.

    Args:
        step: The step $\alpha$, above 0.

    Raises:
        ValueError: `step` is not above 0.
    """

    def __init__(self, step: float) -> None:
        super().__init__()
        check_at_least("step", step, 0, strictly=True)
        self.step = step

    def forward(self, W: Tensor) -> Tensor:
        inverse = (1 + self.step) * _eye_like(W) - self.step * W
        return torch.linalg.inv(inverse.to(torch.promote_types(W.dtype, torch.float32))).to(W.dtype)


class ForwardBackward(nn.Module):
    r"""Forward-backward splitting: $f(z, x) = \mathrm{relu}(z + \alpha (W z + x - z))$ on states `(B, n)`.

    Its fixed point is $z^*$. f contracts for $0 < \alpha < 2 m / L^2$, L the largest singular value of $I - W$. The
    step is fixed while L grows in training: where the solves stop converging, take :class:`PeacemanRachford`.

    Args:
        features: Elements n of the state and of the injected input.
        monotonicity: See :class:`Monotone`.
        step: The step $\alpha$, above 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A setting out of its range.
    """

    def __init__(
        self,
        features: int,
        *,
        monotonicity: float = 1.0,
        step: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("step", step, 0, strictly=True)
        self.step = step
        self.linear = _monotone_linear(features, monotonicity, device=device, dtype=dtype)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Take one step for a state z and an injected input x, both `(B, n)`."""
        return F.relu(z + self.step * (self.linear(z) + x - z))


class PeacemanRachford(nn.Module):
    r"""Peaceman-Rachford splitting (Algorithm 2 of the paper) on an auxiliary state u, `(B, n)`.

    An iteration reflects u at either operator: with $z = \mathrm{relu}(u)$ and the resolvent V,

    $$ u' = 2 V (2 z - u + \alpha x) - (2 z - u), \qquad 2\,\mathrm{relu}(u) - u = |u|. $$

    At its fixed point $u^* = z^* + \alpha (W z^* + x - z^*)$, so $z^* = \mathrm{relu}(u^*)$:

    ```python
    layer = torch.nn.Sequential(Equilibrium(PeacemanRachford(64)), torch.nn.ReLU())
    ```

    f contracts for every $\alpha > 0$. Inverts one `(n, n)` matrix for each solve.

    Args:
        features: Elements n of the state and of the injected input.
        monotonicity: See :class:`Monotone`.
        step: The step $\alpha$, above 0; sets the speed, not the solution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A setting out of its range.
    """

    def __init__(
        self,
        features: int,
        *,
        monotonicity: float = 1.0,
        step: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.step = step
        self.linear = _monotone_linear(features, monotonicity, device=device, dtype=dtype)
        parametrize.register_parametrization(self.linear, "weight", Resolvent(step))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        """Take one iteration for a state u and an injected input x, both `(B, n)`."""
        reflected = u.abs()
        return 2 * self.linear(reflected + self.step * x) - reflected


def _monotone_linear(features: int, monotonicity: float, **dd: Any) -> nn.Linear:
    """Return a linear map by W, with A and B drawn as :class:`torch.nn.Linear` draws its weight."""
    linear = nn.Linear(features, features, bias=False, **dd)
    parametrize.register_parametrization(linear, "weight", Monotone(monotonicity))
    for original in linear.parameters():
        nn.init.kaiming_uniform_(original, a=math.sqrt(5))
    return linear


def _eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
