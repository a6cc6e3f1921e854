"""The layer-peeled program of an explicit network, reduced to four numbers.

K = K_A + K_B classes: K_A majority classes of n_A samples and K_B minority classes of n_B, R = n_A / n_B. Classifier
rows W (K, d), one feature h_k for each class (one is optimal, by Jensen's inequality), d >= K, logits M = W H (K, K):

    minimise CE(M) = sum_k (n_k / N) CE_k(M[:, k])
    subject to (1/K) sum_k ||w_k||^2 <= E_W  and  (1/K) sum_k d_k^2 ||h_k||^2 <= E_H,

with d_k = 1 where every class counts once in the mean of ||h||^2 (budget `class`), and d_k = sqrt(K n_k / N) where
every sample does (budget `sample`, what weight decay does). Factoring M diag(d) optimally makes it the convex program

    minimise CE(M)  subject to  ||M diag(d)||_* <= B = K sqrt(E_W E_H)                              (nuclear norm).

By symmetry four numbers remain: within a majority class the logit of the class exceeds those of the other majority
classes by a >= 0 and, on average over the majority, that of the minority classes by p; g >= 0 and q are the same for
the minority. With L_A = log(1 + (K_A-1) e^-a + K_B e^(-a(1-1/K_A)-p)) and L_B likewise from (g, q) with A and B
exchanged,

    CE = (K_A R L_A + K_B L_B) / (K_A R + K_B),
    ||M diag(d)||_* = (K_A-1) d_A a + (K_B-1) d_B g + s,    s^2 = kappa (K_A d_A^2 p^2 + K_B d_B^2 q^2),

kappa = K_A K_B / K. The norm is not smooth at s = 0, so the unknowns are (a, g, s, t) with p and q proportional to s
cos t and s sin t, and its logarithm is minimised, because losses of 1e-11 matter. Every answer carries a bound on its
distance to the optimum of the convex program over all M, which owes nothing to the symmetry (`Optimum.relative_gap`).

Sources: Fang, He, Long & Su, "Exploring deep neural networks via layer-peeled model: minority collapse in imbalanced
training", PNAS 118(43), 2021; Hong & Ling, "Neural collapse for unconstrained feature model under cross-entropy loss
with imbalanced data", arXiv 2309.09725; Jaggi, "Revisiting Frank-Wolfe", ICML 2013 (the bound).
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.optimize import fminbound, minimize

Budget = Literal["class", "sample"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A layer-peeled program.

    Attributes:
        energy: E_W E_H; of a DEQ, times the gain of its map.
        majority: K_A, 2 to K - 2, so that both groups have an angle between their classes.
        ratio: R >= 1.
        classes: K.
        budget: what the mean of ||h||^2 is taken over, 'class' or 'sample'.
    """

    energy: float
    majority: int = 3
    ratio: float = 10.0
    classes: int = 10
    budget: Budget = "class"

    @property
    def minority(self) -> int:
        """K_B."""
        return self.classes - self.majority

    @property
    def radius(self) -> float:
        """B."""
        return self.classes * math.sqrt(self.energy)

    @property
    def scales(self) -> tuple[float, float]:
        """(d_A, d_B)."""
        if self.budget == "class":
            return 1.0, 1.0
        samples = self.majority * self.ratio + self.minority
        return math.sqrt(self.ratio * self.classes / samples), math.sqrt(self.classes / samples)

    @property
    def weights(self) -> tuple[float, float]:
        """Share of the samples in the majority, and in the minority."""
        samples = self.majority * self.ratio + self.minority
        return self.majority * self.ratio / samples, self.minority / samples

    @property
    def kappa(self) -> float:
        """K_A K_B / K."""
        return self.majority * self.minority / self.classes

    def per_class(self, pair: tuple[float, float]) -> np.ndarray:
        """A number of the majority and one of the minority as a number of each class, (K,)."""
        return np.repeat(pair, (self.majority, self.minority))

    def offsets(self, s: float, t: float) -> tuple[float, float]:
        """(p, q) of the polar coordinates s and t."""
        d_A, d_B = self.scales
        p = s * math.cos(t) / (d_A * math.sqrt(self.kappa * self.majority))
        q = s * math.sin(t) / (d_B * math.sqrt(self.kappa * self.minority))
        return p, q


