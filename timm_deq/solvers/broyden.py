r"""Broyden's good method with limited memory (Broyden, Math. Comp. 1965; Bai, Kolter & Koltun, NeurIPS 2019, App. B).

Quasi-Newton on $g(z) = f(z) - z$: $z_{k+1} = z_k - B_k\, g(z_k)$, where $B_k \approx J_g^{-1}$ is kept as

$$ B_k = -I + \sum_i u_i v_i^\top, \qquad
   v^\top = \Delta z^\top B_{k}, \quad u = \frac{\Delta z - B_{k} \Delta g}{v^\top \Delta g}
   \qquad\text{(Sherman-Morrison on the secant condition } B_{k+1} \Delta g = \Delta z\text{)}. $$

The first step is thus a Picard step. When the memory is full, all pairs are discarded: a window that drops the oldest
one leaves secant conditions unmet, and diverges on maps where the restarted method converges. Of the three products
with $B$ that the formulas name, two are computed: $B_k \Delta g$ follows from $B_k g_k$, found one step ago.
"""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from timm_deq.solvers.base import Solver, check_integer, set_slot, where_rows, zero_rows


class BroydenState(NamedTuple):
    """The state of Broyden's method after an update.

    Attributes:
        us: The left factors of the pairs, `(B, memory, D)`; zero in a slot not filled since the
            last restart.
        vs: The right factors, likewise.
        z: The last iterate, `(B, D)`.
        g: Its residual `f(z) - z`, `(B, D)`.
        bg: The product of the inverse with it, `(B, D)`.
        step: Updates done.
    """

    us: Tensor
    vs: Tensor
    z: Tensor
    g: Tensor
    bg: Tensor
    step: int


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method.

    Args:
        tol: See :class:`Solver`.
        max_steps: See :class:`Solver`.
        atol: See :class:`Solver`.
        memory: Rank-one terms collected before a restart, at least 1. Costs 2 states of memory each.
        check_every: See :class:`Solver`.
        while_loop: See :class:`Solver`.
    """

    _: KW_ONLY
    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("memory", self.memory, 1)

    @property
    def period(self) -> int:
        return self.memory

    def init(self, z: Tensor) -> BroydenState:
        us = z.new_zeros((z.shape[0], self.memory, z.shape[1]))
        return BroydenState(us, torch.zeros_like(us), z, z, z, 0)

    def update(self, z: Tensor, fz: Tensor, state: BroydenState, active: Tensor) -> tuple[Tensor, BroydenState]:
        us, vs, z_last, g_last, bg_last, step = state
        g = fz - z
        if step == 0:
            return fz, BroydenState(us, vs, z, g, -g, 1)
        slot = (step - 1) % self.memory
        if slot == 0 and step > 1:
            us, bg_last = zero_rows(us, active), where_rows(active, -g_last, bg_last)
        dz, dg = z - z_last, g - g_last
        v = apply_inverse(dz, vs[:, :slot], us[:, :slot])  # transposed: the roles of u and v change places
        bg = apply_inverse(g, us[:, :slot], vs[:, :slot])
        denominator = (v * dg).sum(dim=1)
        # No secant, no update: a vanishing denominator, relative to its factors, would blow the inverse up.
        eps = torch.finfo(torch.float32 if isinstance(z, fx.Proxy) else z.dtype).eps
        lengths = torch.linalg.vector_norm(v, dim=1) * torch.linalg.vector_norm(dg, dim=1)
        usable = active & (denominator.abs() > eps * lengths)
        u = (dz - bg + bg_last) / torch.where(usable, denominator, 1.0).unsqueeze(1)
        u, v = where_rows(usable, u, us[:, slot]), where_rows(usable, v, vs[:, slot])
        us, vs = set_slot(us, slot, u), set_slot(vs, slot, v)
        bg = bg + u * (v * g).sum(dim=1, keepdim=True)
        z_next = z - bg
        finite = torch.linalg.vector_norm(z_next, dim=1).isfinite()
        return where_rows(finite, z_next, fz), BroydenState(us, vs, z, g, bg, step + 1)


def apply_inverse(x: Tensor, us: Tensor, vs: Tensor) -> Tensor:
    """Return `(-I + sum_i u_i v_i^T) x` for `x` `(B, D)` and terms `(B, n, D)`."""
    # Where fewer bits are allowed for these products (TF32), the step is a little off, but not where it starts.
    return ((x.unsqueeze(1) @ vs.transpose(1, 2)) @ us).squeeze(1) - x
