"""A lock on a run folder, which ends with the process that holds it, however that ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recipes.errors import UserError

_held: set[int] = set()  # descriptors of this process


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from the run in a folder.

    The lock is on the folder itself and leaves no file. File systems that know no locks are used without one.

    Raises:
        UserError: another process is at work in it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output {str(folder)!r} is in use by another process; allowed: another folder, or after that has ended"
            ) from None
        except OSError:
            pass
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _forget() -> None:
    """Close in a forked process, such as one that decodes images, what would hold the lock of one that has died."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
