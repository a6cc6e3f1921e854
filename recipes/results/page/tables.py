"""Tables of a page: means over seeds with their intervals, paired differences, and the runs themselves."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from recipes.results.page.study import (
    Group,
    Look,
    Measure,
    Study,
    accuracy,
    collapse,
    common_loss,
    compare,
    compared_measures,
    number,
    solver,
    unsolved,
)
from recipes.results.runs import FinishedRun
from recipes.results.statistics import PairedDifference, interval_of


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and the number that rows are sorted by."""

    text: str
    value: float = math.nan

    @property
    def sort(self) -> str:
        return f"{self.value:.10g}" if math.isfinite(self.value) else ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: its head, whether it is marked (`unsolved`) or stands out (`main`), and the runs that it is made of."""

    head: str
    cells: Sequence[Cell]
    runs: Sequence[FinishedRun] = ()
    unsolved: bool = False
    main: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    note: str
    first: str
    columns: Sequence[str]
    rows: Sequence[Row]


def groups_of(study: Study, setting: str) -> list[str]:
    """Groups of classes whose accuracy is known at a setting, all classes first."""
    found = dict.fromkeys(
        name for group in study.at(setting).values() for run in group.runs.values() for name in run.results["test"]
    )
    return [*found]


def setting_tables(study: Study, setting: str) -> list[Table]:
    """The tables of a setting: accuracy, collapse, solves and norms."""
    names, groups = groups_of(study, setting), [*study.at(setting).values()]
    accuracies = {f"{name} %": accuracy(name) for name in names}
    cut = {f"{name} % after one update": one_update(study.looks, name) for name in names}
    geometry = {"NC1": "nc1", "NC2: ETF": "nc2_etf", "NC2 of W": "nc2_etf_weight", "SELI": "nc2_seli"}
    geometry |= {"SELI of W": "nc2_seli_weight", "frame": "nc2_gof", "frame of W": "nc2_gof_weight"}
    geometry |= {"NC3": "nc3", "NC4": "nc4"}
    solves = {"residual": solver("mean_residual"), "evaluations": solver("mean_steps")}
    solves |= {"converged %": solver("converged", 100), "mean ‖z‖²": collapse("mean_square_norm")}
    solves |= {"mean ‖w‖²": collapse("mean_square_norm_weight"), "training loss": _training_loss}
    tables = [
        _means("Accuracy", "On test images, which were used once, at the end.", groups, accuracies | cut),
        _means(
            "Neural collapse",
            "On the training images, at the end. Distances to a simplex ETF, to SELI and to an orthogonal frame are "
            "of class means, and of the rows of W.",
            groups,
            {name: collapse(key) for name, key in geometry.items()},
        ),
        _means("Solves and norms", "Solves of test images; norms over training images.", groups, solves),
    ]
    return tables


def one_update(looks: Mapping[str, Look], name: str) -> Measure:
    """Accuracy in % of a run when its solver is cut to one update; NaN if it was not looked at, or does not solve."""

    def measure(run: FinishedRun) -> float:
        look = looks.get(str(run.folder))
        return 100 * number(look.one_update.get(name)) if look else math.nan

    return measure


def _training_loss(run: FinishedRun) -> float:
    losses = [record["train_loss"] for record in run.records if record.get("train_loss") is not None]
    return losses[-1] if losses else math.nan


def _means(title: str, note: str, groups: Sequence[Group], measures: Mapping[str, Measure]) -> Table:
    """A row for each arm, a column for each measure that some run has."""
    values = {
        name: [[measure(run) for run in group.runs.values()] for group in groups] for name, measure in measures.items()
    }
    values = {name: arms for name, arms in values.items() if any(math.isfinite(x) for each in arms for x in each)}
    rows = [
        Row(
            head=group.arm,
            cells=[Cell(str(len(group.runs)), len(group.runs)), *(mean_cell(arms[i]) for arms in values.values())],
            runs=[*group.runs.values()],
            unsolved=unsolved(group),
        )
        for i, group in enumerate(groups)
    ]
    return Table(title=title, note=note, first="arm", columns=["n", *values], rows=rows)


def mean_cell(values: Sequence[float]) -> Cell:
    """Mean ± half of its 95 % interval; the mean alone of fewer than two values."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Cell("–")
    mean = statistics.mean(known)
    if len(known) == 1:
        return Cell(short(mean), mean)
    return Cell(with_half(mean, interval_of(known)), mean)


