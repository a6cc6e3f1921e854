"""Programs without the reduction: all weights from random starts, the nuclear-norm form by a convex solver."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize

from recipes.errors import UserError
from recipes.results.theory.program import Program, cross_entropy

Pullback = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Found:
    """What one descent has come to.

    Attributes:
        loss: CE.
        rows: W (K, K).
        features: z (K, K), the feature of class k in column k.
    """

    loss: float
    rows: np.ndarray
    features: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        """M (K, K)."""
        return self.rows @ self.features

    @property
    def rank(self) -> int:
        """Rank of the logits; singular values below 1e-4 of the largest are what the descent has left of 0."""
        return int(np.linalg.matrix_rank(self.logits, rtol=1e-4))

    def mean_square(self, program: Program) -> float:
        """The mean of ||z||^2 that the budget of a program is about."""
        return float(np.square(self.features * program.per_class(program.scales)).sum() / program.classes)


def descend(
    program: Program, *, bounds: Literal["explicit", "spectral", "frobenius"], size: float = 0.0, seed: int
) -> Found:
    """Minimise the loss over W, h0 and V in K dimensions, z = (I - V)^-1 h0, from a random start.

    By L-BFGS on log CE, with E_W = 1 and E_H the energy of the program. W and h0 are points of spheres, as budgets are
    always spent. V = 2 rho X (I + X^T X)^-1 of any X has singular values 2 rho x / (1 + x^2), which reach rho at x = 1,
    so that the optimum is not at infinity; under `frobenius` V is a point of a sphere.

    Args:
        program: gives classes, weights and budgets. Its energy knows of no gain.
        bounds: of V: none, V = 0; ||V||_2 <= size; or ||V||_F^2 <= size.
        size: rho or E_V.
        seed: of the start.
    """
    K, scales = program.classes, program.per_class(program.scales)
    identity = np.eye(K)

    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Pullback]]:
        W, h0, V = x.reshape(3, K, K)
        W, back_W = _on_sphere(W, math.sqrt(K))
        h0, back_h0 = _on_sphere(h0, math.sqrt(K * program.energy))
        if bounds == "spectral":
            V, back_V = _in_spectral_ball(V, size)
        else:
            V, back_V = _on_sphere(V, math.sqrt(size) if bounds == "frobenius" else 0.0)
        return W, h0 / scales, V, [back_W, back_h0, back_V]

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        W, h0, V, pullbacks = split(x)
        z = np.linalg.solve(identity - V, h0)
        log_loss, by_logits = cross_entropy(program, W @ z)
        by_h0 = np.linalg.solve((identity - V).T, W.T @ by_logits)
        gradients = (by_logits @ z.T, by_h0 / scales, by_h0 @ z.T)
        return log_loss, np.stack([back(g) for back, g in zip(pullbacks, gradients, strict=True)]).ravel()

    start = np.random.default_rng(seed).standard_normal(3 * K * K)
    limits = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}
    result = minimize(objective, start, jac=True, method="L-BFGS-B", options=limits)
    W, h0, V, _ = split(result.x)
    return Found(math.exp(result.fun), W, np.linalg.solve(identity - V, h0))


def _on_sphere(x: np.ndarray, radius: float) -> tuple[np.ndarray, Pullback]:
    """radius x / ||x||, and the gradient by x from that by the result."""
    norm = np.linalg.norm(x)
    return radius * x / norm, lambda g: radius / norm * (g - x * (g * x).sum() / norm**2)


def _in_spectral_ball(x: np.ndarray, radius: float) -> tuple[np.ndarray, Pullback]:
    """2 radius x (I + x^T x)^-1, and the gradient by x from that by the result."""
    S = np.linalg.inv(np.eye(len(x)) + x.T @ x)

    def pullback(g: np.ndarray) -> np.ndarray:
        N = S @ x.T @ g @ S
        return 2 * radius * (g @ S - x @ (N + N.T))

    return 2 * radius * x @ S, pullback


def require_cvxpy() -> Any:
    """The package, which is optional and takes a second to import.

    Raises:
        UserError: it is not installed.
    """
    try:
        import cvxpy
    except ImportError:
        raise UserError("verify needs cvxpy, which is not installed: pip install 'timm-deq[theory]'") from None
    return cvxpy


def convex_loss(program: Program) -> float:
    """The optimal loss of the nuclear-norm form over all M (K, K), by an interior-point solver.

    Raises:
        UserError: cvxpy is not installed.
    """
    cp, K = require_cvxpy(), program.classes
    M = cp.Variable((K, K))
    shares = program.per_class(program.weights) / program.per_class((program.majority, program.minority))
    loss = sum(shares[k] * (cp.log_sum_exp(M[:, k]) - M[k, k]) for k in range(K))
    within = cp.normNuc(M @ np.diag(program.per_class(program.scales))) <= program.radius
    return float(cp.Problem(cp.Minimize(loss), [within]).solve(solver=cp.CLARABEL))