@dataclass(frozen=True)
class Optimum:
    """The minimiser of a program: the four numbers, and the logarithm of the loss."""

    program: Program
    a: float
    g: float
    p: float
    q: float
    log_loss: float

    @property
    def loss(self) -> float:
        """Cross-entropy, the mean over samples; 0 below 1e-308, where `log_loss` still tells."""
        return math.exp(self.log_loss)

    @property
    def losses(self) -> tuple[float, float]:
        """L_A and L_B."""
        K_A, K_B = self.program.majority, self.program.minority
        return math.exp(_group(self.a, self.p, K_A, K_B)[0]), math.exp(_group(self.g, self.q, K_B, K_A)[0])

    @property
    def phase(self) -> Literal["distinct", "merged", "vanished"]:
        """Minority rows of W: distinct; all the same (g = 0); or all zero (g = p = q = 0)."""
        if self.g > 0:
            return "distinct"
        return "merged" if self.p or self.q else "vanished"

    @cached_property
    def logits(self) -> np.ndarray:
        """M (K, K), the logits of class k in column k, which sum to zero."""
        K_A, K_B, K = self.program.majority, self.program.minority, self.program.classes
        M = np.zeros((K, K))
        M[:K_A, :K_A] = self.a * (np.eye(K_A) - 1 / K_A) + self.p * K_B / K
        M[K_A:, :K_A] = -self.p * K_A / K
        M[K_A:, K_A:] = self.g * (np.eye(K_B) - 1 / K_B) + self.q * K_A / K
        M[:K_A, K_A:] = -self.q * K_B / K
        return M

    @cached_property
    def relative_gap(self) -> float:
        """An upper bound of (CE(M) - CE*) / CE(M), CE* the optimum of the convex program over all M.

        CE is convex, so CE* >= CE(M) + min <G, X - M> over the ball ||X D||_* <= B, G the gradient at M and D =
        diag(d), and the minimum is -B ||G D^-1||_2 - <G, M>. Taken of G / CE(M), entry by entry from logarithms, it
        holds for losses that are not representable.
        """
        program, M = self.program, self.logits
        _, gradient = cross_entropy(program, M)
        steepest = np.linalg.norm(gradient / program.per_class(program.scales), 2)
        return float(program.radius * steepest + (gradient * M).sum())


def cross_entropy(program: Program, logits: np.ndarray) -> tuple[float, np.ndarray]:
    """log CE and its gradient (K, K), that of CE over CE, for any logits (K, K), those of class k in column k.

    From logarithms throughout, so that it holds for losses that are not representable.
    """
    K = len(logits)
    excess = np.where(np.eye(K, dtype=bool), -np.inf, logits - np.diag(logits))
    log_shares = np.log(program.per_class(program.weights) / program.per_class((program.majority, program.minority)))
    log_sums = np.logaddexp.reduce(excess, axis=0)  # CE_k = log(1 + e^z)
    log_loss = float(np.logaddexp.reduce(log_shares + _log_softplus(log_sums)))
    gradient = np.exp(excess - np.logaddexp(0, log_sums) + log_shares - log_loss)
    np.fill_diagonal(gradient, -gradient.sum(0))
    return log_loss, gradient


def solve(program: Program) -> Optimum:
    """Find the optimum of a program."""
    K_A, K_B, (d_A, d_B), B = program.majority, program.minority, program.scales, program.radius
    excess, t = corner(program)
    if excess >= 0:
        return _optimum(program, np.array([B / ((K_A - 1) * d_A), 0, 0, t]))
    cost = np.array([(K_A - 1) * d_A, (K_B - 1) * d_B, 1, 0])
    budget = {"type": "eq", "fun": lambda x: cost @ x - B, "jac": lambda x: cost}
    found = []
    # From an even split of the budget, from one on the majority, and from the corner in its steepest direction.
    for shares, angle in (((1, 1, 1), 0.7), ((6, 1, 3), 0.3), ((98, 0, 2), t)):
        start = np.array([*(np.array(shares) / sum(shares) * B / cost[:3]), angle])
        result = minimize(
            lambda x: _log_loss(program, x),
            start,
            jac=True,
            method="SLSQP",
            bounds=[(0, None)] * 3 + [(0, math.pi / 2)],
            constraints=budget,
            options={"ftol": 1e-16, "maxiter": 500},
        )
        found.append(_optimum(program, np.where(result.x < 1e-9, 0, result.x)))
    return min(found, key=lambda optimum: optimum.log_loss)


