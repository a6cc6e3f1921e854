r"""Anderson acceleration (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 2011, type II).

With residuals $F_i = f(z_i) - z_i$ of the last $m$ iterates, the next iterate is a mixture

$$ z_{k+1} = \sum_i \alpha_i \,\bigl(z_i + \beta F_i\bigr), \qquad
   \alpha = \arg\min_{\sum \alpha_i = 1} \Bigl\| \sum_i \alpha_i F_i \Bigr\|^2 + \rho \sum_i \alpha_i^2 \|F_i\|^2, $$

whose solution is $\alpha \propto H^{-1} 1$ with $H = F F^\top + \rho\,\mathrm{diag}(F F^\top)$. The ridge $\rho$ is
relative to each residual's own length, so the answer depends neither on the scale of $z$ nor on how long the residuals
were at the start: a ridge relative to the largest would drown the newest, and smallest, ones. A sample whose $H$ is too
bad to be solved takes the damped step $z + \beta F$ and restarts its memory.
"""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from timm_deq.solvers.base import (
    Solver,
    can_read_without_sync,
    check_at_least,
    check_integer,
    check_number,
    is_differentiated,
    is_tracing,
    row_times,
    set_slot,
)


class AndersonState(NamedTuple):
    """The state of Anderson acceleration after an update.

    Attributes:
        residuals: The last residuals `F`, `(B, m, D)`.
        images: `z + beta F` of the same iterates, `(B, m, D)`.
        gram: Products of the residuals, `(B, m, m)`; that of a discarded one with itself is huge.
        step: Updates done.
    """

    residuals: Tensor
    images: Tensor
    gram: Tensor
    step: int


@dataclass(frozen=True)
class Anderson(Solver):
    r"""Anderson acceleration.

    Args:
        tol: See :class:`Solver`.
        max_steps: See :class:`Solver`.
        atol: See :class:`Solver`.
        memory: Iterates mixed, $m$, at least 1; 1 is the Picard iteration. Costs 2 states of memory each.
        ridge: Regularisation $\rho$ of the mixture, at least 0.
        mixing: The step $\beta$ along the mixed residual, in (0, 2).
        check_every: See :class:`Solver`.
        while_loop: See :class:`Solver`.

    >>> from timm_deq import Anderson, Picard, fixed_point
    >>> solvers = [Picard(tol=1e-6, max_steps=50), Anderson(tol=1e-6, max_steps=50, memory=3)]
    >>> [fixed_point(torch.cos, torch.zeros(1, 1), solver).steps.item() for solver in solvers]
    [36, 6]
    """

    _: KW_ONLY
    memory: int = 5
    ridge: float = 1e-4
    mixing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("memory", self.memory, 1)
        check_at_least("ridge", self.ridge, 0)
        check_number("mixing", self.mixing)
        if not 0 < self.mixing < 2:
            raise ValueError(f"mixing must be in (0, 2), got {self.mixing!r}")

    @property
    def period(self) -> int:
        return self.memory

    def init(self, z: Tensor) -> AndersonState:
        # Products with slots not yet filled are not used; in a recorded program, even unused ones must be numbers.
        history = z.new_zeros if is_tracing(z) else z.new_empty
        shape = (z.shape[0], self.memory, z.shape[1])
        return AndersonState(history(shape), history(shape), z.new_zeros((*shape[:2], self.memory)), 0)

    def update(self, z: Tensor, fz: Tensor, state: AndersonState, active: Tensor) -> tuple[Tensor, AndersonState]:
        residuals, images, gram, step = state
        slot, filled = step % self.memory, step + 1 if step < self.memory else self.memory
        recorded = is_differentiated(residuals, z, fz)
        if recorded and step == 0:  # slots not yet filled must be numbers where autograd multiplies them by zero
            residuals, images = torch.zeros_like(residuals), torch.zeros_like(images)
        computed_in_slot = not (recorded or is_tracing(z))  # a compiler takes no view as `out`
        residual = torch.sub(fz, z, out=residuals[:, slot]) if computed_in_slot else fz - z
        image = fz if self.mixing == 1 else z + self.mixing * residual
        residuals = residuals if computed_in_slot else set_slot(residuals, slot, residual)
        images = set_slot(images, slot, image)
        # (B, D) times (B, D, m): on a CPU several times faster than the transposed product
        row = row_times(residual, residuals.transpose(1, 2))
        gram = set_slot(set_slot(gram, slot, row).mT, slot, row).mT
        if filled == 1:
            return image, AndersonState(residuals, images, gram, step + 1)
        matrix = gram[:, :filled, :filled]
        if recorded:  # that of a finished sample may be singular, and its unused derivative NaN
            matrix = torch.where(active[:, None, None], matrix, torch.eye(filled, dtype=gram.dtype, device=gram.device))
        alpha = self._mixture(matrix, filled)
        # Large weights of both signs cancel: half of the digits must be left.
        eps = torch.finfo(torch.float32 if isinstance(z, fx.Proxy) else z.dtype).eps
        usable = alpha.abs().sum(dim=1) <= eps**-0.5  # false for NaN
        if not (can_read_without_sync(usable) and bool(usable.all())):
            alpha, gram = _restart(~usable, slot, alpha, gram, recorded)
        mixed = row_times(alpha, images[:, :filled])
        return mixed, AndersonState(residuals, images, gram, step + 1)

    def _mixture(self, gram: Tensor, filled: int) -> Tensor:
        """Return the weights `(B, n)` that sum to one for n residuals; not finite where the matrix is singular."""
        # Scaled to unit diagonal, the matrix is as well conditioned as the angles between the residuals allow.
        scale = gram.diagonal(dim1=1, dim2=2).rsqrt()
        matrix = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        if is_differentiated(matrix):
            eye = torch.eye(filled, dtype=torch.bool, device=gram.device)
            matrix = torch.where(eye, 1 + self.ridge, matrix)
        else:
            matrix.diagonal(dim1=1, dim2=2).fill_(1 + self.ridge)
        weights = scale * _solve(matrix, scale, filled)
        return weights / weights.sum(dim=1, keepdim=True)


