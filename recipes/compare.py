"""Compare runs that differ in their settings, over seeds.

    python recipes/compare.py runs/deq-0 runs/deq-1 runs/twin-0 runs/twin-1 --paired

reads run folders that recipes/train.py has finished, puts those together that differ by nothing but their seed, and
prints a Markdown table: mean ± standard deviation (of the sample) of test accuracy in %, NC1 to NC4 on the training
images, and evaluations per image; with `--ci`, mean ± half of the 95 % confidence interval of the mean (Student's t).
`--paired` adds the differences of every setting to that of the first folder, seed by seed, with their 95 % interval and
the p of the paired t and the sign-flip test. `--loss L` compares at equal training loss and not at the end: at the
first epoch with a probe whose mean training loss is at most L, accuracies being those on validation images. Takes some
seconds.
"""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import UserError, exit_code
from recipes.results.statistics import first_at_loss, paired_difference
from recipes.settings.config import TrainConfig
from recipes.settings.flags import Parser
from recipes.settings.sections import HubSettings

# What runs of one setting may differ in: they may have been interrupted, and pushed to different places.
NOT_SETTINGS = {"seed", "output", "resume", *(field.name for field in fields(HubSettings))}

Run = tuple[dict[str, Any], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: compare(argv))


def compare(argv: Sequence[str] | None) -> None:
    """Print the tables that a command line asks for.

    Raises:
        UserError: an unknown flag, a folder that does not hold a finished run, or runs that cannot be paired.
    """
    parser = Parser(prog="python recipes/compare.py", description="Compare runs over seeds.", allow_abbrev=False)
    flag = parser.add_argument
    flag("folders", nargs="+", metavar="RUN", help="run folder that recipes/train.py has finished")
    flag("--ci", action="store_true", help="95 %% confidence intervals in place of standard deviations")
    flag("--paired", action="store_true", help="differences to the setting of the first folder, seed by seed")
    flag("--loss", type=float, metavar="L", help="compare at the first probe whose training loss is at most L")
    args = parser.parse_intermixed_args(argv)
    runs = [read_run(folder, loss=args.loss) for folder in args.folders]
    print(table(runs, interval=args.ci))
    if missing := sum(not results for _, results in runs):
        print(f"\n{missing} of {len(runs)} runs have no probe at a training loss of at most {args.loss:g}.")
    if args.paired:
        print("\n" + paired_table(runs))


def read_run(folder: str, *, loss: float | None = None) -> Run:
    """Read the settings and the results of a finished run.

    Args:
        folder: of the run.
        loss: training loss at which to take the results, from metrics.jsonl; none of a run that never reaches it.

    Raises:
        UserError: the folder does not hold a finished run.
    """
    config, results, metrics = (Path(folder) / name for name in ("config.yaml", "results.json", "metrics.jsonl"))
    for path in (config, results) if loss is None else (config, results, metrics):
        if not path.is_file():
            raise UserError(f"{folder!r} has no {path.name}; allowed: folders of runs that have finished")
    settings = yaml.safe_load(config.read_text())
    if loss is None:
        return settings, json.loads(results.read_text())
    return settings, dict(first_at_loss([json.loads(line) for line in metrics.read_text().splitlines()], loss) or {})


