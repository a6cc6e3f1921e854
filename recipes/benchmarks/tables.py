"""What the parts of the benchmark share: rows, tables of them, and times."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Row", "compared", "in_turn", "milliseconds", "table"]

Row = dict[str, Any]
"""One line of a table, by the heading of its columns."""


def compared(name: str, ours: float, peer: float) -> Row:
    """The columns of a comparison; None for what is infinite, and for a ratio with it."""
    known = {side: value if math.isfinite(value) else None for side, value in (("ours", ours), ("peer", peer))}
    known["ratio"] = None if None in known.values() else ours / peer
    return {f"{name}, {side}": value for side, value in known.items()}


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; `-` stands for None."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(value) for value in row.values()) + " |")
    return "\n".join(lines)


def cell(value: str | float | None) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return 1000 * (time.perf_counter() - start)


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each run, by name: one after the other in every round, so that all share what the machine
    does besides. The caller warms up."""
    times = [{name: milliseconds(run, device) for name, run in runs.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in runs}
