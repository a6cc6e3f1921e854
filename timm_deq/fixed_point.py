"""The loop: the only place that evaluates f, measures the residual, freezes samples and stops.

Forward solves and the linear systems of implicit differentiation run through it alike.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, fx

from timm_deq.layout import Layout
from timm_deq.solution import Solution, Status
from timm_deq.solvers.base import (
    Solver,
    State,
    autocast_enabled,
    can_read_without_sync,
    check_at_least,
    check_integer,
    is_tracing,
    where_rows,
)

Map = Callable[[Tensor], Tensor]
F = TypeVar("F", bound=Callable[..., Any])

COMPACT_BELOW = 0.75
"""Converged samples are dropped from the batch once no more than this share is left: each time copies the rest."""

TIE = 1 - 1e-6
"""Residuals that differ by less than this ratio are equal but for rounding: the newer iterate is taken."""


class _Stopping(NamedTuple):
    """When a sample has converged, and when the budget is spent."""

    tol: float
    atol: float
    max_steps: int


class _Run(NamedTuple):
    """The progress of each sample's solve: `z` and `best` `(B, D)`, the others `(B,)`."""

    z: Tensor
    best: Tensor
    residual: Tensor
    steps: Tensor
    active: Tensor
    converged: Tensor

    def take(self, rows: Tensor) -> "_Run":
        return _Run(*(t.index_select(0, rows) for t in self))

    def put(self, rows: Tensor, part: "_Run") -> "_Run":
        return _Run(*(t.index_copy(0, rows, p) for t, p in zip(self, part, strict=True)))


