"""Errors that the user can mend, and how a command ends with one: a single line on stderr and exit code 2, or 3 if all
that is left to do is to push a run to the Hub.

Whatever else is raised is a fault of the program, and ends with its traceback. `python -X dev` shows that of every
error.
"""

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

# Packages of `timm-deq[recipes]`, by the names under which they are imported.
EXTRA = ("accelerate", "datasets", "sklearn", "matplotlib", "jinja2", "jsonargparse", "psutil", "yaml")


class UserError(ValueError):
    """A setting, a file or an image that is not allowed; its message is one line for the user."""


class NotPushedError(OSError):
    """A run has finished and is complete on disk, but the Hub does not have it."""


class Stopped(Exception):
    """A signal has ended the run; `code` is the exit code of a process that it ends."""

    def __init__(self, number: int, saved: str):
        super().__init__(f"stopped by {signal.Signals(number).name}; last good checkpoint: {saved}")
        self.code = 128 + number


def check(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Refuse the value of a setting unless it is allowed.

    Raises:
        UserError: not `ok`.
    """
    if not ok:
        raise UserError(f"{name} is {value!r}; allowed: {allowed}")


@contextmanager
def user_errors(kind: type[Exception] | tuple[type[Exception], ...] = ValueError, *, what: str = "") -> Iterator[None]:
    """Report errors of a library that refuses what the user has given it as errors of the user.

    Args:
        kind: class of the errors to report, or several.
        what: put before the library's message.

    Raises:
        UserError: in place of an error of this class.
    """
    try:
        yield
    except UserError:
        raise
    except kind as error:
        raise UserError(f"{what}{error}") from error


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """Return a hint at the word that a mistyped one is closest to, or nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def exit_code(work: Callable[[], None]) -> int:
    """Do the work of a command, report its errors, and return its exit code."""
    try:
        work()
    except (Stopped, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":
            print(str(error) or "stopped by SIGINT", file=sys.stderr)
        return error.code if isinstance(error, Stopped) else 128 + signal.SIGINT
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing in EXTRA:
            message = f"recipes need {missing}, which is not installed: pip install 'timm-deq[recipes]'"
        elif isinstance(error, UserError | OSError):
            message = " ".join(str(error).split())
        else:
            _report(traceback.format_exc())
            return 1
        _report(f"error: {message}\n")
        return 3 if isinstance(error, NotPushedError) else 2
    return 0


def _report(text: str) -> None:
    """Write to stderr, unless another rank of this launch has reported an error before.

    An error that all ranks find is so reported once, and what follows from it on other ranks, such as a connection that
    was lost, not at all. A rank that ends has its launcher stop the others: so it waits until the report is written.
    """
    store = _launch_store()
    if store is None or store.add("recipes/failed", 1) == 1:
        sys.stderr.write(text)
        sys.stderr.flush()
        if store is not None:
            store.set("recipes/reported", "")
    else:
        store.wait(["recipes/reported"], timedelta(seconds=10))


def _launch_store() -> Any:
    """Connect to the key-value store of the process that launched the ranks, if there are several and there is one."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(attempt, TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10)))
