"""Interruptions and failures of a run: signals, a full disk, a loss that is not finite."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import nn

from recipes.errors import Stopped, UserError


class DiskError(OSError):
    """A file of a run cannot be read or written."""


class SignalHandler:
    """Records SIGTERM and Ctrl-C, of whichever rank, so that the update under way is finished and saved.

    A second signal of the same kind has its usual effect. Only the main thread of a process gets signals.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0
        self._pending: torch.Tensor | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])

    def requested(self) -> int:
        """Return the signal that any rank has received, or 0; all ranks must call this equally often.

        Ranks agree by a sum that is read at the next call: reading it at once would have the host wait for the device.
        """
        if self.accelerator.num_processes == 1:
            return self.received
        asked, flags = self._pending, [float(self.received == number) for number in self.SIGNALS]
        total = self.accelerator.reduce(torch.tensor(flags, device=self.accelerator.device), "sum")
        assert isinstance(total, torch.Tensor)
        self._pending = total
        if asked is None:
            return 0
        return max((number for number, count in zip(self.SIGNALS, asked.tolist(), strict=True) if count), default=0)


@contextmanager
def add_checkpoint_to_error(saved: Callable[[], str]) -> Iterator[None]:
    """Add the last good checkpoint to the message of an error of the disk, such as a full one."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{error}; last good checkpoint: {saved()}") from error


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Report in one line that the memory of the device, or of the machine, is full.

    Raises:
        UserError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        message = " ".join(str(error).split())
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: " not in message:
            raise
        raise UserError(
            f"out of memory: {message}; allowed: a smaller batch_size or eval_batch_size, or the same batch_size over "
            "more gradient_accumulation_steps"
        ) from error


def check_finite(loss: float, net: nn.Module, where: str) -> None:
    """Check that the loss and all weights are finite.

    Raises:
        UserError: the loss is not finite, or weights are not, which the last update may have broken with no
            loss left to show it.
    """
    if not (math.isfinite(loss) and torch.nn.utils.get_total_norm(net.parameters()).isfinite()):
        raise UserError(f"loss is {loss:g} or weights are not finite in {where}")


def stop(accelerator: Accelerator, number: int, saved: str) -> NoReturn:
    """End the run because of a signal, after what was under way has been saved."""
    accelerator.end_training()
    raise Stopped(number, saved)
