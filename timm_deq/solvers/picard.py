r"""Picard iteration, damped: $z_{k+1} = z_k + \beta\,(f(z_k) - z_k)$.

With $\beta = 1$ this is the plain fixed-point iteration, which converges linearly where $f$ contracts (Banach 1922).
Krasnoselskii (1955) damps it with $0 < \beta < 1$, which tames a map whose Jacobian has eigenvalues near $-1$.
"""

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from timm_deq.solvers.base import Solver, State, check_number


@dataclass(frozen=True)
class Picard(Solver):
    r"""Picard iteration.

    Args:
        tol: See :class:`Solver`.
        max_steps: See :class:`Solver`.
        atol: See :class:`Solver`.
        damping: The step $\beta$ taken along the residual, in (0, 2).
        check_every: See :class:`Solver`.
        while_loop: See :class:`Solver`.
    """

    _: KW_ONLY
    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("damping", self.damping)
        if not 0 < self.damping < 2:
            raise ValueError(f"damping must be in (0, 2), got {self.damping!r}")

    def init(self, z: Tensor) -> State:
        return ()

    def update(self, z: Tensor, fz: Tensor, state: State, active: Tensor) -> tuple[Tensor, State]:
        return (fz if self.damping == 1 else z + self.damping * (fz - z)), state
