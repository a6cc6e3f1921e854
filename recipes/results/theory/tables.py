"""The tables of the layer-peeled theory: settings, rows, and their page in Markdown."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import numpy as np

from recipes.errors import check
from recipes.results.theory import equilibria
from recipes.results.theory.equilibria import Convention
from recipes.results.theory.geometry import factors, large_gain_limit, measures
from recipes.results.theory.program import Budget, Optimum, Program, solve
from recipes.results.theory.search import Found, descend
from recipes.results.theory.thresholds import merge_growth, merge_ratio, vanish_ratio

Row = dict[str, Any]

# Weight decay in the table of convention `penalty`, whose limit is a multiple of it.
DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the theory is asked about.

    Attributes:
        classes: K.
        majority: numbers K_A of majority classes.
        ratio: imbalances R.
        energy_w: E_W.
        energy_h: budgets E_H.
        rho: bounds of ||V||_2; 0 is the explicit network.
        steps: numbers of Picard steps.
        budget: what the mean of ||h||^2 is taken over.
        convention: what a linear DEQ has its budget on.
        energy_v: E_V, bound of ||V||_F^2.
        seeds: random starts of each program that is not convex.

    Raises:
        UserError: a setting outside what is allowed.
    """

    classes: int = 10
    majority: Sequence[int] = (3, 5, 7)
    ratio: Sequence[float] = (1, 10, 50, 100)
    energy_w: float = 1
    energy_h: Sequence[float] = (1, 5, 20)
    rho: Sequence[float] = (0, 0.5, 0.9)
    steps: Sequence[int] = (3,)
    budget: Sequence[Budget] = get_args(Budget)
    convention: Sequence[Convention] = get_args(Convention)
    energy_v: float = 0.25
    seeds: int = 8

    def __post_init__(self):
        K = self.classes
        check(4 <= K <= 200, "classes", K, "4 to 200")
        for value in self.majority:
            check(2 <= value <= K - 2, "majority", value, f"2 to {K - 2}, two classes fewer than classes")
        for name, least, most in (("ratio", 1, 1e8), ("energy_h", 1e-4, 1e4), ("rho", 0, 0.99), ("steps", 1, 10000)):
            values = getattr(self, name)
            for value in values:
                check(least <= value <= most, name, value, f"{least:g} to {most:g}")
        for name, allowed in (("budget", get_args(Budget)), ("convention", get_args(Convention))):
            for value in getattr(self, name):
                check(value in allowed, name, value, ", ".join(allowed))
        check(1e-4 <= self.energy_w <= 1e4, "energy_w", self.energy_w, "0.0001 to 10000")
        most = self.energy_w * max(self.energy_h) / (1 - max(self.rho)) ** 2
        allowed = "at most 1e6 for E_W E_H / (1 - rho)^2 at the largest of each"
        check(most <= 1e6, "energy_h", list(self.energy_h), allowed)
        check(0 <= self.energy_v <= 0.98, "energy_v", self.energy_v, "0 to 0.98")
        check(1 <= self.seeds <= 1000, "seeds", self.seeds, "1 to 1000")
        for name in ("majority", "ratio", "energy_h", "rho", "steps", "budget", "convention"):
            values = getattr(self, name)
            check(len(set(values)) == len(values), name, list(values), "each value once")

    def programs(self) -> list[tuple[Program, float]]:
        """Every explicit program of the grid, with its E_H."""
        return [
            (Program(classes=self.classes, majority=K_A, ratio=R, energy=self.energy_w * E_H, budget=budget), E_H)
            for budget, K_A, R, E_H in product(self.budget, self.majority, self.ratio, self.energy_h)
        ]


def optimum_rows(settings: Settings) -> Iterator[Row]:
    """The optimum of every program: explicit (also every DEQ of convention `z`), and each map of `spectral`."""
    for program, E_H in settings.programs():
        yield _optimum_row(program, E_H, 1.0, convention="z", map="explicit", rho=0.0)
        for rho in settings.rho if "spectral" in settings.convention else ():
            for name, gain in equilibria.gains(rho, settings.steps).items():
                if rho and gain:
                    yield _optimum_row(program, E_H, gain, convention="spectral", map=name, rho=rho)


