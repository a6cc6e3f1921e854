"""What the layer-peeled theory says of explicit networks and of linear DEQs on imbalanced classes.

    python recipes/theory.py --output runs/theory --verify

solves the layer-peeled program (Fang et al. 2021) for every K_A, R and budget that the flags name, and the same with a
linear DEQ z = V z + h0 under four conventions of what its budget is put on. It writes `theory.json` (every number),
`theory.md` (the tables) and `theory.png` (four panels). Twenty seconds on one thread; with `--verify`, which solves the
same programs from random starts and by a convex solver (needs cvxpy: pip install 'timm-deq[theory]'), a minute.

The mathematics is in recipes/results/theory: `program.py` the reduction to four numbers, `thresholds.py` the imbalance
at which minority classes merge or vanish, `equilibria.py` the conventions.
"""

import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import numpy as np
import scipy
from tqdm import tqdm

from recipes.errors import check, exit_code
from recipes.results.theory.equilibria import Convention
from recipes.results.theory.program import Budget
from recipes.results.theory.tables import Row, Settings
from recipes.settings.flags import Parser

# The convex program of more classes takes minutes each.
MOST_VERIFIED = 20


def main(argv: Sequence[str] | None = None) -> int:
    failed: list[Row] = []
    return exit_code(lambda: failed.extend(run(*read_flags(argv)))) or int(bool(failed))


def read_flags(argv: Sequence[str] | None = None) -> tuple[str, bool, Settings]:
    """Read the command line; --help prints and exits.

    Returns:
        Output folder, whether to verify, and what is asked.

    Raises:
        UserError: an unknown flag, or a value that is not allowed.
    """
    parser = Parser(
        prog="python recipes/theory.py", description="The layer-peeled theory, in numbers.", allow_abbrev=False
    )
    flag, default = parser.add_argument, asdict(Settings())

    def setting(name: str, kind: type, help: str, nargs: str | None = None, **more: Any) -> None:
        shown = default[name] if nargs is None else " ".join(map(str, default[name]))
        flag(f"--{name}", type=kind, nargs=nargs, default=default[name], help=f"{help} (default: {shown})", **more)

    flag("--output", required=True, metavar="DIR", help="folder to create; one that exists is never touched")
    flag("--verify", action="store_true", help="solve the programs in other ways too; exit with 1 if they disagree")
    setting("classes", int, "K", metavar="K")
    setting("majority", int, "numbers of majority classes K_A", "+", metavar="K_A")
    setting("ratio", float, "imbalances R = n_A / n_B", "+", metavar="R")
    setting("energy_w", float, "E_W, mean squared norm of classifier rows", metavar="E")
    setting("energy_h", float, "E_H, mean squared norms of features", "+", metavar="E")
    setting("rho", float, "bounds of the spectral norm of V", "+", metavar="RHO")
    setting("steps", int, "numbers of Picard steps", "+", metavar="T")
    setting("budget", str, "what E_H is a mean over", "+", choices=get_args(Budget))
    setting("convention", str, "what the budget of a DEQ is put on", "+", choices=get_args(Convention))
    setting("energy_v", float, "E_V, bound of the squared Frobenius norm of V", metavar="E")
    setting("seeds", int, "random starts of each program that is not convex", metavar="N")
    flags = vars(parser.parse_args(argv))
    return flags.pop("output"), flags.pop("verify"), Settings(**flags)


def run(output: str, verify: bool, settings: Settings) -> list[Row]:
    """Compute and write everything, and return the checks that have failed, which end the command with code 1."""
    # Seconds to import, which a mistyped flag need not wait for.
    from recipes.results.figures import save_figures
    from recipes.results.theory import checks, figure, page, search, tables
    from recipes.training.checkpoint import new_folder, to_json, whole_folder, write_text

    started, folder = time.perf_counter(), new_folder(output)
    if verify:
        check(settings.classes <= MOST_VERIFIED, "classes", settings.classes, f"at most {MOST_VERIFIED} with verify")
        search.require_cvxpy()
    parts: dict[str, Iterable[Any]] = {
        "optima": tables.optimum_rows(settings),
        "thresholds": tables.threshold_rows(settings),
        "limits": tables.limit_rows(settings),
        "frobenius": tables.frobenius_rows(settings),
        "penalty": tables.penalty_rows(settings),
    }
    if verify:
        parts["checks"] = (asdict(each) | {"holds": each.holds} for each in checks.checks(settings))
    rows = {name: list(tqdm(part, name, unit="row", leave=False, disable=None)) for name, part in parts.items()}
    text = page.page(settings, rows)
    print(text)
    with whole_folder(folder) as draft:
        results = {"settings": asdict(settings), **rows, "seconds": time.perf_counter() - started, **versions()}
        write_text(draft / "theory.json", to_json(results, indent=1))
        write_text(draft / "theory.md", text)
    save_figures(folder, {"theory": partial(figure.theory_figure, settings)}, dpi=100, pil_kwargs={"optimize": True})
    failed = [row for row in rows.get("checks", ()) if not row["holds"]]
    for row in failed:
        print(f"failed: {row['name']} is {row['value']:.6g}; {row['where']}", file=sys.stderr)
    return failed


def versions() -> dict[str, str]:
    """The versions that the numbers may depend on."""
    return {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}


if __name__ == "__main__":
    sys.exit(main())
