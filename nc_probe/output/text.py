"""The table of a report, for a terminal of 80 columns."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = ["as_text"]

WIDTH = 80
LONGEST = 30  # of a cell

_TABLE = (
    ("NC1  tr(S_W S_B^+)/K", "nc1"),
    ("     tr S_W / tr S_B", "nc1_trace"),
    ("     CDNV", "cdnv"),
    ("NC2  means to ETF", "nc2_etf"),
    ("     weights to ETF", "nc2_etf_weight"),
    ("     means to SELI", "nc2_seli"),
    ("     weights to SELI", "nc2_seli_weight"),
    ("     means to frame", "nc2_gof"),
    ("     weights to frame", "nc2_gof_weight"),
    ("     means, norms", "nc2_norm"),
    ("     means, angles", "nc2_angle"),
    ("     means, mean cosine", "mean_cosine"),
    ("     weights, mean cosine", "mean_cosine_weight"),
    ("GNC2 energy gap, log", "gnc2_log"),
    ("     energy gap, Riesz", "gnc2_riesz"),
    ("NC3  weights to means", "nc3"),
    ("NC4  agreement", "nc4"),
    ("accuracy", "accuracy"),
    ("  nearest mean", "center_accuracy"),
)


_SHORT = (("NC1", "nc1"), ("CDNV", "cdnv"), ("NC2", "nc2"), ("SELI", "nc2_seli"), ("NC3", "nc3"), ("NC4", "nc4"))


def as_text(report: Any, nested: Sequence[str]) -> str:
    """Lay out a CollapseReport.

    Args:
        report: with its groups side by side.
        nested: attributes that hold more reports by name, a table for each.
    """
    columns = {"all": report, **report.groups}
    rows = [("", *columns), ("classes", *(str(len(r.classes)) for r in columns.values()))]
    rows.append(("samples", *(str(r.samples) for r in columns.values())))
    rows += [(label, *(_number(getattr(r, name)) for r in columns.values())) for label, name in _TABLE]
    notes = f"center {report.center}; NC1 of rank {report.nc1_rank}, condition {_number(report.nc1_condition)}"
    if report.nc1_unresolved:
        notes += f" ({report.nc1_unresolved} of these directions may be rounding of the features: NC1 is noise then)"
    notes += f", from {report.nc1_source}" if report.nc1 == report.nc1 else f", {report.nc1_source}"
    text = [*_lines(rows), *_wrap(f"{notes}; NC4 {report.nc4_source}")]
    ranks = "no ranks, for which NCProbe takes spectrum=True"
    if report.feature_rank is not None:
        ranks = f"rank {report.feature_rank}, stable rank {_number(report.stable_rank)}"
        ranks += f", participation ratio {_number(report.participation_ratio)}"
    text += _wrap(f"features: {ranks}")
    for kind in nested:
        reports = getattr(report, kind)
        if reports:
            known = [
                (label, key)
                for label, key in _SHORT
                if any(getattr(r, key) == getattr(r, key) for r in reports.values())
            ]
            rows = [(kind, *(label for label, _ in known))]
            rows += [(name, *(_number(getattr(r, key)) for _, key in known)) for name, r in reports.items()]
            text += ["", *_lines(rows)]
    for paper, values in report.conventions.items():
        text += _wrap(f"{paper}: " + ", ".join(f"{name} {_number(value)}" for name, value in values.items()))
    return "\n".join(text)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table with its first column on the left; columns beyond the width follow below, beside the first again."""
    rows = [[cell if len(cell) <= LONGEST else f"{cell[: LONGEST - 3]}..." for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines, start = [], 1
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and sum(widths[start : stop + 1]) + 2 * (stop + 1 - start) + widths[0] <= WIDTH:
            stop += 1
        for row in rows:
            cells = [row[0].ljust(widths[0]), *map(str.rjust, row[start:stop], widths[start:stop])]
            lines.append("  ".join(cells).rstrip())
        start = stop
    return lines


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
