"""The question and the answer of a study, in sentences made of its numbers.

An advantage of the tested arm is reported only where the 95 % interval of its paired difference to the reference lies
above 0 and its solver has converged. One over other arms alone is said to be what the reference has and they have not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recipes.results.page.study import UNSOLVED, Study, accuracy, compare, mean_residual, pooled, unsolved
from recipes.results.statistics import PairedDifference

# Up to this many settings the answer has a clause for each.
MOST_CLAUSES = 3


@dataclass(frozen=True)
class Finding:
    """What was found at a setting.

    Attributes:
        setting: its name.
        verdict: "higher", "lower", "open" (the interval includes 0), "unsolved" (it does not, but the solver has not
            converged), "few" (too few seeds for an interval) or "absent" (no seed that both arms have).
        difference: tested minus reference, in points of accuracy.
        over: the other arms over which the tested one has an advantage, with the difference.
        residual: of the tested arm.
    """

    setting: str
    verdict: str
    difference: PairedDifference
    over: tuple[tuple[str, PairedDifference], ...] = ()
    residual: float = math.nan


def find(study: Study, setting: str) -> Finding:
    """Compare the tested arm with the others at a setting."""
    groups, measure = study.at(setting), accuracy(study.endpoint(setting))
    nothing = PairedDifference(0, *[math.nan] * 5)
    if study.tested not in groups:
        return Finding(setting, "absent", nothing)
    tested = groups[study.tested]
    found = {arm: compare(tested, groups[arm], measure) for arm in study.others if arm in groups}
    difference = found.pop(study.reference, nothing)
    over = tuple((arm, each) for arm, each in found.items() if each.low > 0) if not unsolved(tested) else ()
    verdict = _verdict(difference)
    if verdict == "higher" and unsolved(tested):
        verdict = "unsolved"
    return Finding(setting, verdict, difference, over, mean_residual(tested))


def _verdict(difference: PairedDifference) -> str:
    if difference.n == 0:
        return "absent"
    if difference.n == 1:
        return "few"
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "open"  # differences that are all equal have no interval


def question(study: Study) -> str:
    """The question in one sentence."""
    endpoints = list(dict.fromkeys(study.endpoint(setting) for setting in study.settings)) or ["overall"]
    which = " and ".join("all classes" if name == "overall" else f"{name} classes" for name in endpoints)
    if not study.others:
        return f"How accurate is {study.tested} on {which}?"
    return f"Is {study.tested} more accurate on {which} than {study.reference}, seed by seed?"


def answer(study: Study) -> str:
    """The answer in one sentence: a clause for each setting, or, of more than MOST_CLAUSES, for each verdict."""
    if not study.others:
        return "There is one arm alone, so nothing to compare it with."
    found = [find(study, setting) for setting in study.settings]
    if len(found) > MOST_CLAUSES:
        clauses = _counted(study, found)
    else:
        clauses = [_clause(study, each) for each in found]
    text = "; ".join(clauses) or "nothing has finished yet"
    return text[:1].upper() + text[1:] + "."


_SAID = {
    "higher": "yes",
    "lower": "no, it is less accurate",
    "open": "no difference is shown",
    "unsolved": "it cannot be said, as its solver has not converged",
    "few": "it cannot be said",
    "absent": "it cannot be said",
}


def _clause(study: Study, found: Finding) -> str:
    where = f"at {found.setting}, " if found.setting else ""
    said = f"{where}{_SAID[found.verdict]}: {in_points(found.difference)}"
    if found.verdict == "unsolved":
        said += f", mean residual {found.residual:.1e}, not below {UNSOLVED:g}"
    if found.over and found.verdict != "higher":
        said += "".join(f", and {_apart(study, arm, each)}" for arm, each in found.over)
    return said


def _counted(study: Study, found: Sequence[Finding]) -> list[str]:
    """Clauses for each verdict, and for all settings together."""
    clauses = []
    for verdict, said in _SAID.items():
        if here := [each for each in found if each.verdict == verdict]:
            clause = f"{said} at {len(here)} of {len(found)} settings"
            if verdict in ("higher", "lower"):
                clause += f" ({', '.join(f'{each.setting}: {each.difference.mean:+.2f} points' for each in here)})"
            clauses.append(clause)
    for arm in study.others:
        alone = [each for each in found if each.verdict != "higher" and arm in dict(each.over)]
        if alone:
            settings = ", ".join(each.setting for each in alone)
            clauses.append(f"an advantage over {arm} at {settings} is none over {study.reference}")
    overall = pooled(study, study.reference)
    return [*clauses, f"the mean over all settings is {in_points(overall)}"] if overall.n else clauses


def _apart(study: Study, arm: str, difference: PairedDifference) -> str:
    """Say that an advantage over an arm is none over the reference, and what sets these two apart."""
    mine, its = study.arms[study.reference], study.arms[arm]
    keys = [key for key in dict.fromkeys([*mine, *its]) if mine.get(key) != its.get(key)]
    apart = ", ".join(f"{key} {mine[key]}" if key in mine else f"no {key}" for key in keys)
    note = f", which differs from {arm} in {apart}" if apart else ""
    return f"its advantage over {arm}, {in_points(difference)}, is none over {study.reference}{note}"


def in_points(difference: PairedDifference) -> str:
    """A difference of accuracies with its interval, or why it has none."""
    n = f"{difference.n} seed{'s' if difference.n > 1 else ''}"
    if difference.n == 0:
        return "no seed in common"
    if difference.n == 1:
        return f"{difference.mean:+.2f} points, of {n}, too few for an interval"
    if math.isnan(difference.low):
        return f"{difference.mean:+.2f} points with each of {n}"
    return f"{difference.mean:+.2f} points (95 % interval {difference.low:+.2f} to {difference.high:+.2f}, {n})"


def over_all_settings(study: Study) -> dict[str, PairedDifference]:
    """Tested minus each other arm, the mean over settings, where there are several."""
    return {arm: pooled(study, arm) for arm in study.others} if len(study.settings) > 1 else {}
