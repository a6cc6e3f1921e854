r"""Broyden's good method with limited memory (Broyden, Math. Comp. 1965; Bai, Kolter & Koltun, NeurIPS 2019, App. B).

Quasi-Newton on $g(z) = f(z) - z$: $z_{k+1} = z_k - B_k\, g(z_k)$, where $B_k \approx J_g^{-1}$ is kept as

$$ B_k = -I + \sum_i u_i v_i^\top, \qquad
   v^\top = \Delta z^\top B_{k}, \quad u = \frac{\Delta z - B_{k} \Delta g}{v^\top \Delta g}
   \qquad\text{(Sherman-Morrison on the secant condition } B_{k+1} \Delta g = \Delta z\text{)}. $$

The first step is thus a Picard step. When the memory is full, the oldest pair makes room for the newest.
"""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, fx

from timm_deq.solvers.base import Solver, State, check_at_least, write


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method.

    Args:
        tol: See :class:`Solver`.
        max_steps: See :class:`Solver`.
        memory: Rank-one terms kept, at least 1. Costs 2 states of memory each.
        check_every: See :class:`Solver`.
    """

    _: KW_ONLY
    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("memory", self.memory, 1)

    def init(self, z: Tensor) -> State:
        us = z.new_zeros((z.shape[0], self.memory, z.shape[1]))
        return us, torch.zeros_like(us), z, z, 0

    def update(self, z: Tensor, fz: Tensor, state: State) -> tuple[Tensor, State]:
        us, vs, z_last, g_last, step = state
        g = fz - z
        if step == 0:
            return fz, (us, vs, z, g, 1)
        slot, filled = (step - 1) % self.memory, min(step, self.memory)
        dz, dg = z - z_last, g - g_last
        used = min(step - 1, self.memory)
        if used == self.memory:  # the oldest pair leaves first, so that the new one satisfies the secant condition
            us = write(us, slot, torch.zeros_like(z))
        v = _apply(dz, vs[:, :used], us[:, :used])  # transposed: the roles of u and v change places
        b_dg = _apply(dg, us[:, :used], vs[:, :used])
        denominator = (v * dg).sum(dim=1, keepdim=True)
        # No secant, no update: a vanishing denominator, relative to its factors, would blow the inverse up.
        eps = torch.finfo(torch.float32 if isinstance(z, fx.Proxy) else z.dtype).eps
        lengths = torch.linalg.vector_norm(v, dim=1, keepdim=True) * torch.linalg.vector_norm(dg, dim=1, keepdim=True)
        usable = denominator.abs() > eps * lengths
        u = torch.where(usable, (dz - b_dg) / torch.where(usable, denominator, 1.0), 0.0)
        us, vs = write(us, slot, u), write(vs, slot, torch.where(usable, v, 0.0))
        z_next = z - _apply(g, us[:, :filled], vs[:, :filled])
        finite = z_next.isfinite().all(dim=1, keepdim=True)
        return torch.where(finite, z_next, fz), (us, vs, z, g, step + 1)


def _apply(x: Tensor, us: Tensor, vs: Tensor) -> Tensor:
    """`(-I + sum_i u_i v_i^T) x` for `x` `(B, D)` and terms `(B, n, D)`."""
    return ((x.unsqueeze(1) @ vs.transpose(1, 2)) @ us).squeeze(1) - x
