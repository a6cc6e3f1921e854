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
    arms: {deq: {}, twin: {model_args.equilibrium: false}}
    seeds: [0, 1, 2, 3, 4, 5]
    tune: {lr: [0.05, 0.1, 0.2]}            # may be left out, with tune_seeds
    tune_seeds: [100]
    mixed_precision: bf16                   # of `accelerate launch`; may be left out
"""

import sys
from collections.abc import Sequence
from typing import Any

from recipes.errors import UserError, check, exit_code
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
    from pathlib import Path

    import yaml

    from recipes.settings.grid import read_grid
    from recipes.training.cells import choose, run_cells
    from recipes.training.checkpoint import write_text

    grid, text = read_grid(args.grid)
    folder = Path(args.output)
    if not (folder / "grid.yaml").is_file():
        grid.check_cells()
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"output {args.output!r} exists and has no grid.yaml; allowed: the folder of a grid, or none"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "grid.yaml", text)
    elif yaml.safe_load((folder / "grid.yaml").read_text()) != yaml.safe_load(text):
        raise UserError(f"output {args.output!r} holds another grid; allowed: the folder of this one, or none")

    how: dict[str, Any] = {"jobs": args.jobs, "threads": args.threads, "mixed_precision": grid.mixed_precision}
    chosen, failed = {}, {}
    if grid.tune and not (folder / "chosen.yaml").is_file():
        failed = run_cells(grid.tuning_cells(), folder, **how, title="tuning")
        write_text(folder / "chosen.yaml", yaml.safe_dump(choose(grid, folder)))
    if grid.tune:
        chosen = yaml.safe_load((folder / "chosen.yaml").read_text())
    cells = grid.cells(chosen)
    failed |= run_cells(cells, folder, **how, title="cells")
    paired = ["--paired"] if len(grid.arms) > 1 else []
    for at in dict.fromkeys(cell.name.removeprefix(cell.arm).rsplit("-seed=", 1)[0] for cell in cells):
        print("python recipes/compare.py", *paired, *(f"{folder / 'runs' / arm}{at}-seed=*" for arm in grid.arms))
    return failed


if __name__ == "__main__":
    sys.exit(main())
