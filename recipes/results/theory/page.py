"""The page in Markdown that the tables of the theory make."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.results.theory.tables import DECAY, Row, Settings

EXPLAINED = """\
`explicit` is the optimum of the layer-peeled program of an explicit network, and under the convention `z`, the budget
on the features that the classifier sees, of every linear DEQ z = V z + h0 too. `DEQ` is the optimum under `spectral`,
the budget on h0 and ||V||_2 <= rho: the same program with E_H / (1 - rho)^2, so a larger gain and nothing else. At
equal norms of W and z no DEQ is below the explicit optimum."""


def page(settings: Settings, tables: Mapping[str, Sequence[Row]]) -> str:
    """All tables, each under a heading that says what it shows.

    Args:
        settings: what was asked.
        tables: rows by name: 'optima', 'thresholds', 'limits', 'frobenius', 'penalty' and, if asked for, 'checks'.
    """
    parts = [
        "# The layer-peeled program, explicit and with a linear DEQ",
        f"K = {settings.classes} classes, E_W = {settings.energy_w:g}.",
        EXPLAINED,
        *_optima(settings, tables["optima"]),
        "## Imbalance at which minority rows of W merge (R*) and vanish (R**)",
        markdown([_threshold(row) for row in tables["thresholds"]]),
        "## NC2 in the limit of a large gain: simplex ETF (budget `class`), SELI (budget `sample`)",
        markdown(
            [
                {**_where(row), "NC2 of W": f"{row['nc2_w']:.4f}", "NC2 of H": f"{row['nc2_h']:.4f}"}
                for row in tables["limits"]
            ]
        ),
    ]
    if tables["frobenius"]:
        parts += [
            f"## `frobenius`: ||V||_F^2 <= {settings.energy_v:g}, the best of {settings.seeds} random starts",
            markdown([_frobenius(row) for row in tables["frobenius"]]),
        ]
    if tables["penalty"]:
        parts += [
            f"## `penalty`: weight decay l = {DECAY:g} on W, V and h0, eigenvalues of V at 1 - gap",
            "The objective over l has no minimum: on a polygon it tends to 1, on a simplex ETF to (K - 1) / 2.",
            markdown(
                [{**row, "gap": f"{row['gap']:g}", "objective": f"{row['objective']:.5f}"} for row in tables["penalty"]]
            ),
        ]
    if "checks" in tables:
        parts += ["## Checks: the numbers above against other solvers", markdown(_checks(tables["checks"]))]
    return "\n\n".join(parts) + "\n"


def _optima(settings: Settings, rows: Sequence[Row]) -> list[str]:
    """For each budget a table: a row for each K_A, R and E_H, a column for each rho."""
    parts = []
    for budget in settings.budget:
        cells: dict[tuple[Any, ...], Row] = {}
        for row in rows:
            if row["budget"] == budget and row["map"] in ("explicit", "equilibrium"):
                at = (row["majority"], row["ratio"], row["energy_h"])
                name = "explicit" if row["map"] == "explicit" else f"DEQ, rho = {row['rho']:g}"
                cells.setdefault(at, _where({key: row[key] for key in ("majority", "ratio", "energy_h")}))
                cells[at][name] = f"{row['loss']:.4g} / {_cosine(row)} / {row['nc2_w']:.3f}"
        parts += [f"## Budget `{budget}`: loss / minority cosine of W / NC2 of W", markdown(list(cells.values()))]
    gap = max(row["relative_gap"] for row in rows)
    parts.append(f"Every loss is within a factor of 1 - {gap:.0e} of the optimum over all logits (duality gap).")
    return parts


def _cosine(row: Row) -> str:
    return "vanished" if math.isnan(row["minority_cosine_w"]) else f"{row['minority_cosine_w']:.3f}"


def _where(row: Row) -> Row:
    names = {"budget": "budget", "majority": "K_A", "ratio": "R", "energy_h": "E_H", "rho": "rho"}
    return {title: f"{row[key]:g}" if key != "budget" else row[key] for key, title in names.items() if key in row}


def _threshold(row: Row) -> Row:
    titled = _where(row)
    for title, key in (("R*", "merge_ratio"), ("R**", "vanish_ratio")):
        titled[title] = "none below 1e299" if math.isinf(row[key]) else f"{row[key]:.6g}"
    return titled


def _frobenius(row: Row) -> Row:
    return {
        **_where(row),
        "loss": f"{row['loss']:.6g}",
        "explicit": f"{row['explicit_loss']:.6g}",
        "explicit, same norms": f"{row['explicit_loss_at_same_norms']:.6g}",
        "simplex ETF": "" if math.isnan(row["etf_loss"]) else f"{row['etf_loss']:.6g}",
        "rank": row["rank"],
        "minority cosine of W": "" if row["ratio"] == 1 else _cosine(row),
        "NC2 of W": f"{row['nc2_w']:.3f}",
    }


def _checks(rows: Sequence[Row]) -> list[Row]:
    """A line for each kind of check: how many programs, the range of its values, the range allowed."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["name"], []).append(row)
    lines = []
    for name, group in kinds.items():
        values, failed = [row["value"] for row in group], sum(not row["holds"] for row in group)
        line: Row = {"check": name, "programs": len(group), "from": f"{min(values):.3g}", "to": f"{max(values):.3g}"}
        allowed = f"{group[0]['least']:g} to {group[0]['most']:g}"
        lines.append({**line, "allowed": allowed, "failed": failed})
    return lines


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows that have the same keys."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
