"""What may go wrong during a run, and what it leaves behind: a message of one line, and a checkpoint to go on from."""

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


class Termination:
    """Asks whether SIGTERM, or Ctrl-C, has come to any rank, so that the update under way is finished and saved.

    A second signal of the kind does what it does without this. Only the main thread of a process gets signals.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.came = 0
        self._asked: torch.Tensor | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = number
        signal.signal(number, self._before[number])

    def requested(self) -> int:
        """The signal, or 0; the same on all ranks, which must call this equally often.

        Ranks agree by a sum that is read at the next call: reading it at once would have the host wait for the device.
        """
        if self.accelerator.num_processes == 1:
            return self.came
        asked, flags = self._asked, [float(self.came == number) for number in self.SIGNALS]
        total = self.accelerator.reduce(torch.tensor(flags, device=self.accelerator.device), "sum")
        assert isinstance(total, torch.Tensor)
        self._asked = total
        if asked is None:
            return 0
        return max((number for number, count in zip(self.SIGNALS, asked.tolist(), strict=True) if count), default=0)


@contextmanager
def naming_checkpoint(saved: Callable[[], str]) -> Iterator[None]:
    """Errors of the disk, such as a full one, say where the last good checkpoint is."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{error}; last good checkpoint: {saved()}") from error


def check_finite(loss: float, net: nn.Module, where: str) -> None:
    """Stop a training that has diverged.

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