def outside_inference_mode(function: F) -> F:
    """Run a function on ordinary tensors without gradients where the caller is in inference mode.

    Tensors made in inference mode have no version counters, by which a change in place would be noticed.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(F, run)


@outside_inference_mode
def fixed_point(
    f: Map,
    z0: Tensor,
    solver: Solver,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    subset_map: Callable[[Tensor], Map] | None = None,
    residual_history: list[Tensor] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Solution:
    """Solve `z = f(z)`, each sample of the batch on its own.

    Step k evaluates f once, measures the relative residual `||f(z_k) - z_k|| / ||f(z_k)||` of each sample (never the
    damped or mixed step that the solver takes), freezes the samples that have converged or failed, and asks the solver
    for the next iterates of the others. The value returned is each sample's best iterate, and the newest of equally
    good ones, so neither a batch mate nor an overrun of steps changes it: leaving early and running all `max_steps`
    steps give the same numbers. While the program is being recorded (`torch.fx`, `torch.jit.trace`, `torch.export`,
    `torch.compile`) or runs on the meta device, all steps are run, unless the solver asks for a `while_loop`.

    The solver's algebra is done in float32 or better and outside autocast; f is called in the precision of `z0` and
    under the caller's autocast. A state in channels_last, or in another dense order, stays in it, histories included:
    f receives, and the solution has, the layout of `z0`. Recorded programs use the contiguous one.

    Args:
        f: A map from `(B, ...)` to `(B, ...)` that treats samples independently and is the same at every call.
        z0: The initial iterate, `(B, ...)`, at least 2-D, floating point.
        solver: The update rule, the tolerances and the budget.
        tol: Relative tolerance in place of the solver's, at least 0.
        max_steps: Budget in place of the solver's, at least 1.
        subset_map: Returns f for the samples of the given indices `(n,)` alone. Given, converged samples are dropped
            from the batch as soon as enough have, and the others go on by themselves.
        residual_history: A list to which the residual `(B,)` after each evaluation is appended; a frozen sample keeps
            its last.
        callback: Called before each evaluation with the number of updates so far and the iterates of all samples, in
            the shape and the precision of `z0`; a frozen sample stays at its answer.

    Returns:
        The solution; `value` has the shape of `z0` and at least float32 precision.

    Raises:
        ValueError: `z0` is not a floating-point tensor of at least 2 dimensions, or f changes the shape, the dtype
            (outside autocast) or the device of its input, or its input itself, in place.

    >>> from timm_deq import Picard, Status, fixed_point
    >>> solution = fixed_point(torch.cos, torch.zeros(1, 1), Picard(tol=1e-3, max_steps=50))
    >>> print(f"{solution.value.item():.3f}", solution.steps.item(), Status(solution.status.item()).name)
    0.739 19 CONVERGED
    """
    _check_start(z0)
    stopping = _stopping(solver, tol, max_steps)
    tracing = is_tracing(z0)
    # A recorded loop shows none of its steps: whoever follows them is given the static loop.
    followed = residual_history is not None or callback is not None
    loops = solver.while_loop and not followed and torch.compiler.is_compiling() and not torch.is_grad_enabled()
    check_every = solver.check_every or (1 if can_read_without_sync(z0) else 4)
    layout = Layout.of(z0)
    like, unchecked = z0, not isinstance(z0, fx.Proxy)  # like: a loop takes its shape as a tensor, not as numbers

    # Type promotion, rather than a test of the dtype, so that fx can record it.
    z = layout.rows(z0) + z0.new_zeros(1, dtype=solver.precision)
    state = solver.init(z)
    infinite = z.new_full([z.shape[0]], float("inf"))
    zeros = torch.zeros_like(infinite, dtype=torch.long)
    run, evaluations = _Run(z, z, infinite, zeros, zeros == 0, zeros != 0), zeros
    finished: tuple[_Run, Tensor] | None = None  # once samples were dropped: the results of all, and who is left

    def evaluate(z: Tensor) -> Tensor:
        version = None if tracing else z._version
        fz = f(layout.state(z, like.shape).to(like.dtype))
        if version is not None and z._version != version:
            raise ValueError("f must not change its input in place, as relu_(z) and z.add_(x) do")
        return fz

    for step in range(1, stopping.max_steps + 1):
        if callback is not None:
            whole = run.z if finished is None else finished[0].best.index_copy(0, finished[1], run.z)
            callback(step - 1, layout.state(whole, z0.shape).to(z0.dtype))
        fz = evaluate(run.z)
        if unchecked:
            _check_map(like, fz)
            unchecked = False
        fz = layout.rows(fz).to(z.dtype)
        best_before = run.residual
        run, residual, measured = _measure(run, fz, stopping)
        if residual_history is not None:
            residual = torch.where(measured, residual, best_before)
            whole = residual if finished is None else finished[0].residual.index_copy(0, finished[1], residual)
            residual_history.append(whole)
        if step == stopping.max_steps:
            break
        if not tracing and step % check_every == 0:
            left = int(torch.count_nonzero(run.active))
            if not left:
                break
            if subset_map is not None and left <= COMPACT_BELOW * len(run.z):
                (kept,) = run.active.nonzero(as_tuple=True)
                whole, rows = finished or (run, torch.arange(len(z0), device=z0.device))
                evaluations = evaluations.index_fill(0, rows, step)
                finished = whole.put(rows, run), rows[kept]
                run, fz, state = run.take(kept), fz.index_select(0, kept), _take(state, kept)
                f, like, unchecked = subset_map(rows[kept]), z0[:left], True
        run, state = _advance(run, fz, state, solver)
        if loops and step > solver.period:
            run, step = _while_loop(run, state, solver, stopping, evaluate, step)
            break

    if finished is None:
        evaluations = evaluations + step
    else:
        whole, rows = finished
        run, evaluations, state = whole.put(rows, run), evaluations.index_fill(0, rows, step), None
    unfinished = torch.where(run.active, int(Status.MAX_STEPS), int(Status.NONFINITE))
    status = torch.where(run.converged, int(Status.CONVERGED), unfinished)
    return Solution(layout.state(run.best, z0.shape), run.residual, run.steps, status, evaluations, state)


def _stopping(solver: Solver, tol: float | None, max_steps: int | None) -> _Stopping:
    if tol is not None:
        check_at_least("tol", tol, 0)
    if max_steps is not None:
        check_integer("max_steps", max_steps, 1)
    return _Stopping(
        solver.tol if tol is None else tol,
        solver.atol,
        solver.max_steps if max_steps is None else max_steps,
    )


def _measure(run: _Run, fz: Tensor, stopping: _Stopping) -> tuple[_Run, Tensor, Tensor]:
    """Take an evaluation into account; return also the residuals `(B,)` and for which samples they are valid."""
    z, best, best_residual, steps, active, converged = run
    residual, difference, finite = _residuals(z.detach(), fz.detach())
    measured = active & finite
    arrived = measured & (residual <= stopping.tol)
    improved = measured & (residual * TIE <= best_residual)
    if stopping.atol:  # of a state that tends to zero, the last iterate is the best whatever its relative residual
        arrived = arrived | (measured & (difference <= stopping.atol))
        improved = improved | arrived
    best, best_residual = where_rows(improved, z, best), torch.where(improved, residual, best_residual)
    run = _Run(z, best, best_residual, steps + active, measured ^ arrived, converged | arrived)
    return run, residual, measured


def _advance(run: _Run, fz: Tensor, state: State, solver: Solver) -> tuple[_Run, State]:
    """Take the solver's step."""
    with _full_precision(run.z):
        z_next, state = solver.update(run.z, fz, state, run.active)
    # A finished sample stands still: its rows stay finite whatever the algebra made of them.
    return run._replace(z=where_rows(run.active, z_next, run.best)), state