def _restart(rows: Tensor, slot: int, alpha: Tensor, gram: Tensor, recorded: bool) -> tuple[Tensor, Tensor]:
    """Give all weight to the newest residual of the given rows `(B,)`, and boundless length, so none, to the others."""
    boundless = torch.finfo(torch.float32).max
    if recorded:
        newest = torch.arange(gram.shape[1], device=gram.device) == slot
        alpha = torch.where(rows.unsqueeze(1), newest[: alpha.shape[1]].to(alpha.dtype), alpha)
        return alpha, torch.where(torch.diag(~newest) & rows[:, None, None], boundless, gram)
    square = gram[:, slot, slot].clone()
    gram.diagonal(dim1=1, dim2=2).masked_fill_(rows.unsqueeze(1), boundless)
    gram[:, slot, slot] = square
    alpha.masked_fill_(rows.unsqueeze(1), 0.0)[:, slot].masked_fill_(rows, 1.0)
    return alpha, gram


def _solve(matrix: Tensor, rhs: Tensor, n: int) -> Tensor:
    """Solve small positive definite systems `(B, n, n)`, `(B, n)`; a singular one gives values that are not finite."""
    if not is_tracing(matrix):
        return torch.linalg.solve_ex(matrix, rhs)[0]
    # Gauss-Jordan, spelt out: ONNX has no linear solve, and a compiler fuses these few operations into one kernel.
    table = torch.cat([matrix, rhs.unsqueeze(2)], dim=2)
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    for i in range(n):
        pivot_row = table[:, i : i + 1] / table[:, i : i + 1, i : i + 1]
        table = table - (table[:, :, i : i + 1] - eye[:, i : i + 1]) * pivot_row
    return table[:, :, -1]
