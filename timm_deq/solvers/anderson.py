r"""Anderson acceleration (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 2011, type II).

With residuals $F_i = f(z_i) - z_i$ of the last $m$ iterates, the next iterate is a mixture

$$ z_{k+1} = \sum_i \alpha_i \,\bigl(z_i + \beta F_i\bigr), \qquad
   \alpha = \arg\min_{\sum \alpha_i = 1} \Bigl\| \sum_i \alpha_i F_i \Bigr\|^2 + \rho \sum_i \alpha_i^2 \|F_i\|^2, $$

whose solution is $\alpha \propto H^{-1} 1$ with $H = F F^\top + \rho\,\mathrm{diag}(F F^\top)$. The ridge $\rho$ is
relative to each residual's own length, so the answer depends neither on the scale of $z$ nor on how long the residuals
were at the start: a ridge relative to the largest would drown the newest, and smallest, ones.
"""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from timm_deq.solvers.base import Solver, State, check_at_least, is_static, write


@dataclass(frozen=True)
class Anderson(Solver):
    r"""Anderson acceleration.

    Args:
        tol: See :class:`Solver`.
        max_steps: See :class:`Solver`.
        memory: Iterates mixed, $m$, at least 1; 1 is the Picard iteration. Costs 2 states of memory each.
        ridge: Regularisation $\rho$ of the mixture, at least 0.
        mixing: The step $\beta$ along the mixed residual, in (0, 2).
        check_every: See :class:`Solver`.
    """

    _: KW_ONLY
    memory: int = 5
    ridge: float = 1e-4
    mixing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("memory", self.memory, 1)
        check_at_least("ridge", self.ridge, 0)
        if not 0 < self.mixing < 2:
            raise ValueError(f"mixing must be in (0, 2), got {self.mixing!r}")

    def init(self, z: Tensor) -> State:
        # Two histories, F and G = z + mixing * F, and the Gram matrix of F, of which each step renews one row.
        residuals = z.new_zeros((z.shape[0], self.memory, z.shape[1]))
        gram = z.new_zeros((z.shape[0], self.memory, self.memory))
        return residuals, torch.zeros_like(residuals), gram, 0

    def update(self, z: Tensor, fz: Tensor, state: State) -> tuple[Tensor, State]:
        residuals, images, gram, step = state
        slot, filled = step % self.memory, min(step + 1, self.memory)
        residual = fz - z
        image = fz if self.mixing == 1 else z + self.mixing * residual
        residuals, images = write(residuals, slot, residual), write(images, slot, image)
        # (B, 1, D) @ (B, D, m): on a CPU several times faster than the transposed product
        row = (residual.unsqueeze(1) @ residuals.transpose(1, 2)).squeeze(1)
        gram = write(write(gram, slot, row).transpose(1, 2), slot, row).transpose(1, 2)
        state = residuals, images, gram, step + 1
        if filled == 1:
            return image, state
        alpha, usable = self._mixture(gram[:, :filled, :filled], filled)
        mixed = (alpha.unsqueeze(1) @ images[:, :filled]).squeeze(1)
        return torch.where(usable, mixed, image), state

    def _mixture(self, gram: Tensor, filled: int) -> tuple[Tensor, Tensor]:
        """The weights `(B, n)` that sum to one for n residuals, and whether they are usable, `(B, 1)`."""
        # Scaled to unit diagonal, the matrix is as well conditioned as the angles between the residuals allow.
        tiny = torch.finfo(torch.float32).tiny
        scale = gram.diagonal(dim1=1, dim2=2).clamp_min(tiny).rsqrt()
        scale = scale / scale.amax(dim=1, keepdim=True)
        eye = torch.eye(filled, dtype=gram.dtype, device=gram.device)
        matrix = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        diagonal = matrix.diagonal(dim1=1, dim2=2).amax(dim=1).clamp_min(tiny)
        matrix = matrix / diagonal[:, None, None] + self.ridge * eye
        weights = scale * _solve(matrix, scale, filled)
        alpha = weights / weights.sum(dim=1, keepdim=True)
        usable = alpha.isfinite().all(dim=1, keepdim=True)
        return torch.where(usable, alpha, torch.zeros_like(alpha)), usable


def _solve(matrix: Tensor, rhs: Tensor, n: int) -> Tensor:
    """Solves small positive definite systems `(B, n, n)`, `(B, n)`; a singular one gives values that are not finite."""
    if not is_static(matrix):
        return torch.linalg.solve_ex(matrix, rhs)[0]
    # Gauss-Jordan, spelt out: ONNX has no linear solve, and a compiler fuses these few operations into one kernel.
    table = torch.cat([matrix, rhs.unsqueeze(2)], dim=2)
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    for i in range(n):
        pivot_row = table[:, i : i + 1] / table[:, i : i + 1, i : i + 1]
        table = table - (table[:, :, i : i + 1] - eye[:, i : i + 1]) * pivot_row
    return table[:, :, -1]
