"""The interface of a solver: an update rule that receives `f(z)` and proposes where to evaluate f next.

A solver never calls f, measures no residual and does not decide when to stop; `fixed_point` does. So a solver is a few
lines of algebra on flat states `(B, D)`, one system per row, and rows never mix.
"""

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from timm_deq.transforms import forward_mode, func_transforms, inside_vmap, recorded_by_proxies, requires_grad

State = Any
"""What a solver carries from step to step: a NamedTuple of tensors `(B, ...)` and Python integers, or ()."""


def check_at_least(name: str, value: float, least: float, *, strictly: bool = False) -> None:
    """Raise ValueError, naming the argument, unless `value` is a number of at least (or above) `least`."""
    check_number(name, value)
    if not (value > least if strictly else value >= least):  # written so that NaN fails
        raise ValueError(f"{name} must be {'above' if strictly else 'at least'} {least}, got {value!r}")


def check_integer(name: str, value: int, least: int) -> None:
    """Raise ValueError, naming the argument, unless `value` is an int of at least `least`.

    Integers of NumPy are refused as a float is: a model that was made with them could not be saved.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    check_at_least(name, value, least)


def check_number(name: str, value: float) -> None:
    """Raise ValueError, naming the argument, unless `value` is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def check_bool(name: str, value: bool) -> None:
    """Raise ValueError, naming the argument, unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True)
class Solver(ABC):
    """Settings common to all solvers.

    Args:
        tol: Relative residual `||f(z) - z|| / ||f(z)||` at which a sample has converged, above 0.
        max_steps: Maximum number of evaluations of f, at least 1.
        atol: Absolute residual `||f(z) - z||` at which a sample has converged too, at least 0. A state that tends to
            zero has no small relative residual, and needs it.
        check_every: Evaluations of f between convergence checks, at least 1; each check synchronises host and device,
            a late one costs evaluations whose results are discarded. None checks after every evaluation on a CPU and
            after every fourth elsewhere. The numbers do not depend on it.
        while_loop: Whether `torch.export` and `torch.compile` record the loop itself, `torch.while_loop`, with its
            early exit, rather than all `max_steps` steps, where gradients are disabled.

    Attributes:
        precision: The state is kept in this precision or better.

    Raises:
        ValueError: A setting out of its range.
    """

    precision: ClassVar[torch.dtype] = torch.float32

    tol: float = 1e-3
    max_steps: int = 20
    _: KW_ONLY
    atol: float = 0.0
    check_every: int | None = None
    while_loop: bool = False

    def __post_init__(self) -> None:
        check_at_least("tol", self.tol, 0, strictly=True)
        check_at_least("atol", self.atol, 0)
        check_integer("max_steps", self.max_steps, 1)
        if self.check_every is not None:
            check_integer("check_every", self.check_every, 1)
        check_bool("while_loop", self.while_loop)

    @property
    def period(self) -> int:
        """Updates after which the integers of a state repeat what they mean, once they have all been reached."""
        return 1

    @abstractmethod
    def init(self, z: Tensor) -> State:
        """Return the state before the first update, for an initial iterate `(B, D)`."""

    @abstractmethod
    def update(self, z: Tensor, fz: Tensor, state: State, active: Tensor) -> tuple[Tensor, State]:
        """Return the next iterate and the next state.

        Args:
            z: The present iterate, `(B, D)`.
            fz: `f(z)`, `(B, D)`.
            state: The result of the last update, or of `init`.
            active: Which samples have not finished, `(B,)`. The iterates of the others are ignored; what a gradient
                reads from their states must not change, or it would depend on how long their batch mates take.
        """


def zero_rows(history: Tensor, rows: Tensor) -> Tensor:
    """Return `history` `(B, m, D)` with zeros in the given rows `(B,)`: in place where autograd does not need it."""
    if is_differentiated(history):
        return torch.where(rows[:, None, None], 0.0, history)
    return history.masked_fill_(rows[:, None, None], 0.0)


def set_slot(history: Tensor, slot: int, row: Tensor) -> Tensor:
    """Return `history` `(B, m, D)` with `row` `(B, D)` at `slot`: in place where autograd does not need it.

    Autograd may have saved the old history, and `fx` records no assignment; there it is copied.
    """
    if is_differentiated(history, row):
        return torch.cat([history[:, :slot], row.unsqueeze(1), history[:, slot + 1 :]], dim=1)
    history[:, slot] = row
    return history


def where_rows(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the given rows `(B,)` of `a`, the others of `b`, both `(B, D)`."""
    if can_read_without_sync(rows):  # most often all rows agree, and then nothing need be copied
        if bool(rows.all()):
            return a
        if not bool(rows.any()):
            return b
    return torch.where(rows.unsqueeze(1), a, b)


def row_times(row: Tensor, matrix: Tensor) -> Tensor:
    """Return `row` `(B, k)` times `matrix` `(B, k, n)`, in float32 proper whatever `float32_matmul_precision` says.

    A mixture of iterates in TF32 or bf16 is off by about 1e-3 of its length, below which no residual would then fall.
    """
    # A compiler fuses the two operations into one kernel; elsewhere the product is faster, where it keeps all bits.
    spelt_out = not is_exporting() if torch.compiler.is_compiling() else _products_lose_bits(row)
    if spelt_out:
        return (row.unsqueeze(2) * matrix).sum(dim=1)
    return torch.bmm(row.unsqueeze(1), matrix).squeeze(1)


def _products_lose_bits(z: Tensor) -> bool:
    """Return whether the process allows products of float32 matrices fewer bits on this device."""
    if is_tracing(z) or z.dtype != torch.float32:
        return False
    backend = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(z.device.type)
    return backend is not None and backend.matmul.fp32_precision not in ("none", "ieee")


def is_differentiated(*tensors: Tensor) -> bool:
    """Return whether operations on any of the tensors are differentiated, batched by vmap, or recorded in a program.

    Then none may be changed in place: autograd may have saved it, vmap may have to add a dimension to it.
    """
    if isinstance(tensors[0], fx.Proxy):
        return True
    recorded = is_exporting() or (torch.is_grad_enabled() and any(map(requires_grad, tensors)))
    return recorded or forward_mode(tensors[0]) or inside_vmap()


def can_read_without_sync(z: Tensor) -> bool:
    """Return whether reading a value does not wait for a device."""
    return not is_tracing(z) and z.device.type == "cpu"


def is_tracing(z: Tensor) -> bool:
    """Return whether the program is recorded or batched, or runs on shapes alone, so that no value may be read."""
    return (
        isinstance(z, fx.Proxy)
        or torch.compiler.is_compiling()  # torch.compile and torch.export
        or torch.jit.is_tracing()
        or z.is_meta
        or type(z) is FakeTensor
        or recorded_by_proxies()
        or "Vmap" in func_transforms()  # of a batch of programs, one value cannot be read
    )


def is_exporting() -> bool:
    """Return whether `torch.export` or `torch.jit.trace` records a program.

    It has no autograd functions and no switch of gradients: differentiated later, it has the derivative of its steps.
    """
    # What `torch.compiler.is_exporting()` reads, which in torch 2.11 is true under torch.compile as well.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def autocast_enabled(z: Tensor) -> bool:
    """Return whether matrix products with `z` would run in lower precision."""
    return not isinstance(z, fx.Proxy) and not z.is_meta and torch.is_autocast_enabled(z.device.type)