def table(runs: Sequence[Run], *, interval: bool = False) -> str:
    """Format a Markdown table with a row for each distinct setting, in the order in which they are given.

    Args:
        interval: show mean ± `interval_of` instead of mean ± standard deviation.
    """
    groups = by_setting(runs)
    measured = [(name, [measurements(results) for _, results in group]) for name, group in groups]
    columns = list(dict.fromkeys(column for _, rows in measured for row in rows for column in row))
    lines = ["| " + " | ".join(["settings", "runs", *columns]) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, rows in measured:
        values = [[row.get(column, math.nan) for row in rows] for column in columns]
        cells = [spread(each, interval=interval) for each in values]
        lines.append("| " + " | ".join([name, str(len(rows)), *cells]) + " |")
    return "\n".join(lines)


def by_setting(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Put runs together that differ by nothing but their seed, each setting with its name."""
    groups: dict[str, list[Run]] = {}
    settings: dict[str, dict[str, Any]] = {}
    defaults = asdict(TrainConfig(output="."))  # of what an earlier version had no setting for
    for config, results in runs:
        setting = {key: value for key, value in (defaults | config).items() if key not in NOT_SETTINGS}
        key = json.dumps(setting, sort_keys=True)
        settings[key] = setting
        groups.setdefault(key, []).append((config, results))
    return list(zip(differences(list(settings.values())), groups.values(), strict=True))


def paired_table(runs: Sequence[Run]) -> str:
    """Format a Markdown table of the differences of every setting to the first, seed by seed, a row for each number.

    Raises:
        UserError: one setting alone, or a seed twice.
    """
    groups = by_setting(runs)
    if len(groups) < 2:
        raise UserError("paired compares runs of one setting alone; allowed: runs of two settings or more")
    measured: list[tuple[str, dict[int, dict[str, float]]]] = []
    for name, group in groups:
        seeds = [config["seed"] for config, _ in group]
        if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
            raise UserError(f"seed {twice[0]} is there twice of {name!r}; allowed with paired: each seed once")
        measured.append((name, {config["seed"]: measurements(results) for config, results in group}))
    (reference, base), *others = measured
    columns = dict.fromkeys(column for _, rows in measured for row in rows.values() for column in row)
    lines = [f"| minus {reference} | n | difference | 95 % interval | t test p | sign-flip p |", "|---" * 6 + "|"]
    for (name, rows), column in product(others, columns):
        first, second = ({seed: row.get(column, math.nan) for seed, row in each.items()} for each in (rows, base))
        found = paired_difference(first, second)
        interval = f"{found.low:+.3g} to {found.high:+.3g}" if math.isfinite(found.low) else "-"
        cells = [f"{name}: {column}", str(found.n), f"{found.mean:+.3g}", interval]
        cells += [f"{found.t_p:.3g}", f"{found.sign_flip_p:.3g}"]
        lines.append("| " + " | ".join("-" if cell in ("nan", "+nan") else cell for cell in cells) + " |")
    fewest = min(len(base.keys() & rows.keys()) for _, rows in others)
    if fewest < 6:
        least = f"{2 / 2**fewest:.3g}" if fewest else "not defined"
        lines += ["", f"{fewest} common seeds, fewer than 6: the sign-flip p is never below 0.05 (least: {least})."]
    return "\n".join(lines)


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each, the settings in which it differs from another and from the defaults, `model_args` and `loss_args` spelt
    out."""
    defaults, flat = asdict(TrainConfig(output="-")), []
    for setting in settings:
        spelt = {}
        for key, value in setting.items():
            spelt |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        flat.append(spelt)
    keys = dict.fromkeys(key for setting in flat for key in setting)
    differing = [key for key in keys if len({json.dumps(setting.get(key)) for setting in flat}) > 1]
    shown = [[key for key in differing if key in s and s[key] != defaults.get(key)] for s in flat]
    return [" ".join(f"{key}={s[key]}" for key in keys) or "defaults" for s, keys in zip(flat, shown, strict=True)]


def measurements(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one run by column, of results.json or of a line of metrics.jsonl; none of an empty one."""
    if not results:
        return {}
    split, prefix = ("test", "") if "test" in results else ("val", "val ")
    row = {f"{prefix}{name} %": 100 * value for name, value in results.get(split, {}).items() if value is not None}
    for name, key in (("NC1", "nc1"), ("NC2", "nc2_etf"), ("NC3", "nc3"), ("NC4", "nc4")):
        value = results["collapse"][key]
        row[name] = math.nan if value is None else value
    if results["solver"]:
        row["evaluations"] = results["solver"]["mean_steps"]
    return row


def interval_of(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean of a normal distribution: t s / sqrt(n), where t is the 97.5 %
    quantile of Student's distribution with n - 1 degrees of freedom, for n values of standard deviation s, 2 or more.

    Source: Student, "The probable error of a mean", Biometrika 1908.
    """
    from scipy.stats import t  # takes a second to import

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float], *, interval: bool = False) -> str:
    """Format mean ± standard deviation, or mean ± `interval_of`; a single value alone, and none as `-`."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.3g}" if abs(known[0]) < 10 else f"{statistics.mean(known):.1f}"
    width = interval_of if interval else statistics.stdev
    return f"{mean} ± {width(known):.2g}" if len(known) > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
