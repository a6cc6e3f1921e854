"""The theory against programs that are solved without it: what `--verify` does."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from recipes.results.theory import equilibria
from recipes.results.theory.geometry import factors, large_gain_limit, measures
from recipes.results.theory.program import Program, cross_entropy, solve, solve_penalised
from recipes.results.theory.search import convex_loss, descend
from recipes.results.theory.tables import DECAY, Settings, best_frobenius, same_norms
from recipes.results.theory.thresholds import balanced_loss, merge_decay, merge_ratio, vanish_ratio


@dataclass(frozen=True)
class Check:
    """One comparison: it holds if least <= value <= most."""

    name: str
    where: str
    value: float
    least: float
    most: float

    @property
    def holds(self) -> bool:
        return bool(self.least <= self.value <= self.most)


def checks(settings: Settings) -> Iterator[Check]:
    """Compare the reduced programs of a grid, at its middle E_H, with others that owe nothing to the reduction."""
    E_H = sorted(settings.energy_h)[len(settings.energy_h) // 2]
    chosen = [program for program, energy in settings.programs() if energy == E_H]
    for program in chosen:
        where = f"{program.budget} budget, K_A = {program.majority}, R = {program.ratio:g}, E_H = {E_H:g}"
        yield from _explicit(program, where, settings)
        if "spectral" in settings.convention:
            yield from _spectral(program, where, settings)
        if "frobenius" in settings.convention:
            yield from _frobenius(program, where, settings)
    for program in dict.fromkeys(replace(program, ratio=10.0) for program in chosen):
        where = f"{program.budget} budget, K_A = {program.majority}, E_H = {E_H:g}"
        yield from _thresholds(program, where)
    if "penalty" in settings.convention:
        K = settings.classes
        for name, frame, limit in (
            ("polygon", equilibria.polygon(K), 1.0),
            ("simplex ETF", equilibria.simplex(K), (K - 1) / 2),
        ):
            value = equilibria.penalty_objective(frame, 1e-8, DECAY) / DECAY
            yield Check(f"penalty, {name}: objective over l minus its limit", "gap 1e-8", value - limit, -1e-6, 1e-3)


def _explicit(program: Program, where: str, settings: Settings) -> Iterator[Check]:
    """The reduced optimum against the convex form, all weights from random starts, and the balanced closed form."""
    optimum = solve(program)
    yield Check("convex solver minus reduced loss", where, convex_loss(program) - optimum.loss, -1e-6, 1e-6)
    losses = [descend(program, bounds="explicit", seed=seed).loss for seed in range(settings.seeds)]
    yield Check("explicit network, random starts minus reduced loss", where, min(losses) - optimum.loss, -1e-9, 1e-6)
    if program.ratio == 1:
        yield Check("closed form minus reduced loss", where, balanced_loss(program) - optimum.loss, -1e-9, 1e-9)


def _spectral(program: Program, where: str, settings: Settings) -> Iterator[Check]:
    """A DEQ with ||V||_2 <= rho: at V = rho I it is the explicit program of the larger budget, and never below."""
    for rho in filter(None, settings.rho):
        optimum = solve(replace(program, energy=program.energy / (1 - rho) ** 2))
        scales = program.per_class(program.scales)
        W, z = factors(optimum.logits, scales)
        h0 = (1 - rho) * z.T
        attained, _ = cross_entropy(program, W @ np.linalg.solve(np.eye(program.classes) * (1 - rho), h0))
        budgets = np.sum(W**2) * np.sum(np.square(h0 * scales)) / program.classes**2
        at = f"{where}, rho = {rho:g}"
        yield Check("DEQ at V = rho I minus reduced loss", at, math.exp(attained) - optimum.loss, -1e-12, 1e-12)
        yield Check("its budgets over those allowed", at, budgets / program.energy, 0, 1 + 1e-9)
    for rho in sorted(filter(None, settings.rho))[:1]:  # larger ones end far above their optimum
        gain = solve(replace(program, energy=program.energy / (1 - rho) ** 2)).loss
        losses = [descend(program, bounds="spectral", size=rho, seed=seed).loss for seed in range(settings.seeds)]
        at = f"{where}, rho = {rho:g}"
        yield Check("DEQ, random starts minus reduced loss", at, min(losses) - gain, -1e-9, math.inf)


def _frobenius(program: Program, where: str, settings: Settings) -> Iterator[Check]:
    """A DEQ with ||V||_F^2 <= E_V spends the budget of the formula, and is never below explicit at its norms."""
    best = best_frobenius(program, settings)
    spent = equilibria.frobenius_radius(best.logits, program.per_class(program.scales), settings.energy_v)
    yield Check("frobenius, random starts: formula over budget", where, spent / program.radius, 1 - 1e-6, 1 + 1e-9)
    matched = same_norms(program, best).loss
    yield Check("frobenius minus explicit loss at equal norms", where, best.loss - matched, -1e-9, math.inf)


def _thresholds(program: Program, where: str) -> Iterator[Check]:
    """The signs of g, p and q around R*, R** and the threshold of weight decay, and the limit of large gain."""
    for name, R, unknowns in (("R*", merge_ratio(program), ("g",)), ("R**", vanish_ratio(program), ("p", "q"))):
        if 1.05 < R < 1e8:
            below, above = (solve(replace(program, ratio=R**power)) for power in (0.99, 1.01))
            for side, optimum, least, most in (("below", below, 1e-6, math.inf), ("above", above, 0, 0)):
                value = sum(getattr(optimum, unknown) for unknown in unknowns)
                yield Check(f"{' + '.join(unknowns)} just {side} {name}", where, value, least, most)
    if program.budget == "sample":
        n_B = 10.0
        N = n_B * (program.majority * program.ratio + program.minority)
        weight = merge_decay(program, n_B) * math.sqrt(N / program.classes)
        yield Check("weight decay 0.98 l*: g", where, solve_penalised(program, 0.98 * weight).g, 1e-3, math.inf)
        yield Check("weight decay 1.02 l*: g", where, solve_penalised(program, 1.02 * weight).g, 0, 0)
    scales = program.per_class(program.scales)
    limit = large_gain_limit(scales, program.majority)["nc2_w"]
    far = solve(replace(program, energy=1e6))
    value = measures(*factors(far.logits, scales), program.majority)["nc2_w"]
    yield Check("NC2 of W at a gain of 1e6 minus its limit", where, value - limit, -0.02, 0.02)
