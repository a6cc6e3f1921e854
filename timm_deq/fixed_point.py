"""The loop: the only place that evaluates f, measures the residual, freezes and stops.

Forward solves and the linear systems of implicit differentiation run through it alike.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, fx

from timm_deq.solution import Solution, Status
from timm_deq.solvers.base import Solver, State, asking_is_free, autocasts, is_static, select

Map = Callable[[Tensor], Tensor]

GATHER_AT = 0.75
"""Samples that have finished are set aside once no more than this share is left: each time costs a copy of the rest."""


class _Run(NamedTuple):
    """How far each sample's solve has come: `z` and `best` `(B, D)`, the rest `(B,)`."""

    z: Tensor
    best: Tensor
    residual: Tensor
    steps: Tensor
    active: Tensor

    def take(self, rows: Tensor) -> "_Run":
        return _Run(*(t.index_select(0, rows) for t in self))

    def put(self, rows: Tensor, part: "_Run") -> "_Run":
        return _Run(*(t.index_copy(0, rows, p) for t, p in zip(self, part, strict=True)))


def fixed_point(
    f: Map,
    z0: Tensor,
    solver: Solver,
    *,
    restrict: Callable[[Tensor], Map] | None = None,
    trace: list[Tensor] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Solution:
    """Solves `z = f(z)`, each sample of the batch on its own.

    Step k evaluates f once, measures the relative residual `||f(z_k) - z_k|| / ||f(z_k)||` of each sample (never the
    damped or mixed step that the solver takes), freezes the samples that have converged or failed, and asks the solver
    for the next iterates of the rest. The value returned is each sample's best iterate, so neither a batch mate nor an
    overrun of steps changes it: leaving early and running all `max_steps` steps give the same numbers. While the
    program is being recorded (`torch.fx`, `torch.jit.trace`, `torch.export`, `torch.compile`) or runs on the meta
    device, all steps are run, unless the solver asks for a `while_loop`.

    The solver's algebra is done in float32 or better and outside autocast; f is called in the precision of `z0` and
    under the caller's autocast.

    Args:
        f: A map from `(B, ...)` to `(B, ...)` that treats samples independently and is the same at every call.
        z0: The initial iterate, `(B, ...)`, at least 2-D, floating point.
        solver: The update rule, the tolerance and the budget.
        restrict: Gives f for some samples alone, whose numbers `(n,)` it is told. Given, the samples that have
            finished are set aside as soon as enough have, and the rest go on by themselves.
        trace: A list to which the residual `(B,)` after each evaluation is appended; a frozen sample keeps its last.
        observe: Called before each evaluation with the number of updates so far and the iterates of all samples, in the
            shape and the precision of `z0`; a frozen sample stays at its answer.

    Returns:
        The solution; `value` has the shape of `z0` and at least float32 precision.

    Raises:
        ValueError: `z0` is not a floating-point tensor of at least 2 dimensions, or f changes the shape, the dtype
            (outside autocast) or the device of its input.
    """
    if not isinstance(z0, fx.Proxy) and (z0.ndim < 2 or not z0.is_floating_point()):
        raise ValueError(
            f"z0 must be a floating-point tensor (B, ...) of at least 2 dimensions, got {z0.dtype} {tuple(z0.shape)}"
        )
    static = is_static(z0)
    check_every = solver.check_every or (1 if asking_is_free(z0) else 4)
    shape: Sequence[int] = z0.shape

    # Type promotion, rather than a test of the dtype, so that fx can record it.
    z = z0.flatten(1) + z0.new_zeros(1, dtype=solver.precision)
    state = solver.init(z)
    infinite = z.new_full([z.shape[0]], float("inf"))
    zeros = torch.zeros_like(infinite, dtype=torch.long)
    run, evaluations = _Run(z, z, infinite, zeros, zeros == 0), zeros
    aside: tuple[_Run, Tensor] | None = None  # once there are samples set aside: the results, and who is left

    def evaluate(z: Tensor) -> Tensor:
        return f(z.reshape(shape).to(z0.dtype))

    for step in range(1, solver.max_steps + 1):
        if observe is not None:
            whole = run.z if aside is None else aside[0].best.index_copy(0, aside[1], run.z)
            observe(step - 1, whole.reshape(z0.shape).to(z0.dtype))
        fz = evaluate(run.z)
        if step == 1 and not isinstance(fz, fx.Proxy):
            _check_map(z0, fz)
        fz = fz.flatten(1).to(z.dtype)
        was_best = run.residual
        run, residual, going = _measure(run, fz, solver.tol)
        if trace is not None:
            residual = torch.where(going, residual, was_best)
            trace.append(residual if aside is None else aside[0].residual.index_copy(0, aside[1], residual))
        if step == solver.max_steps:
            break
        if not static and step % check_every == 0:
            left = int(torch.count_nonzero(run.active))
            if not left:
                break
            if restrict is not None and left <= GATHER_AT * len(run.z):
                (kept,) = run.active.nonzero(as_tuple=True)
                whole, rows = aside or (run, torch.arange(len(z0), device=z0.device))
                evaluations = evaluations.index_fill(0, rows, step)
                aside = whole.put(rows, run), rows[kept]
                run, fz, state = run.take(kept), fz.index_select(0, kept), _take(state, kept)
                f, shape = restrict(rows[kept]), (left, *z0.shape[1:])
        run, state = _advance(run, fz, state, solver)
        if solver.while_loop and step > solver.period and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            run, step = _while_loop(run, state, solver, evaluate, step)
            break

    if aside is None:
        evaluations = evaluations + step
    else:
        whole, rows = aside
        run, evaluations, state = whole.put(rows, run), evaluations.index_fill(0, rows, step), None
    unfinished = torch.where(run.active, int(Status.MAX_STEPS), int(Status.NONFINITE))
    status = torch.where(run.residual <= solver.tol, int(Status.CONVERGED), unfinished)
    return Solution(run.best.reshape(z0.shape), run.residual, run.steps, status, evaluations, state)


def _measure(run: _Run, fz: Tensor, tol: float) -> tuple[_Run, Tensor, Tensor]:
    """What an evaluation shows; the residuals `(B,)` and of which samples they are known."""
    z, best, best_residual, steps, active = run
    residual, finite = _relative_residual(z.detach(), fz.detach())
    going = active & finite
    improved = going & (residual < best_residual)
    best, best_residual = select(improved, z, best), torch.where(improved, residual, best_residual)
    return _Run(z, best, best_residual, steps + active, going & (residual > tol)), residual, going


def _advance(run: _Run, fz: Tensor, state: State, solver: Solver) -> tuple[_Run, State]:
    """The next iterates."""
    with _full_precision(run.z):
        z_next, state = solver.update(run.z, fz, state, run.active)
    # A finished sample stands still: its rows stay finite whatever the algebra made of them.
    return run._replace(z=select(run.active, z_next, run.best)), state


def _while_loop(run: _Run, state: State, solver: Solver, evaluate: Map, step: int) -> tuple[_Run, Tensor]:
    """The steps after `step`, recorded as a loop over one period of the solver, after which its slots repeat."""
    numbers = [None if isinstance(leaf, Tensor) else leaf for leaf in state]

    def unpack(tensors: Sequence[Tensor]) -> tuple[_Run, State]:
        rest = iter(tensors[len(run) :])
        leaves = [next(rest) if number is None else number for number in numbers]
        return _Run(*tensors[: len(run)]), type(state)(*leaves) if leaves else state

    def go_on(done: Tensor, *tensors: Tensor) -> Tensor:
        return (done < solver.max_steps) & unpack(tensors)[0].active.any()

    def one_period(done: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        inner, inner_state = unpack([t.clone() for t in tensors])  # solvers write in place, which a loop forbids
        for _ in range(solver.period):
            left = done < solver.max_steps
            fz = evaluate(inner.z).flatten(1).to(inner.z.dtype)
            measured, _, _ = _measure(inner._replace(active=inner.active & left), fz, solver.tol)
            moved, inner_state = _advance(measured, fz, inner_state, solver)
            inner = moved._replace(active=torch.where(left, measured.active, inner.active))
            done = done + 1
        tensors = (*inner, *(leaf for leaf in inner_state if isinstance(leaf, Tensor)))
        return done, *(t.clone() for t in tensors)  # nor may an output be an input

    done = run.steps.new_full((), step)
    carried = (done, *run, *(leaf for leaf in state if isinstance(leaf, Tensor)))
    done, *tensors = torch.while_loop(go_on, one_period, tuple(t.clone() for t in carried))
    return unpack(tensors)[0], done


def _take(state: State, rows: Tensor) -> State:
    """The given rows of a solver's state."""
    leaves = [leaf.index_select(0, rows) if isinstance(leaf, Tensor) else leaf for leaf in state]
    return type(state)(*leaves) if leaves else state


def _check_map(z: Tensor, fz: Tensor) -> None:
    if fz.shape != z.shape:
        raise ValueError(f"f must keep the shape of its input, {tuple(z.shape)}, got {tuple(fz.shape)}")
    if fz.device != z.device:
        raise ValueError(f"f must keep the device of its input, {z.device}, got {fz.device}")
    if fz.dtype != z.dtype and not autocasts(z):
        raise ValueError(f"f must keep the dtype of its input, {z.dtype}, got {fz.dtype}")


def _relative_residual(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
    """`||fz - z|| / ||fz||` per row, `(B,)`, and whether it is a number, `(B,)`."""
    difference = torch.linalg.vector_norm(fz - z, dim=1)
    norm = torch.linalg.vector_norm(fz, dim=1)
    # f(z) = z = 0 is a fixed point too: 0 / tiny = 0.
    residual = difference / norm.clamp_min(torch.finfo(torch.float32).tiny)
    return residual, difference + norm < float("inf")  # false for NaN


def _full_precision(z: Tensor) -> AbstractContextManager:
    """Keeps matrix products out of an ambient autocast."""
    return torch.autocast(z.device.type, enabled=False) if autocasts(z) else nullcontext()
