"""The cells of a grid, run in processes of their own, each of them once."""

import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from recipes.errors import Stopped, UserError
from recipes.results.tables import spelt_out
from recipes.settings.grid import Cell, Grid, read_grid
from recipes.training.checkpoint import write_text

TRAIN = Path(__file__).parents[1] / "train.py"
POLL = 0.2  # seconds between looks at the processes


def grid_folder(output: str, grid: Grid, text: str) -> Path:
    """Make the folder of a grid that is new, or find it.

    Args:
        output: its path.
        grid: whose cells are checked before anything is written.
        text: of the file of the grid.

    Raises:
        UserError: a cell that recipes/train.py would refuse, or a folder of something else.
    """
    folder = Path(output)
    known = folder / "grid.yaml"
    if not known.is_file():
        grid.check_cells()
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"output {output!r} exists and has no grid.yaml; allowed: the folder of a grid, or none")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(known, text)
    elif _runs_of(read_grid(str(known))[0]) != _runs_of(grid):
        raise UserError(f"output {output!r} holds another grid; allowed: the folder of this one, or none")
    return folder


def _runs_of(grid: Grid) -> Grid:
    """A grid without what its page alone needs."""
    return replace(grid, reference=None, tested=None)


def command(cell: Cell, folder: Path, *, mixed_precision: str = "no") -> list[str]:
    """The command line of a cell: a run that begins, or goes on where it was interrupted."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    launch += ["--mixed_precision", mixed_precision, str(TRAIN)]
    own = ["--config", str(folder / "cells" / f"{cell.name}.yaml"), "--output", str(folder / "runs" / cell.name)]
    return [*launch, *own, "--seed", str(cell.seed), "--resume", "auto"]


def finished(cell: Cell, folder: Path) -> bool:
    """Whether the run of a cell has its results."""
    return (folder / "runs" / cell.name / "results.json").is_file()


def check_recorded(cells: Sequence[Cell], folder: Path) -> None:
    """Refuse runs that were made with other settings than their cells have now, as after another choice of `tune`.

    Raises:
        UserError: names the first such cell, a setting, and what to do.
    """
    for cell in cells:
        record, run = folder / "cells" / f"{cell.name}.yaml", folder / "runs" / cell.name
        if not (record.is_file() and run.is_dir()):
            continue
        before, now = spelt_out(yaml.safe_load(record.read_text()) or {}), spelt_out(cell.settings)
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                raise UserError(
                    f"cell {cell.name} has run with {key} {before.get(key)!r}, and {key} is {now.get(key)!r} now; "
                    f"allowed: the settings it has run with, or no {str(run)!r}: remove that folder to run it again"
                )


def run_cells(
    cells: Sequence[Cell], folder: Path, *, jobs: int, threads: int, title: str, mixed_precision: str = "no"
) -> dict[str, str]:
    """Run every cell that has not finished, some at a time.

    A cell's log is locked as long as a process writes to it, so a cell that a killed grid has left running is waited
    for and not started twice.

    Args:
        cells: to run.
        folder: of the grid; runs go into its `runs`, their output into `logs`.
        jobs: processes at a time. Where there are several accelerators they take turns.
        threads: of each process. They are the same for any number of jobs, because they change the last bits.
        title: of the progress bar.
        mixed_precision: of each process.

    Returns:
        The last line of the log of each cell that has failed, by its name.

    Raises:
        Stopped: SIGINT or SIGTERM, which the processes got too.
        UserError: as `check_recorded`, before anything runs.
    """
    check_recorded(cells, folder)
    for name in ("cells", "logs"):
        (folder / name).mkdir(exist_ok=True)
    waiting = [cell for cell in cells if not finished(cell, folder)]
    running: dict[int, tuple[Cell, subprocess.Popen]] = {}  # by slot
    failed: dict[str, str] = {}
    bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), desc=title, unit="cell")
    with bar, _signals() as came:
        try:
            while (waiting or running) and not came:
                free = sorted(set(range(jobs)) - set(running))
                started = {slot: _start_first(waiting, folder, slot, threads, mixed_precision) for slot in free}
                running |= {slot: both for slot, both in started.items() if both is not None}
                time.sleep(POLL)
                failed |= _collect(running, folder, bar)
                for cell in [cell for cell in waiting if finished(cell, folder)]:  # by processes of another grid
                    waiting.remove(cell)
                    bar.update()
        finally:
            for _, process in running.values():
                os.killpg(process.pid, came[0] if came else signal.SIGTERM)
            for _, process in running.values():
                process.wait()
    if came:
        done = sum(finished(cell, folder) for cell in cells)
        raise Stopped(
            came[0], f"those of the cells in {folder / 'runs'}, of which {done} of {len(cells)} have finished"
        )
    return failed


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Keep SIGINT and SIGTERM from ending this process; gives the list of those that have come."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _collect(running: dict[int, tuple[Cell, subprocess.Popen]], folder: Path, bar: tqdm) -> dict[str, str]:
    """Take the processes that have ended out of `running`, and report those that have failed."""
    failed = {}
    for slot, (cell, process) in list(running.items()):
        if process.poll() is not None:
            del running[slot]
            bar.update()
            if not finished(cell, folder):
                failed[cell.name] = _last_line(folder / "logs" / f"{cell.name}.log")
                bar.write(f"failed: {cell.name}: {failed[cell.name]}", file=sys.stderr)
    return failed


def _start_first(
    waiting: list[Cell], folder: Path, slot: int, threads: int, mixed_precision: str
) -> tuple[Cell, subprocess.Popen] | None:
    """Start the first cell that nobody is running, and take it off the list."""
    for cell in list(waiting):
        with (folder / "logs" / f"{cell.name}.log").open("ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if finished(cell, folder):  # meanwhile
                continue
            waiting.remove(cell)
            write_text(folder / "cells" / f"{cell.name}.yaml", yaml.safe_dump(cell.settings, sort_keys=False))
            env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            if (count := torch.cuda.device_count()) > 1:
                env["CUDA_VISIBLE_DEVICES"] = str(slot % count)
            arguments: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": env}
            launch = command(cell, folder, mixed_precision=mixed_precision)
            return cell, subprocess.Popen(launch, start_new_session=True, **arguments)
    return None


def _last_line(path: Path) -> str:
    """The error that a log tells of, or its last line."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]


def tuning_scores(grid: Grid, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Validation accuracies over axes and seeds, by arm and by values of `tune` as JSON.

    A run that has failed, as one that diverges does, counts as 0.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for cell in grid.tuning_cells():
        values = json.dumps({key: _look_up(cell.settings, key) for key in grid.tune})
        scores.setdefault(cell.arm, {}).setdefault(values, []).append(_validation_accuracy(folder / "runs" / cell.name))
    return scores


def choose(grid: Grid, folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Choose for each arm the values of `tune` with the best mean validation accuracy, of equals the first."""
    scores = tuning_scores(grid, folder)
    best = {arm: max(each, key=lambda text, each=each: statistics.mean(each[text])) for arm, each in scores.items()}
    return {arm: json.loads(text) for arm, text in best.items()}


def _look_up(settings: Mapping[str, Any], key: str) -> Any:
    first, _, rest = key.partition(".")
    return settings[first][rest] if rest else settings[first]


def _validation_accuracy(run: Path) -> float:
    if not (run / "results.json").is_file():
        return 0.0
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val"]["overall"]
