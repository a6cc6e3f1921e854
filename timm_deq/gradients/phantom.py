r"""Phantom gradient: a few recorded, damped steps (Geng et al., "On Training Implicit Models", NeurIPS 2021, Eq. 8).

From the equilibrium $z^*$, held constant, $z_{i+1} = (1 - \tau) z_i + \tau f(z_i)$ is run $k$ times and differentiated:

$$ \frac{\partial z_k}{\partial \theta} = \tau \sum_{i=0}^{k-1} \bigl((1-\tau) I + \tau J\bigr)^i \,
   \frac{\partial f}{\partial \theta}, $$

a truncated, damped Neumann series of $(I - J)^{-1} \partial f / \partial \theta$, to which it converges as $k$ grows
where the damped iteration contracts. $k = 1$, $\tau = 1$ is Jacobian-free backpropagation, JFB (Fung et al., AAAI
2022). So are its derivatives of higher order, in either mode: those of the recorded steps, with $z^*$ held constant.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor

from timm_deq.fixed_point import Map
from timm_deq.gradients.base import BackwardCallback, Gradient, with_gradient_of
from timm_deq.solvers.base import State, check_integer, check_number


@dataclass(frozen=True)
class Phantom(Gradient):
    r"""Phantom gradient.

    Args:
        steps: Damped steps recorded, $k$, at least 1.
        damping: The weight $\tau$ of f in each, in (0, 1].

    Raises:
        ValueError: A setting out of its range.
    """

    attaches_tangent: ClassVar[bool] = True

    steps: int = 5
    _: KW_ONLY
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        check_number("damping", self.damping)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping!r}")

    def attach(
        self,
        f: Map,
        z_star: Tensor,
        *,
        state: State | None = None,
        start: Tensor | None = None,
        report: BackwardCallback | None = None,
        inputs: Sequence[Tensor] = (),
    ) -> Tensor:
        z = z_star
        for _ in range(self.steps):
            z = z + self.damping * (f(z) - z)
        return with_gradient_of(z_star, z)