def _while_loop(
    run: _Run, state: State, solver: Solver, stopping: _Stopping, evaluate: Map, step: int
) -> tuple[_Run, Tensor]:
    """Record the steps after `step` as a loop over one period of the solver, after which its slots repeat."""
    numbers = [None if isinstance(leaf, Tensor) else leaf for leaf in state]

    def unpack(tensors: Sequence[Tensor]) -> tuple[_Run, State]:
        rest = iter(tensors[len(run) :])
        leaves = [next(rest) if number is None else number for number in numbers]
        return _Run(*tensors[: len(run)]), type(state)(*leaves) if leaves else state

    def go_on(done: Tensor, *tensors: Tensor) -> Tensor:
        return (done < stopping.max_steps) & unpack(tensors)[0].active.any()

    def one_period(done: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        inner, inner_state = unpack([t.clone() for t in tensors])  # solvers write in place, which a loop forbids
        for _ in range(solver.period):
            left = done < stopping.max_steps
            fz = evaluate(inner.z).flatten(1).to(inner.z.dtype)
            measured, _, _ = _measure(inner._replace(active=inner.active & left), fz, stopping)
            moved, inner_state = _advance(measured, fz, inner_state, solver)
            # Of those that the budget has left, none is active in `measured`; onnxruntime selects no booleans.
            inner = moved._replace(active=measured.active | (inner.active & ~left))
            done = done + 1
        tensors = (*inner, *(leaf for leaf in inner_state if isinstance(leaf, Tensor)))
        return done, *(t.clone() for t in tensors)  # nor may an output be an input

    done = run.steps.new_full((), step)
    carried = (done, *run, *(leaf for leaf in state if isinstance(leaf, Tensor)))
    done, *tensors = torch.while_loop(go_on, one_period, tuple(t.clone() for t in carried))
    return unpack(tensors)[0], done


def _take(state: State, rows: Tensor) -> State:
    """Select rows of a solver's state."""
    leaves = [leaf.index_select(0, rows) if isinstance(leaf, Tensor) else leaf for leaf in state]
    return type(state)(*leaves) if leaves else state


def _check_start(z0: Tensor) -> None:
    if not isinstance(z0, fx.Proxy) and (z0.ndim < 2 or not z0.is_floating_point()):
        raise ValueError(
            f"z0 must be a floating-point tensor (B, ...) of at least 2 dimensions, got {z0.dtype} {tuple(z0.shape)}"
        )


def _check_map(z: Tensor, fz: Tensor) -> None:
    if not isinstance(fz, Tensor):
        raise ValueError(f"f must return a tensor, got {type(fz).__name__}")
    if fz.shape != z.shape:
        raise ValueError(f"f must keep the shape of its input, {tuple(z.shape)}, got {tuple(fz.shape)}")
    if fz.device != z.device:
        raise ValueError(f"f must keep the device of its input, {z.device}, got {fz.device}")
    if fz.dtype != z.dtype and not autocast_enabled(z):
        raise ValueError(f"f must keep the dtype of its input, {z.dtype}, got {fz.dtype}")


def _residuals(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `||fz - z|| / ||fz||` and `||fz - z||` per row, `(B,)`, and whether they are finite."""
    norm = torch.linalg.vector_norm(fz, dim=1)  # first: f has just written it
    difference = torch.linalg.vector_norm(fz - z, dim=1)
    # f(z) = z = 0 is a fixed point too: 0 / tiny = 0.
    residual = difference / norm.clamp_min(torch.finfo(torch.float32).tiny)
    return residual, difference, difference + norm < float("inf")  # false for NaN


def _full_precision(z: Tensor) -> AbstractContextManager:
    """Disable an ambient autocast, which would lower the precision of matrix products."""
    return torch.autocast(z.device.type, enabled=False) if autocast_enabled(z) else nullcontext()
