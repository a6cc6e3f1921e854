"""Finished runs, read from their folders, and the numbers that tables and pages show of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import UserError
from recipes.results.statistics import first_at_loss


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run that has finished.

    Attributes:
        folder: of the run.
        config: its settings.
        results: content of results.json, or a line of metrics.jsonl; empty for a run that has never come as far.
        records: lines of metrics.jsonl; none where there is no such file.
    """

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]] = field(repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int:
        return self.config["seed"]

    def at_loss(self, loss: float) -> "FinishedRun":
        """The run with the results of its first probe at a training loss of at most `loss`, empty without one."""
        return replace(self, results=first_at_loss(self.records, loss) or {})


def read_run(folder: str | Path, *, needs_records: bool = False) -> FinishedRun:
    """Read the settings and the results of a finished run.

    Raises:
        UserError: the folder does not hold one.
    """
    paths = config, results, metrics = [
        Path(folder) / name for name in ("config.yaml", "results.json", "metrics.jsonl")
    ]
    for path in paths if needs_records else paths[:2]:
        if not path.is_file():
            raise UserError(f"{str(folder)!r} has no {path.name}; allowed: folders of runs that have finished")
    path = config
    try:
        settings = yaml.safe_load(config.read_text())
        path = results
        found = json.loads(results.read_text())
        path = metrics
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    except (ValueError, yaml.YAMLError):
        raise UserError(f"{str(path)!r} cannot be read; allowed: files of runs that have finished") from None
    for path, content, keys in ((config, settings, {"seed"}), (results, found, {"test", "collapse", "solver"})):
        if not isinstance(content, dict) or not keys <= content.keys():
            lacking = " and ".join(sorted(keys))
            raise UserError(f"{str(path)!r} does not hold {lacking}; allowed: files of runs that have finished")
    return FinishedRun(folder=Path(folder), config=settings, results=found, records=records)


def by_seed(runs: Sequence[FinishedRun], what: str) -> dict[int, FinishedRun]:
    """Runs of one setting by their seeds.

    Args:
        what: the setting, for the error.

    Raises:
        UserError: a seed twice.
    """
    found: dict[int, FinishedRun] = {}
    for run in runs:
        if run.seed in found:
            raise UserError(f"seed {run.seed} is there twice of {what!r}; allowed with paired: each seed once")
        found[run.seed] = run
    return found


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
