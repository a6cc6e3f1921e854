r"""The reversible iteration (McCallum, Arora & Foster, "Reversible Deep Equilibrium Models", arXiv 2509.12917, 2025).

Two coupled states take turns, $y_{n+1} = (1-\beta)\,y_n + \beta f(x_n)$ and
$x_{n+1} = (1-\beta)\,x_n + \beta f(y_{n+1})$. Numbered by evaluations, $p_{2n} = x_n$ and $p_{2n-1} = y_n$, they are
one recurrence of two terms,

$$ p_{k+1} = (1-\beta)\, p_{k-1} + \beta f(p_k), \qquad p_{-1} = p_0, $$

which runs backwards as well as forwards: $p_{k-1} = (p_{k+1} - \beta f(p_k)) / (1-\beta)$. So the gradient
through all of its steps needs none of them stored. The division amplifies rounding, hence the state in float64.
"""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from timm_deq.solvers.base import Solver, check_number, where_rows


class ReversibleState(NamedTuple):
    """The state of the reversible iteration after an update.

    Attributes:
        previous: The iterate before the last one, $p_{k-1}$, `(B, D)`.
        last: The last iterate that a sample reached before it finished, $p_k$, `(B, D)`.
        index: Its number $k$, `(B,)`, int64.
    """

    previous: Tensor
    last: Tensor
    index: Tensor


@dataclass(frozen=True)
class ReversibleIteration(Solver):
    r"""The reversible iteration, for the gradient :class:`timm_deq.Reversible`.

    Converges where the Picard iteration contracts, at a rate between that of its damped form and its own.

    Args:
        tol: See :class:`Solver`.
        max_steps: See :class:`Solver`.
        atol: See :class:`Solver`.
        damping: The weight $\beta$ of f, in (0, 1). Reversing a step multiplies rounding by $1 / (1 - \beta)$.
        check_every: See :class:`Solver`.
        while_loop: See :class:`Solver`.
    """

    precision: ClassVar[torch.dtype] = torch.float64

    _: KW_ONLY
    damping: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("damping", self.damping)
        if not 0 < self.damping < 1:
            raise ValueError(f"damping must be in (0, 1), got {self.damping!r}")

    def init(self, z: Tensor) -> ReversibleState:
        return ReversibleState(z, z, torch.zeros_like(z[:, 0], dtype=torch.long))

    def update(self, z: Tensor, fz: Tensor, state: ReversibleState, active: Tensor) -> tuple[Tensor, ReversibleState]:
        z_next = (1 - self.damping) * state.previous + self.damping * fz
        previous, last = where_rows(active, z, state.previous), where_rows(active, z_next, state.last)
        return z_next, ReversibleState(previous, last, state.index + active)
