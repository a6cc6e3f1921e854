r"""Neumann gradient: the series of the inverse, cut off (Geng et al., "On Training Implicit Models", NeurIPS 2021).

$$ u = \sum_{i=0}^{n-1} (J^\top)^i g \;\approx\; (I - J^\top)^{-1} g $$

along one evaluation of f, so its memory does not grow with $n$, where the phantom gradient's does. The remainder is
$(J^\top)^n u^*$: it vanishes as $n$ grows where the spectral radius of $J$ is below 1. One term is Jacobian-free
backpropagation (JFB).
"""

from dataclasses import dataclass

from torch import Tensor

from timm_deq.fixed_point import Map
from timm_deq.gradients.adjoint import AdjointGradient
from timm_deq.solvers.base import State, check_integer


@dataclass(frozen=True)
class Neumann(AdjointGradient):
    """Neumann gradient.

    Args:
        terms: Terms of the series, $n$, at least 1; each beyond the first costs a product with the Jacobian.

    Raises:
        ValueError: A setting out of its range.
    """

    terms: int = 5

    def __post_init__(self) -> None:
        check_integer("terms", self.terms, 1)

    def solve(self, system: Map, g: Tensor, start: Tensor | None, state: State | None, *, transposed: bool) -> Tensor:
        u = g
        for _ in range(self.terms - 1):
            u = system(u)
        return u
