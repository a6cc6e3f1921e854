"""The loop: the only place that evaluates f, measures the residual, freezes and stops.

Forward solves and the linear systems of implicit differentiation run through it alike.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, fx

from timm_deq.solution import Solution, Status
from timm_deq.solvers.base import Solver, autocasts, is_static


def fixed_point(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    solver: Solver,
    *,
    trace: list[Tensor] | None = None,
) -> Solution:
    """Solves `z = f(z)`, each sample of the batch on its own.

    Step k evaluates f once, measures the relative residual `||f(z_k) - z_k|| / ||f(z_k)||` of each sample (never the
    damped or mixed step that the solver takes), freezes the samples that have converged or failed, and asks the solver
    for the next iterates of the rest. The value returned is each sample's best iterate, so neither a batch mate nor an
    overrun of steps changes it: leaving early and running all `max_steps` steps give the same numbers. While the
    program is being recorded (`torch.fx`, `torch.jit.trace`, `torch.export`, `torch.compile`) or runs on the meta
    device, all steps are run.

    The solver's algebra is done in float32 or better and outside autocast; f is called in the precision of `z0` and
    under the caller's autocast.

    Args:
        f: A map from `(B, ...)` to `(B, ...)` that treats samples independently and is the same at every call.
        z0: The initial iterate, `(B, ...)`, at least 2-D, floating point.
        solver: The update rule, the tolerance and the budget.
        trace: A list to which the residual `(B,)` after each evaluation is appended; a frozen sample keeps its last.

    Returns:
        The solution; `value` has the shape of `z0` and at least float32 precision.

    Raises:
        ValueError: `z0` is not a floating-point tensor of at least 2 dimensions, or f changes the shape of its input.
    """
    if not isinstance(z0, fx.Proxy) and (z0.ndim < 2 or not z0.is_floating_point()):
        raise ValueError(
            f"z0 must be a floating-point tensor (B, ...) of at least 2 dimensions, got {z0.dtype} {tuple(z0.shape)}"
        )
    static = is_static(z0)
    check_every = solver.check_every or (1 if static or z0.device.type == "cpu" else 4)

    # Type promotion, rather than a test of the dtype, so that fx can record it.
    z = z0.flatten(1) + z0.new_zeros(1, dtype=torch.float32)
    state = solver.init(z)
    best = z
    best_residual = z.new_full([z.shape[0]], float("inf"))
    steps = torch.zeros_like(best_residual, dtype=torch.long)
    status = torch.full_like(steps, int(Status.MAX_STEPS))
    active = torch.ones_like(steps, dtype=torch.bool)

    for step in range(1, solver.max_steps + 1):
        fz = f(z.reshape(z0.shape).to(z0.dtype))
        if step == 1 and not isinstance(fz, fx.Proxy) and fz.shape != z0.shape:
            raise ValueError(f"f must keep the shape of its input, {tuple(z0.shape)}, got {tuple(fz.shape)}")
        fz = fz.flatten(1).to(z.dtype)

        residual, finite = _relative_residual(z.detach(), fz.detach())
        improved = active & finite & (residual < best_residual)
        best = torch.where(improved.unsqueeze(1), z, best)
        best_residual = torch.where(improved, residual, best_residual)
        converged = active & finite & (residual <= solver.tol)
        status = torch.where(active & ~finite, int(Status.NONFINITE), status)
        status = torch.where(converged, int(Status.CONVERGED), status)
        steps = steps + active
        if trace is not None:
            trace.append(torch.where(active & finite, residual, best_residual))
        active = active & finite & ~converged

        if step == solver.max_steps:
            break
        if not static and step % check_every == 0 and not active.any():
            break
        with _full_precision(z):
            z_next, state = solver.update(z, fz, state)
        # A finished sample stands still: its rows stay finite whatever the algebra made of them.
        z = torch.where(active.unsqueeze(1), z_next, best)

    return Solution(best.reshape(z0.shape), best_residual, steps, status)


def _relative_residual(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
    """`||fz - z|| / ||fz||` per row, `(B,)`, and whether it is a number, `(B,)`."""
    difference = torch.linalg.vector_norm(fz - z, dim=1)
    norm = torch.linalg.vector_norm(fz, dim=1)
    # f(z) = z = 0 is a fixed point too: 0 / tiny = 0.
    residual = difference / norm.clamp_min(torch.finfo(torch.float32).tiny)
    return residual, difference.isfinite() & norm.isfinite()


def _full_precision(z: Tensor) -> AbstractContextManager:
    """Keeps matrix products out of an ambient autocast."""
    return torch.autocast(z.device.type, enabled=False) if autocasts(z) else nullcontext()
