"""Runs recipes/train.py in children that are killed with signal 9 as they call the system for the n-th time to put
something on the disk, and then in children that resume.

    python killed_run.py FOLDER N,N,... FLAG ...

The run of N = 5 is FOLDER/5. Prints, for each N, the exit code of the first child: -9, or 0 where N is beyond the last
call.
"""

import os
import signal
import sys
from pathlib import Path

import recipes.train
import recipes.training.epoch  # noqa: F401 - what a run imports late is here before the children are
import recipes.training.hub  # noqa: F401
import recipes.training.measurement  # noqa: F401
import recipes.training.tracking  # noqa: F401

CALLS = ("fsync", "replace", "rename", "rmdir", "unlink", "mkdir")


def count_down(name, left):
    """Has the call kill the process when `left` calls of any kind have been made, half of the time after the deed."""
    call = getattr(os, name)

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and left[1] % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call(*args, **kwargs)
        finally:  # also of a folder that is there already, which mkdir is asked for all the same
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, counted)


def in_child(words, n=None):
    """Exit code of a run in a child, killed at the n-th call."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    if n is not None:
        left = [n, n]
        for name in CALLS:
            count_down(name, left)
    os._exit(recipes.train.main(words))


folder, numbers, words = Path(sys.argv[1]), map(int, sys.argv[2].split(",")), sys.argv[3:]
for n in numbers:
    run = ["--output", str(folder / str(n)), "--resume", "auto", *words]
    codes = [in_child(run, n), in_child(run)]
    assert codes[1] == 0, f"resuming after {n} calls ended with {codes[1]}"
    print(n, codes[0], flush=True)