def with_half(mean: float, half: float) -> str:
    """Mean ± half of an interval of two digits, both to the same place."""
    places = max(0, 1 - math.floor(math.log10(half))) if half > 0 else math.inf
    if places > 6:
        return f"{short(mean)} ± {half:.2g}"
    return f"{mean:.{places}f} ± {half:.{places}f}"


def short(value: float) -> str:
    """A number to three digits, four from 1000 on."""
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def difference_tables(study: Study, setting: str) -> list[Table]:
    """Tested minus each other arm, at the end and at equal training loss."""
    groups = study.at(setting)
    others = [groups[arm] for arm in study.others if arm in groups]
    if study.tested not in groups or not others:
        return []
    tested, endpoint = groups[study.tested], study.endpoint(setting)
    found = [
        _differences(
            f"{study.tested} minus another arm, at the end",
            "Seed by seed: the mean with Student's 95 % interval, and p of the paired t and the sign-flip test.",
            tested,
            others,
            compared_measures(endpoint, groups_of(study, setting)),
        )
    ]
    loss = common_loss([tested, *others])
    if math.isfinite(loss):
        validated = [name for name in groups_of(study, setting) if _has_validation(tested, name)]
        measures = compared_measures(endpoint, validated) if validated else compared_measures(endpoint, [])
        note = (
            f"At the first probe of each run whose training loss is at most {loss:.3g}, the lowest that all of them "
            "reach; accuracies are those on validation images."
        )
        title = f"{study.tested} minus another arm, at equal training loss"
        measures["training loss"] = lambda run: number(run.results.get("train_loss"))
        found.append(_differences(title, note, tested, others, measures, loss=loss))
    return found


def _has_validation(group: Group, name: str) -> bool:
    return any(name in (record.get("val") or {}) for run in group.runs.values() for record in run.records)


def _differences(
    title: str,
    note: str,
    tested: Group,
    others: Sequence[Group],
    measures: Mapping[str, Measure],
    *,
    loss: float | None = None,
) -> Table:
    rows = []
    for other, (name, measure) in product(others, measures.items()):
        found = compare(tested, other, measure, loss=loss)
        if found.n:
            both = [run for seed, run in tested.runs.items() if seed in other.runs]
            both += [run for seed, run in other.runs.items() if seed in tested.runs]
            main = name == next(iter(measures))
            head = f"{name}, minus {other.arm}"
            rows.append(Row(head=head, cells=difference_cells(found), runs=both, main=main, unsolved=unsolved(tested)))
    columns = ["n", "difference", "95 % interval", "t test p", "sign-flip p"]
    return Table(title=title, note=note, first="measure", columns=columns, rows=rows)


def difference_cells(found: PairedDifference) -> list[Cell]:
    """Seeds, mean, interval and the two p of a paired difference."""
    interval = Cell(f"{found.low:+.3g} to {found.high:+.3g}", found.low)
    if not math.isfinite(found.low):
        interval = Cell("too few seeds" if found.n < 2 else "all seeds equal")
    p = [Cell(f"{value:.2g}", value) if math.isfinite(value) else Cell("–") for value in (found.t_p, found.sign_flip_p)]
    return [Cell(str(found.n), found.n), Cell(f"{found.mean:+.3g}", found.mean), interval, *p]


def run_table(study: Study) -> Table:
    """Every run with its numbers."""
    names = list(dict.fromkeys(name for setting in study.settings for name in groups_of(study, setting)))
    measures = {f"{name} %": accuracy(name) for name in names}
    measures |= {"NC1": collapse("nc1"), "NC2": collapse("nc2_etf"), "NC3": collapse("nc3"), "NC4": collapse("nc4")}
    measures |= {"residual": solver("mean_residual"), "evaluations": solver("mean_steps")}
    measures |= {"mean ‖z‖²": collapse("mean_square_norm"), "seconds": lambda run: number(run.results.get("seconds"))}
    rows = []
    for run in study.runs:
        values = [measure(run) for measure in measures.values()]
        cells = [Cell(short(value), value) if math.isfinite(value) else Cell("–") for value in values]
        rows.append(Row(head=run.name, cells=[Cell(str(run.seed), run.seed), *cells], runs=[run]))
    return Table(title="", note="", first="run", columns=["seed", *measures], rows=rows)
