"""Compare runs that differ in their settings, over seeds.

    python recipes/compare.py runs/deq-0 runs/deq-1 runs/twin-0 runs/twin-1 --paired

reads run folders that recipes/train.py has finished, puts those together that differ by nothing but their seed, and
prints a Markdown table: mean ± standard deviation (of the sample) of test accuracy in %, NC1 to NC4 on the training
images, and evaluations per image; with `--ci`, mean ± half of the 95 % confidence interval of the mean (Student's t).
`--paired` adds the differences of every setting to that of the first folder, seed by seed, with their 95 % interval and
the p of the paired t and the sign-flip test. `--loss L` compares at equal training loss and not at the end: at the
first epoch with a probe whose mean training loss is at most L, accuracies being those on validation images. Takes some
seconds.

`--html FILE` writes a page instead, as recipes/grid.py does of a grid: whether the setting given last does better than
the first, tables, curves and Gram matrices, and, of the models and their images, accuracy after one update of the
solver, t-SNE and collapse along the solve. It takes some seconds for each model that solves.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields

from recipes.errors import check, exit_code
from recipes.results.runs import read_run
from recipes.results.tables import group_runs, paired_table, table
from recipes.settings.config import TrainConfig
from recipes.settings.flags import Parser
from recipes.settings.sections import HubSettings

# What runs of one setting may differ in: they may have been interrupted, and pushed to different places.
NOT_SETTINGS = {"seed", "output", "resume", *(field.name for field in fields(HubSettings))}


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: compare(argv))


def compare(argv: Sequence[str] | None) -> None:
    """Print the tables that a command line asks for, or write their page.

    Raises:
        UserError: an unknown flag, a folder that does not hold a finished run, or runs that cannot be paired.
    """
    parser = Parser(prog="python recipes/compare.py", description="Compare runs over seeds.", allow_abbrev=False)
    flag = parser.add_argument
    flag("folders", nargs="+", metavar="RUN", help="run folder that recipes/train.py has finished")
    flag("--ci", action="store_true", help="95 %% confidence intervals in place of standard deviations")
    flag("--paired", action="store_true", help="differences to the setting of the first folder, seed by seed")
    flag("--loss", type=float, metavar="L", help="compare at the first probe whose training loss is at most L")
    flag("--html", metavar="FILE", help="write a page with all of it, figures too")
    args = parser.parse_intermixed_args(argv)
    for name in ("ci", "paired", "loss") if args.html is not None else ():
        value = getattr(args, name)
        check(value is False or value is None, name, value, "not given with html, which has it")
    runs = [read_run(folder, needs_records=args.loss is not None or args.html is not None) for folder in args.folders]
    if args.loss is not None:
        runs = [run.at_loss(args.loss) for run in runs]
    groups = group_runs(runs, defaults=asdict(TrainConfig(output=".")), ignored=NOT_SETTINGS)
    if args.html is not None:
        from recipes.training.report import write_comparison  # imports torch, and draws

        print(write_comparison(groups, args.html))
        return
    print(table(groups, interval=args.ci))
    if missing := sum(not run.results for run in runs):
        print(f"\n{missing} of {len(runs)} runs have no probe at a training loss of at most {args.loss:g}.")
    if args.paired:
        print("\n" + paired_table(groups))


if __name__ == "__main__":
    sys.exit(main())
