"""Run a grid of trainings, cell by cell, each of them once.

    python recipes/grid.py paper_digits --output runs/paper --jobs 2

runs every combination of arms, axes and seeds of a grid, here of recipes/presets/grids/paper_digits.yaml, by
`accelerate launch recipes/train.py`, and prints the commands that compare the arms. Where the grid has `tune`, each arm
first chooses among those values by validation accuracy, with seeds of their own. The same command after an interruption
goes on: a cell that has finished is not run again, one that was killed is resumed. A cell that fails is told and does
not stop the others. The output folder holds `grid.yaml`, `runs`, `logs` and `chosen.yaml`.

A grid is a YAML file:

    base: {epochs: 20}                      # settings of recipes/train.py for all runs
    axes: {ratio: [10, 40]}                 # every arm goes through every combination
    also: [{imbalance: balanced}]           # and through these settings besides; may be left out
    arms: {twin: {model_args.equilibrium: false}, deq: {}}
    reference: twin                         # what the page compares with: the first arm if left out
    tested: deq                             # what the page is about: the last if left out
    seeds: [0, 1, 2, 3, 4, 5]
    tune: {lr: [0.05, 0.1, 0.2]}            # may be left out, with tune_seeds
    tune_seeds: [100]
    mixed_precision: bf16                   # of `accelerate launch`; may be left out
"""

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from recipes.errors import Stopped, check, exit_code
from recipes.settings.flags import Parser


def main(argv: Sequence[str] | None = None) -> int:
    failed: dict[str, str] = {}
    return exit_code(lambda: failed.update(run(argv))) or int(bool(failed))


def run(argv: Sequence[str] | None) -> dict[str, str]:
    """Run a grid, and return the cells that have failed, which end the command with code 1.

    Raises:
        UserError: a grid that is not one, or the folder of another.
    """
    parser = Parser(prog="python recipes/grid.py", description="Run a grid of trainings.", allow_abbrev=False)
    parser.add_argument("grid", metavar="GRID", help="YAML file, or the name of one of recipes/presets/grids")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the grid, new or of the same grid")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    args = parser.parse_args(argv)
    for name in ("jobs", "threads"):
        check(getattr(args, name) >= 1, name, getattr(args, name), "1 or more")

    # Imported after the command line has been read, so that mistakes are answered at once.
    import yaml

    from recipes.settings.grid import read_grid
    from recipes.training.cells import choose, grid_folder, run_cells
    from recipes.training.checkpoint import write_text
    from recipes.training.report import write_grid_page

    grid, text = read_grid(args.grid)
    folder = grid_folder(args.output, grid, text)
    chosen: dict[str, Any] = {}
    failed: dict[str, str] = {}
    command = shlex.join(["python", "recipes/grid.py", args.grid, "--output", args.output])
    page: dict[str, Any] = {"command": command, "chosen": chosen, "failed": failed}
    how: dict[str, Any] = {"jobs": args.jobs, "threads": args.threads, "mixed_precision": grid.mixed_precision}
    try:
        if grid.tune and not (folder / "chosen.yaml").is_file():
            failed |= run_cells(grid.tuning_cells(), folder, **how, title="tuning")
            write_text(folder / "chosen.yaml", yaml.safe_dump(choose(grid, folder)))
        if grid.tune:
            chosen |= yaml.safe_load((folder / "chosen.yaml").read_text())
        failed |= run_cells(grid.cells(chosen), folder, **how, title="cells")
    except Stopped:
        print(write_grid_page(grid, folder, **page, brief=True))
        raise
    paired = ["--paired"] if len(grid.arms) > 1 else []
    for at in dict.fromkeys(cell.name.removeprefix(cell.arm).rsplit("-seed=", 1)[0] for cell in grid.cells(chosen)):
        print("python recipes/compare.py", *paired, *(f"{folder / 'runs' / arm}{at}-seed=*" for arm in grid.arms))
    print(write_grid_page(grid, folder, **page))
    return failed


if __name__ == "__main__":
    sys.exit(main())
