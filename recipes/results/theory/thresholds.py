"""Closed forms of the layer-peeled program: the balanced loss, the imbalance at which minority rows merge or vanish.

Notation of `program.py`; e1 = e^-a, e2 = e^(-a(1-1/K_A)-p), Z = 1 + (K_A-1) e1 + K_B e2, psi = (K_A e1 + K_B e2) / Z,
r = d_A / d_B: 1 for the budget over classes, sqrt(R) for that over samples.

Sources: Fang, He, Long & Su, PNAS 118(43), 2021 (minority collapse); Hong & Ling, arXiv 2309.09725 (a sharp threshold).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import root_scalar

from recipes.results.theory.program import Program, corner

# log R up to here is looked at: e^690 is about the largest number of float64.
MOST = 690.0


def balanced_loss(program: Program) -> float:
    """Loss at R = 1, where the optimum is a simplex ETF: log(1 + (K-1) exp(-K sqrt(E_W E_H) / (K-1)))."""
    return math.log1p((program.classes - 1) * math.exp(-program.radius / (program.classes - 1)))


def merge_ratio(program: Program) -> float:
    """R*: minority rows are all the same, g = 0, iff R >= R* (the ratio of `program` is not read).

    At g = 0, a unit of the norm gains R psi / r from a and 1 from g (times n_B / (N d_B)), so R* is where R psi = r.
    That a unit gains 1 from q too fixes s = d_B sigma and, by the definition of s, p; then a by the budget. What is
    left is the gain from p, one equation for q. Its left side is below the right near q = 0, and above it at a = 0:

        sigma = q K_B (K_B e^q + K_A) / K,                  r p = q sqrt(K_B / K_A ((K_B e^q + K_A)^2 / (K K_A) - 1)),
        (K_A - 1) d_A a = B - d_B sigma,                    K_A r p (K_A e^(p - a/K_A) + K_B) = K sigma.

    Infinite above 1e299.
    """
    K_A, K_B, K = program.majority, program.minority, program.classes

    def log_excess(log_R: float) -> float:
        """log(R psi / r) where the four equations hold."""
        at = replace(program, ratio=math.exp(log_R))
        d_A, d_B = at.scales
        r, B = d_A / d_B, at.radius / d_B

        def point(q: float) -> tuple[float, float, float]:
            u = K_B * math.exp(q) + K_A
            sigma = q * K_B * u / K
            p = q * math.sqrt(K_B / K_A * (u * u / (K * K_A) - 1)) / r
            return sigma, p, (B - sigma) / ((K_A - 1) * r)

        def by_p(q: float) -> float:
            sigma, p, a = point(q)
            log_sum = np.logaddexp(math.log(K_A) + p - a / K_A, math.log(K_B))
            return math.log(K_A * r * p) + log_sum - math.log(K * sigma)

        most = _root(lambda q: point(q)[0] - B, 0, math.log1p(B) + math.log(K) + 1)
        _, p, a = point(_root(by_p, most * 1e-9, most))
        log_e1, log_e2 = math.log(K_A) - a, math.log(K_B) - a * (1 - 1 / K_A) - p
        log_Z = np.logaddexp.reduce([0, math.log1p(-1 / K_A) + log_e1, log_e2])
        return log_R - math.log(r) + float(np.logaddexp(log_e1, log_e2) - log_Z)

    return _root_over_ratios(log_excess)


def vanish_ratio(program: Program) -> float:
    """R**: minority rows are zero, and the loss of the minority is log K, iff R >= R** (the ratio is not read).

    The root of the optimality condition of that point (`corner`): with (K_A-1) d_A a = B and p = 0,

        R**^2 = r^2 (K_A / K) / (psi^2 - K K_B (e2 / Z)^2),  infinite where the bracket is not above 0.
    """

    return _root_over_ratios(lambda log_R: corner(replace(program, ratio=math.exp(log_R)))[0])


def merge_growth(program: Program) -> float:
    """Limit of d log R* / d sqrt(E_W E_H) as the budgets grow: K / (K_A - 1 + sqrt(K_B / K)), budget over classes."""
    return program.classes / (program.majority - 1 + math.sqrt(program.minority / program.classes))


def merge_decay(program: Program, minority_samples: float) -> float:
    """Weight decay l* = sqrt(l_W l_H) from which on minority rows are all the same: sqrt(n_B) / N.

    Of CE + (l_W/2) ||W||^2 + (l_H/2) sum_i ||h_i||^2 over N samples. At g = 0 a unit of the norm gains n_B / N from g
    and costs l sqrt(n_B), whatever a, p and q are: no root is to be found.
    """
    samples = minority_samples * (program.majority * program.ratio + program.minority)
    return math.sqrt(minority_samples) / samples


def _root_over_ratios(function: Callable[[float], float]) -> float:
    """The R at which a function of log R, below 0 at R = 1, becomes 0; infinite if it never does."""
    top = 1.0
    while function(top) < 0:
        if top == MOST:
            return math.inf
        top = min(2 * top, MOST)
    return math.exp(_root(function, 0, top))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(root_scalar(function, bracket=(low, high), method="brentq", xtol=1e-15).root)