def _optimum_row(program: Program, E_H: float, gain: float, **labels: Any) -> Row:
    optimum = solve(replace(program, energy=program.energy * gain))
    scales = program.per_class(program.scales)
    numbers = {name: getattr(optimum, name) for name in ("loss", "log_loss", "phase", "a", "g", "p", "q")}
    by_group = dict(zip(("majority_loss", "minority_loss"), optimum.losses, strict=True))
    return {
        **_labels(program, E_H),
        **labels,
        "mean_z2": E_H * gain,
        **numbers,
        **by_group,
        **measures(*factors(optimum.logits, scales), program.majority),
        "relative_gap": optimum.relative_gap,
    }


def _labels(program: Program, E_H: float) -> Row:
    return {"budget": program.budget, "majority": program.majority, "ratio": program.ratio, "energy_h": E_H}


def threshold_rows(settings: Settings) -> Iterator[Row]:
    """R* and R** of every budget, K_A and E_H, at each rho."""
    rhos = settings.rho if "spectral" in settings.convention else (0.0,)
    for budget, K_A, E_H, rho in product(settings.budget, settings.majority, settings.energy_h, rhos):
        energy = settings.energy_w * E_H / (1 - rho) ** 2
        program = Program(classes=settings.classes, majority=K_A, energy=energy, budget=budget)
        yield {
            **{key: value for key, value in _labels(program, E_H).items() if key != "ratio"},
            "rho": rho,
            "merge_ratio": merge_ratio(program),
            "vanish_ratio": vanish_ratio(program),
            "merge_growth": merge_growth(program) if budget == "class" else math.nan,
        }


def frobenius_rows(settings: Settings) -> Iterator[Row]:
    """The best of some random starts under `frobenius`, beside explicit programs of the same budgets and norms."""
    for program, E_H in settings.programs() if "frobenius" in settings.convention else ():
        best = best_frobenius(program, settings)
        explicit, etf = solve(program), math.nan
        if program.ratio == 1:
            etf = equilibria.frobenius_etf_loss(program.classes, program.energy, settings.energy_v)
        yield {
            **_labels(program, E_H),
            "loss": best.loss,
            "rank": best.rank,
            "singular_values": np.linalg.svd(best.logits, compute_uv=False).tolist(),
            "explicit_loss": explicit.loss,
            "explicit_singular_values": np.linalg.svd(explicit.logits, compute_uv=False).tolist(),
            "etf_loss": etf,
            "mean_z2": best.mean_square(program) * E_H / program.energy,
            "explicit_loss_at_same_norms": same_norms(program, best).loss,
            **measures(best.rows, best.features.T, program.majority),
        }


def best_frobenius(program: Program, settings: Settings) -> Found:
    """The lowest loss of all starts."""
    starts = range(settings.seeds)
    found = [descend(program, bounds="frobenius", size=settings.energy_v, seed=seed) for seed in starts]
    return min(found, key=lambda each: each.loss)


def same_norms(program: Program, found: Found) -> Optimum:
    """The explicit optimum whose budgets are the norms of W and z that a DEQ has come to."""
    return solve(replace(program, energy=found.mean_square(program)))


def penalty_rows(settings: Settings) -> Iterator[Row]:
    """The objective of convention `penalty` over its weight, along V -> I on a polygon and on a simplex ETF."""
    if "penalty" in settings.convention:
        frames = {"polygon": equilibria.polygon(settings.classes), "simplex ETF": equilibria.simplex(settings.classes)}
        for (name, frame), gap in product(frames.items(), (1e-2, 1e-4, 1e-6)):
            objective = equilibria.penalty_objective(frame, gap, DECAY)
            yield {"frame": name, "rank": frame.shape[1], "gap": gap, "objective": objective / DECAY}


def limit_rows(settings: Settings) -> Iterator[Row]:
    """What NC2 and the cosines tend to as the gain grows, for every budget, K_A and R."""
    seen = dict.fromkeys(replace(program, energy=1.0) for program, _ in settings.programs())
    for program in seen:
        limit = large_gain_limit(program.per_class(program.scales), program.majority)
        yield {key: value for key, value in _labels(program, 0).items() if key != "energy_h"} | limit
