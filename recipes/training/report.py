"""The page of a grid, or of any finished runs, written to a file."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipes.errors import UserError, check
from recipes.results.page.build import build_page
from recipes.results.page.study import Group, Look, Study
from recipes.results.runs import FinishedRun, by_seed, read_run
from recipes.results.tables import spelt_out
from recipes.settings.grid import Grid
from recipes.training.cells import finished, tuning_scores
from recipes.training.checkpoint import write_text
from recipes.training.looks import kept_look, look_at


def write_grid_page(
    grid: Grid, folder: Path, *, command: str, chosen: Mapping[str, Any], failed: Mapping[str, str], brief: bool = False
) -> Path:
    """Write report.html of a grid, whatever of it has finished.

    Args:
        grid: whose cells have run.
        folder: of the grid.
        command: that makes the page again.
        chosen: settings that tuning has chosen, by arm; none before.
        failed: why cells have failed, by name.
        brief: look at no model, and leave out the theory: for a grid that is being stopped.

    Returns:
        The path of the page.
    """
    cells = grid.cells(chosen)
    done = {cell.name: read_run(folder / "runs" / cell.name) for cell in cells if finished(cell, folder)}
    groups: dict[tuple[str, str], dict[int, FinishedRun]] = {(cell.setting, cell.arm): {} for cell in cells}
    for cell in cells:
        if cell.name in done:
            groups[cell.setting, cell.arm][cell.seed] = done[cell.name]
    missing = {cell.name: failed.get(cell.name, "not finished") for cell in cells if cell.name not in done}
    scores = tuning_scores(grid, folder) if chosen else {}
    study = Study(
        title=f"Grid {folder.name}",
        command=command,
        arms={arm: spelt_out(settings) | dict(chosen.get(arm, {})) for arm, settings in grid.arms.items()},
        reference=grid.reference_arm,
        tested=grid.tested_arm,
        groups=[Group(arm=arm, setting=setting, runs=runs) for (setting, arm), runs in groups.items()],
        missing=missing,
        tuning=[
            (arm, values.strip("{}").replace('"', ""), accuracies, json.loads(values) == chosen[arm])
            for arm, each in scores.items()
            for values, accuracies in each.items()
        ],
    )
    path = folder / "report.html"
    return write_page(study, path, kept=folder / "looks", brief=brief)


def write_comparison(groups: Sequence[tuple[str, Sequence[FinishedRun]]], word: str) -> Path:
    """Write the page of any runs, each setting an arm: the last is tested against the first.

    Args:
        groups: runs of each setting, with its name.
        word: path of the page; a file that is there is replaced.

    Raises:
        UserError: a page that cannot be written there, or a seed twice of a setting.
    """
    path = Path(word)
    check(path.parent.is_dir() and not path.is_dir(), "html", word, "the path of a file in a folder that is there")
    study = Study(
        title="Comparison of runs",
        command="python recipes/compare.py RUN ... --html FILE",
        arms={name: {} for name, _ in groups},
        reference=groups[0][0],
        tested=groups[-1][0],
        groups=[Group(arm=name, setting="", runs=by_seed(runs, name)) for name, runs in groups],
    )
    return write_page(study, path)


def write_page(study: Study, path: Path, *, kept: Path | None = None, brief: bool = False) -> Path:
    """Look at the models of a study, and write its page.

    Args:
        study: without looks.
        path: of the page.
        kept: folder of what was seen of each run; nothing is kept if not given.
        brief: as in `write_grid_page`.
    """
    looks: dict[str, Look] = {}
    notes: dict[str, int] = {}
    if not brief:
        shown = {str(next(iter(group.runs.values())).folder) for group in study.groups if group.runs}
        for run in tqdm(study.runs, desc="looks", unit="run", leave=False, disable=None):
            features = str(run.folder) in shown
            look, why = _try(lambda run=run, features=features: _look(run, kept, features=features))
            if look is not None:
                looks[str(run.folder)] = look
            elif why:
                notes[why] = notes.get(why, 0) + 1
    notes = {f"{count} models could not be looked at again: {why}": count for why, count in notes.items()}
    study = replace(study, looks=looks, notes=[*study.notes, *notes])
    write_text(path, build_page(study, theory=not brief))
    return path


def _look(run: FinishedRun, kept: Path | None, *, features: bool) -> Look | None:
    if not features and not run.results["solver"]:
        return None
    if kept is None:
        return look_at(run, features=features)
    return kept_look(kept / f"{run.name}.json", run, features=features)


def _try(look: Callable[[], Look | None]) -> tuple[Look | None, str]:
    """Look at a model; where that fails say why, as the numbers of the page do not need it."""
    try:
        return look(), ""
    except Exception as error:  # whatever a data set or a model that is gone raises
        if sys.flags.dev_mode:
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return None, " ".join(f"{kind}{error}".split())