def corner(program: Program) -> tuple[float, float]:
    """Whether all of the budget should go into a: the optimality condition of g = p = q = 0.

    With e1 = e^-a, e2 = e^(-a(1-1/K_A)), Z = 1 + (K_A-1) e1 + K_B e2, psi = (K_A e1 + K_B e2) / Z and r = d_A / d_B, a
    unit of the norm gains R psi / r from a, and sqrt((R/r)^2 K K_B (e2/Z)^2 + K_A / K) from p and q in their best ratio
    (both times n_B / (N d_B)). From g it gains less still, as e2 > e1.

    Returns:
        log of the first over the second, and the angle t of that ratio: the minority rows vanish iff the log is >= 0.
    """
    K_A, K_B, K = program.majority, program.minority, program.classes
    d_A, d_B = program.scales
    a = program.radius / ((K_A - 1) * d_A)
    log_e1, log_e2 = math.log(K_A) - a, math.log(K_B) - a * (1 - 1 / K_A)
    scale = math.log(program.ratio * d_B / d_A) - np.logaddexp.reduce([0, math.log1p(-1 / K_A) + log_e1, log_e2])
    by_a, by_p, by_q = (
        scale + np.logaddexp(log_e1, log_e2),
        scale + log_e2 + math.log(K / K_B) / 2,
        math.log(K_A / K) / 2,
    )
    return float(by_a - np.logaddexp(2 * by_p, 2 * by_q) / 2), math.atan(math.exp(min(by_q - by_p, 700)))


def solve_penalised(program: Program, weight: float) -> Optimum:
    """Minimise CE(M) + weight ||M diag(d)||_*, where `program` gives all but the energy, which comes out.

    Weight decay is this with the budget over samples: the minimum over features and rows of (l_W/2) ||W||^2 + (l_H/2)
    sum_i ||h_i||^2 is l ||M diag(sqrt n)||_* = l sqrt(N/K) ||M diag(d)||_*, l = sqrt(l_W l_H), N samples. The optimal
    loss is convex in B, so one search over B is enough.
    """

    def objective(log_B: float) -> float:
        B = math.exp(log_B)
        return solve(replace(program, energy=(math.exp(log_B) / program.classes) ** 2)).loss + weight * B

    # The optimal loss is at most log K, which bounds B.
    top = math.log(math.log(program.classes) / weight)
    log_B, *_ = fminbound(objective, top - 30, top, xtol=1e-10, full_output=True)
    return solve(replace(program, energy=(math.exp(log_B) / program.classes) ** 2))


def _optimum(program: Program, x: np.ndarray) -> Optimum:
    a, g, s, t = map(float, x)
    return Optimum(program, a, g, *program.offsets(s, t), log_loss=_log_loss(program, x)[0])


def _log_loss(program: Program, x: np.ndarray) -> tuple[float, np.ndarray]:
    """log CE and its gradient, at x = (a, g, s, t)."""
    K_A, K_B = program.majority, program.minority
    a, g, s, t = map(float, x)
    (p, q), (p_unit, q_unit) = program.offsets(s, t), program.offsets(1, t)
    log_A, by_a, by_p = _group(a, p, K_A, K_B)
    log_B, by_g, by_q = _group(g, q, K_B, K_A)
    parts = np.log(program.weights) + (log_A, log_B)
    log_loss = float(np.logaddexp(*parts))
    A, B = np.exp(parts - log_loss)
    turn_p, turn_q = program.offsets(s, t + math.pi / 2)[0], program.offsets(s, t - math.pi / 2)[1]
    by_s, by_t = A * by_p * p_unit + B * by_q * q_unit, A * by_p * turn_p - B * by_q * turn_q
    return log_loss, np.array([A * by_a, B * by_g, by_s, by_t])


def _group(inside: float, offset: float, own: int, others: int) -> tuple[float, float, float]:
    """log L_A and its derivatives by a and p, for K_A = own and K_B = others; L_B from (g, q) with these exchanged."""
    to_own, to_others = math.log(own - 1) - inside, math.log(others) - inside * (1 - 1 / own) - offset
    z = float(np.logaddexp(to_own, to_others))  # L = log(1 + e^z)
    log_L = float(_log_softplus(np.array(z)))
    slope = math.exp(-np.logaddexp(0, -z) - log_L)  # d log L / dz
    share = math.exp(to_others - z)
    return log_L, -slope * (1 - share / own), -slope * share


def _log_softplus(z: np.ndarray) -> np.ndarray:
    """log log(1 + e^z), which is z for very negative z."""
    return np.where(z < -40, z, np.log(np.logaddexp(0, np.maximum(z, -40))))
