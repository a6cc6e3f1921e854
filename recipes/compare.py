"""Compare runs that differ in their settings, over seeds.

    python recipes/compare.py runs/deq-0 runs/deq-1 runs/twin-0 runs/twin-1

reads run folders that recipes/train.py has finished, puts those together that differ by nothing but their seed, and
prints a Markdown table: mean ± standard deviation (of the sample) of test accuracy in %, NC1 to NC4 on the training
images, and evaluations per image; with `--ci`, mean ± half of the 95 % confidence interval of the mean (Student's t).
Takes some seconds.
"""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import UserError, exit_code
from recipes.settings.config import TrainConfig

NOT_SETTINGS = ("seed", "output")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    folders = [word for word in words if word != "--ci"]
    return exit_code(lambda: compare(folders, interval="--ci" in words))


def compare(folders: Sequence[str], *, interval: bool) -> None:
    """Print the table of some run folders."""
    if unknown := [word for word in folders if word.startswith("--")]:
        raise UserError(f"{unknown[0]} is unknown; allowed: --ci, and run folders")
    if not folders:
        raise UserError("no run folder given; allowed: one or more that recipes/train.py has finished")
    print(table([read_run(folder) for folder in folders], interval=interval))


def read_run(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the settings and the results of a finished run.

    Raises:
        UserError: the folder does not hold a finished run.
    """
    config, results = Path(folder) / "config.yaml", Path(folder) / "results.json"
    for path in (config, results):
        if not path.is_file():
            raise UserError(f"{folder!r} has no {path.name}; allowed: folders of runs that have finished")
    return yaml.safe_load(config.read_text()), json.loads(results.read_text())


def table(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]], *, interval: bool = False) -> str:
    """Format a Markdown table with a row for each distinct setting, in the order in which they are given.

    Args:
        interval: show mean ± `interval_of` instead of mean ± standard deviation.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for config, results in runs:
        setting = {key: value for key, value in config.items() if key not in NOT_SETTINGS}
        key = json.dumps(setting, sort_keys=True)
        settings[key] = setting
        groups.setdefault(key, []).append(results)
    names = differences(list(settings.values()))
    measured = {key: [measurements(results) for results in group] for key, group in groups.items()}
    columns = list(dict.fromkeys(column for rows in measured.values() for row in rows for column in row))
    lines = ["| " + " | ".join(["settings", "runs", *columns]) + " |", "|---" * (len(columns) + 2) + "|"]
    for key, name in zip(groups, names, strict=True):
        values = [[row.get(column, math.nan) for row in measured[key]] for column in columns]
        cells = [spread(each, interval=interval) for each in values]
        lines.append("| " + " | ".join([name, str(len(groups[key])), *cells]) + " |")
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
    told = [[key for key in differing if key in s and s[key] != defaults.get(key)] for s in flat]
    return [" ".join(f"{key}={s[key]}" for key in keys) or "defaults" for s, keys in zip(flat, told, strict=True)]


def measurements(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one run, by column."""
    row = {f"{name} %": 100 * value for name, value in results["test"].items() if value is not None}
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
