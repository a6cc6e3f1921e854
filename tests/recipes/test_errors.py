"""How a command ends with an error: one line of one rank for the user's mistakes, a traceback for the program's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.errors import Stopped, UserError, check, did_you_mean, exit_code, user_errors

ROOT = Path(__file__).parents[2]


def raising(error):
    def work():
        raise error

    return work


def test_a_users_error_is_one_line_and_exit_code_2(capsys):
    assert exit_code(raising(UserError("a\n  long \n message"))) == 2
    assert capsys.readouterr().err == "error: a long message\n"
    assert exit_code(raising(OSError(28, "No space left on device"))) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "error", [ValueError("zip() argument 2 is shorter"), RuntimeError("x"), AssertionError()], ids=repr
)
def test_a_fault_of_the_program_ends_with_its_traceback(capsys, error):
    assert exit_code(raising(error)) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and type(error).__name__ in err.splitlines()[-1]


@pytest.mark.parametrize(("error", "code"), [(Stopped(15, "x"), 143), (KeyboardInterrupt(), 130)], ids=["term", "int"])
def test_a_signal_has_the_exit_code_of_a_process_that_it_ends(capsys, error, code):
    assert exit_code(raising(error)) == code
    assert capsys.readouterr().err.startswith("stopped by SIG")


def test_a_missing_package_of_the_recipes_is_named(capsys):
    assert exit_code(raising(ModuleNotFoundError("No module named 'accelerate'", name="accelerate"))) == 2
    message = "error: recipes need accelerate, which is not installed: pip install 'timm-deq[recipes]'\n"
    assert capsys.readouterr().err == message
    assert exit_code(raising(ModuleNotFoundError("No module named 'recipes.x'", name="recipes.x"))) == 1


def test_a_librarys_refusal_becomes_a_users_error():
    with pytest.raises(UserError, match="^model: bad$"), user_errors(what="model: "):
        raise ValueError("bad")
    with pytest.raises(UserError, match="^mine$"), user_errors(what="model: "):
        check(True, "x", 1, "1")
        raise UserError("mine")
    with pytest.raises(KeyError), user_errors():
        raise KeyError("not of this class")


def test_a_mistyped_word_is_told_the_closest():
    assert did_you_mean("focall", ["focal", "vs"]) == " (did you mean 'focal'?)"
    assert did_you_mean("x", ["focal", "vs"]) == ""


# Two ranks that meet, of which both, or rank 1 alone, find an error; the other then waits for a rank that is gone.
RANKS = """
import os, sys, torch, torch.distributed as dist
from recipes.errors import UserError, exit_code

def work():
    dist.init_process_group("gloo")
    rank, kind = dist.get_rank(), sys.argv[1]
    if kind == "both" or rank == 1:
        raise UserError("ratio is 0")
    dist.all_reduce(torch.ones(1))

sys.exit(exit_code(work))
"""


@pytest.mark.ddp
@pytest.mark.parametrize("kind", ["both", "one"])
def test_of_two_ranks_one_reports(tmp_path, kind):
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0"
    command = [sys.executable, *launcher.split(), str(tmp_path / "ranks.py"), kind]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: ratio is 0") == 1
    assert "gloo" not in done.stderr and "in work" not in done.stderr  # no traceback but the launcher's own
