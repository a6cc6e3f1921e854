"""The theory in four panels."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.results.theory.equilibria import frobenius_etf_loss
from recipes.results.theory.geometry import factors, large_gain_limit, measures
from recipes.results.theory.program import Program, solve
from recipes.results.theory.tables import Settings, best_frobenius
from recipes.results.theory.thresholds import merge_ratio

# Okabe & Ito (2008): told apart by readers of any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_RATIOS = np.logspace(0, 4, 65)
_GAINS = np.logspace(0, 4, 33)


def theory_figure(settings: Settings) -> Figure:
    """What a DEQ changes and what it does not: the panels of `theory_panels` in one figure."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(panels_title(settings), fontsize=13)
    for axes, draw in zip(figure.subplots(2, 2).flat, theory_panels(settings), strict=True):
        draw(axes)
    return figure


def theory_panels(settings: Settings) -> list[Callable[[Axes], None]]:
    """Four panels for the middle K_A and E_H of a grid and its lowest R above 1, each drawn by a function of its axes.

    Minority cosine against R, at equal budgets of h0 and at equal norms of z; NC2 against the gain; singular values of
    the logits under `frobenius`.
    """
    program = _program(settings)
    return [
        partial(_cosine_panel, program=program, rhos=settings.rho, matched=False),
        partial(_cosine_panel, program=program, rhos=settings.rho, matched=True),
        partial(_gain_panel, program=program),
        partial(_singular_value_panel, program=program, settings=settings),
    ]


def panels_title(settings: Settings) -> str:
    """What the panels have in common."""
    at, E_W = _program(settings), settings.energy_w
    E_H = at.energy / E_W
    return f"Layer-peeled program: K = {at.classes}, K_A = {at.majority}, E_W = {E_W:g}, E_H = {E_H:g}"


def _program(settings: Settings) -> Program:
    K_A = settings.majority[len(settings.majority) // 2]
    E_H = sorted(settings.energy_h)[len(settings.energy_h) // 2]
    R = min((ratio for ratio in settings.ratio if ratio > 1), default=10.0)
    return Program(classes=settings.classes, majority=K_A, ratio=R, energy=settings.energy_w * E_H)


def _cosine_panel(axes: Axes, *, program: Program, rhos: Sequence[float], matched: bool) -> None:
    """Minority cosine of W against R; at equal budgets, with R* where it is on the axis, or at equal mean ||z||^2."""
    for i, (rho, color) in enumerate(zip(rhos, itertools.cycle(COLORS), strict=False)):
        budget_share = (1 - rho) ** 2 if matched else 1.0  # of h0, so that z has the same norm
        at = replace(program, energy=program.energy * budget_share / (1 - rho) ** 2)
        threshold = merge_ratio(at)
        ratios = np.unique([*_RATIOS, min(threshold, _RATIOS[-1])])  # the curve has a kink at R*
        cosines = [_measure(replace(at, ratio=float(R)))["minority_cosine_w"] for R in ratios]
        name = "explicit" if rho == 0 else f"DEQ, ρ = {rho:g}"
        if matched:
            width, dashes = 6 - 2 * min(i, 2), ("-", "-", "--")[min(i, 2)]
            axes.plot(ratios, cosines, dashes, color=color, linewidth=width, alpha=0.75, label=name)
        else:
            axes.plot(ratios, cosines, color=color, linewidth=2, label=f"{name}, R* = {_power(threshold)}")
            if threshold <= _RATIOS[-1]:
                axes.axvline(threshold, color=color, linestyle=":", linewidth=1.2)
    axes.axhline(-1 / (program.classes - 1), color="0.35", linestyle="--", linewidth=1, label="simplex ETF")
    axes.set_xscale("log")
    where = "mean ‖z‖²: one curve" if matched else "budget of h0, ‖V‖₂ ≤ ρ"
    place = (
        "best" if matched else (0.275, 0.62)
    )  # to the right of the first curve, which "best" does not see between points
    _finish(axes, f"Minority rows of W at equal {where}", "imbalance R", "cosine", place)


def _gain_panel(axes: Axes, *, program: Program) -> None:
    """NC2 against the gain of E_H, for both budgets, with the limits."""
    series = (("class", "nc2_w", "W, budget over classes"), ("sample", "nc2_w", "W, over samples"))
    series += (("sample", "nc2_h", "class means, over samples"),)
    for (budget, key, name), color in zip(series, COLORS, strict=False):
        at = replace(program, budget=budget)
        values = [_measure(replace(at, energy=at.energy * gain))[key] for gain in _GAINS]
        axes.plot(_GAINS, values, color=color, linewidth=2, label=name)
        if budget == "sample":
            limit = large_gain_limit(at.per_class(at.scales), at.majority)[key]
            axes.axhline(limit, color=color, linestyle="--", linewidth=1.2, label=f"its SELI limit {limit:.3f}")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.45 * axes.get_ylim()[1])  # room for the legend
    title = f"NC2, distance to a simplex ETF, at R = {program.ratio:g}"
    _finish(axes, title, "gain of the DEQ, 1 / (1 − ρ)²", "NC2", "upper right")


def _singular_value_panel(axes: Axes, *, program: Program, settings: Settings) -> None:
    """Singular values of the logits, the best under `frobenius` and the explicit optimum, balanced and not."""
    energy = settings.energy_w * min(settings.energy_h)
    for ratio, color in ((1.0, COLORS[0]), (program.ratio, COLORS[1])):
        at = replace(program, ratio=ratio, energy=energy)
        explicit, best = solve(at), best_frobenius(at, settings)
        series = [("-", f"‖V‖²$_F$ ≤ {settings.energy_v:g}: loss {best.loss:.4g}", best.logits)]
        series += [(":", f"explicit: loss {explicit.loss:.4g}", explicit.logits)]
        for dashes, name, logits in series:
            values = np.linalg.svd(logits, compute_uv=False)
            numbers, label = np.arange(1, len(values) + 1), f"R = {ratio:g}, {name}"
            axes.plot(numbers, values, dashes, color=color, marker="o", markersize=4, linewidth=1.6, label=label)
    etf = frobenius_etf_loss(program.classes, energy, settings.energy_v)
    axes.plot([], [], " ", label=f"(R = 1, simplex ETF with this V: loss {etf:.4g})")
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    _finish(
        axes,
        f"Singular values of the logits, E_H = {min(settings.energy_h):g}",
        "number",
        "singular value",
        "upper right",
    )


def _power(number: float) -> str:
    """A number to three digits, in powers of ten from 10,000 on."""
    if number < 1e4:
        return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
    if math.isinf(number):
        return "above $10^{299}$"
    digits, power = f"{number:.1e}".split("e")
    return rf"${digits} \cdot 10^{{{int(power)}}}$"


def _measure(program: Program) -> dict[str, float]:
    optimum = solve(program)
    return measures(*factors(optimum.logits, program.per_class(program.scales)), program.majority)


def _finish(axes: Axes, title: str, x: str, y: str, place: Any) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, handlelength=1.6, loc=place)
