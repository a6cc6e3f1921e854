"""A study: finished runs by arm and setting, and what was measured of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.results.runs import FinishedRun
from recipes.results.statistics import PairedDifference, paired_difference

# Mean residual above which an arm's solver counts as not converged.
UNSOLVED = 1e-2


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the model of a run shows when it is looked at again.

    Attributes:
        one_update: accuracy by group when the solver is cut to one update; none of a model that does not solve.
        iterates: measurements of collapse by iterate of the solver, from its input on; none of most runs.
        points: features in the plane by t-SNE, (n, 2); none of most runs.
        labels: classes of the points, (n,).
        class_names: K names.
    """

    one_update: Mapping[str, float | None] = field(default_factory=dict)
    iterates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    points: Sequence[Sequence[float]] = ()
    labels: Sequence[int] = ()
    class_names: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one arm at one setting, by seed."""

    arm: str
    setting: str
    runs: Mapping[int, FinishedRun]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a page is about.

    Attributes:
        title: of the page.
        command: that makes it again.
        arms: the settings of each arm by its name, those in mappings by dotted names.
        reference: the arm that the tested one has to beat.
        tested: an arm, the same as `reference` if there is but one.
        groups: in the order of settings and, within a setting, of arms.
        missing: why a run is not there, by its name.
        looks: by the folder of the run.
        notes: what could not be measured, a sentence each.
        tuning: lines of a table of the values that arms were tuned over: arm, values, validation accuracy, chosen.
    """

    title: str
    command: str
    arms: Mapping[str, Mapping[str, Any]]
    reference: str
    tested: str
    groups: Sequence[Group]
    missing: Mapping[str, str] = field(default_factory=dict)
    looks: Mapping[str, Look] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tuning: Sequence[tuple[str, str, Sequence[float], bool]] = ()

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(group.setting for group in self.groups))

    @property
    def others(self) -> list[str]:
        """The arms that the tested one is compared with, the reference first."""
        names = dict.fromkeys([self.reference, *self.arms])
        return [name for name in names if name != self.tested]

    @property
    def runs(self) -> list[FinishedRun]:
        return [run for group in self.groups for run in group.runs.values()]

    def at(self, setting: str) -> dict[str, Group]:
        """The groups of a setting by arm."""
        return {group.arm: group for group in self.groups if group.setting == setting and group.runs}

    def endpoint(self, setting: str) -> str:
        """The group of classes whose accuracy decides: the rarest, which is named last; all where there are none."""
        groups = [[*run.results["test"]] for group in self.at(setting).values() for run in group.runs.values()]
        return groups[0][-1] if groups else "overall"


Measure = Callable[[FinishedRun], float]


def number(value: Any) -> float:
    """A number of a file of JSON, which has null for what is absent or not finite."""
    return math.nan if value is None else float(value)


def accuracy(group: str) -> Measure:
    """Accuracy in % on the test split, or on validation images where the results are those of an epoch."""

    def measure(run: FinishedRun) -> float:
        split = run.results.get("test") or run.results.get("val") or {}
        return 100 * number(split.get(group))

    return measure


def collapse(key: str) -> Measure:
    """A measure of neural collapse, of all classes."""
    return lambda run: number((run.results.get("collapse") or {}).get(key))


def solver(key: str, factor: float = 1) -> Measure:
    """A mean over solves; NaN of a model that does not solve."""
    return lambda run: factor * number((run.results.get("solver") or {}).get(key))


def compared_measures(endpoint: str, groups: Sequence[str]) -> dict[str, Measure]:
    """What arms are compared by, the endpoint first."""
    found = {f"{name} %": accuracy(name) for name in dict.fromkeys([endpoint, *groups])}
    found |= {"NC1": collapse("nc1"), "NC2": collapse("nc2_etf"), "NC2 of W": collapse("nc2_etf_weight")}
    return found | {"NC3": collapse("nc3"), "NC4": collapse("nc4"), "mean ‖z‖²": collapse("mean_square_norm")}


def compare(first: Group, second: Group, measure: Measure, *, loss: float | None = None) -> PairedDifference:
    """First minus second, seed by seed; at equal training loss, if one is given."""
    values = [
        {seed: measure(run if loss is None else run.at_loss(loss)) for seed, run in group.runs.items()}
        for group in (first, second)
    ]
    return paired_difference(*values)


def common_loss(groups: Sequence[Group]) -> float:
    """The lowest training loss that every run reaches at one of its probes; NaN if a run has none."""
    lowest = []
    for group in groups:
        for run in group.runs.values():
            probed = [record for record in run.records if record.get("collapse")]
            losses = [record["train_loss"] for record in probed if record.get("train_loss") is not None]
            lowest.append(min(losses, default=math.nan))
    return math.nan if any(map(math.isnan, lowest)) else max(lowest, default=math.nan)


def pooled(study: Study, other: str) -> PairedDifference:
    """Tested minus another arm at the endpoint: the mean over settings for each seed that has all of them.

    Settings of a seed share images and initial weights, so a seed counts once however many settings there are.
    """
    sides: list[dict[int, float]] = []
    for arm in (study.tested, other):
        values = []
        for setting in study.settings:
            measure, group = accuracy(study.endpoint(setting)), study.at(setting).get(arm)
            values.append({seed: measure(run) for seed, run in group.runs.items()} if group else {})
        seeds = set.intersection(*map(set, values)) if values else set()
        sides.append({seed: sum(each[seed] for each in values) / len(values) for seed in seeds})
    return paired_difference(*sides)


def mean_residual(group: Group) -> float:
    """Mean residual of the solves of test images over runs; NaN of a model that does not solve."""
    values = [solver("mean_residual")(run) for run in group.runs.values()]
    return sum(values) / len(values) if values else math.nan


def unsolved(group: Group) -> bool:
    """Whether the arm's solver counts as not converged, as one with residuals that are not finite does."""
    solves = any(run.results["solver"] for run in group.runs.values())
    return solves and not mean_residual(group) <= UNSOLVED
