"""Tables of runs in Markdown: runs that differ by nothing but their seed are put together."""

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Any

from recipes.errors import UserError
from recipes.results.runs import FinishedRun, by_seed, measurements
from recipes.results.statistics import interval_of, paired_difference

Groups = Sequence[tuple[str, Sequence[FinishedRun]]]
"""Runs of each setting, with its name."""


def group_runs(
    runs: Sequence[FinishedRun], *, defaults: Mapping[str, Any], ignored: Collection[str]
) -> list[tuple[str, list[FinishedRun]]]:
    """Put runs together that differ by nothing but their seed, each setting with its name.

    Args:
        defaults: of all settings; an earlier version may not have had some of them.
        ignored: what runs of one setting may differ in.
    """
    groups: dict[str, list[FinishedRun]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        setting = {key: value for key, value in {**defaults, **run.config}.items() if key not in ignored}
        key = json.dumps(setting, sort_keys=True)
        settings[key] = setting
        groups.setdefault(key, []).append(run)
    return list(zip(differences(list(settings.values()), defaults), groups.values(), strict=True))


def differences(settings: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[str]:
    """For each, the settings in which it differs from another and from the defaults, `model_args` and `loss_args` spelt
    out."""
    flat = [spelt_out(setting) for setting in settings]
    keys = dict.fromkeys(key for setting in flat for key in setting)
    differing = [key for key in keys if len({json.dumps(setting.get(key)) for setting in flat}) > 1]
    shown = [[key for key in differing if key in s and s[key] != defaults.get(key)] for s in flat]
    return [" ".join(f"{key}={s[key]}" for key in keys) or "defaults" for s, keys in zip(flat, shown, strict=True)]


def spelt_out(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those in mappings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in setting.items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def table(groups: Groups, *, interval: bool = False) -> str:
    """Format a Markdown table with a row for each distinct setting, in the order in which they are given.

    Args:
        interval: show mean ± `interval_of` instead of mean ± standard deviation.
    """
    measured = [(name, [measurements(run.results) for run in runs]) for name, runs in groups]
    columns = list(dict.fromkeys(column for _, rows in measured for row in rows for column in row))
    lines = ["| " + " | ".join(["settings", "runs", *columns]) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, rows in measured:
        values = [[row.get(column, math.nan) for row in rows] for column in columns]
        cells = [spread(each, interval=interval) for each in values]
        lines.append("| " + " | ".join([name, str(len(rows)), *cells]) + " |")
    return "\n".join(lines)


def paired_table(groups: Groups) -> str:
    """Format a Markdown table of the differences of every setting to the first, seed by seed, a row for each number.

    Raises:
        UserError: one setting alone, or a seed twice.
    """
    if len(groups) < 2:
        raise UserError("paired compares runs of one setting alone; allowed: runs of two settings or more")
    measured: list[tuple[str, dict[int, dict[str, float]]]] = [
        (name, {seed: measurements(run.results) for seed, run in by_seed(runs, name).items()}) for name, runs in groups
    ]
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
        lines += ["", few_seeds(fewest)]
    return "\n".join(lines)


def few_seeds(seeds: int) -> str:
    """Say what so few common seeds can show."""
    least = f"{2 / 2**seeds:.3g}" if seeds else "not defined"
    return f"{seeds} common seeds, fewer than 6: the sign-flip p is never below 0.05 (least: {least})."


def spread(values: Sequence[float], *, interval: bool = False) -> str:
    """Format mean ± standard deviation, or mean ± `interval_of`; a single value alone, and none as `-`."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.3g}" if abs(known[0]) < 10 else f"{statistics.mean(known):.1f}"
    width = interval_of if interval else statistics.stdev
    return f"{mean} ± {width(known):.2g}" if len(known) > 1 else mean
