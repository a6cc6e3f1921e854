"""A linear DEQ, z = V z + h0, in the layer-peeled program, by what the budget of features is put on.

* `z`, on the features that the classifier sees, as any normalisation of the output does: V drops out. The program, and
  its optimum, are those of the explicit network.
* `spectral`, on h0 with ||V||_2 <= rho < 1: the explicit program with E_H times a gain, as no map of h0 stretches a
  direction by more. The equilibrium (I - V)^-1 h0 reaches 1/(1-rho)^2 at V = rho I; T Picard steps from 0, that is
  (I + V + ... + V^(T-1)) h0, reach ((1-rho^T)/(1-rho))^2; a residual layer (I + V) h0, (1+rho)^2; a layer V h0, rho^2.
* `frobenius`, on h0 with ||V||_F^2 <= E_V < 1: singular value i of the logits, s_i, costs s_i (1 - v_i) with sum v_i^2
  <= E_V, so the budget becomes ||M D||_* - sqrt(E_V) ||M D||_F <= B. It is not convex and favours low rank: even
  balanced classes are no simplex ETF at the best that is known.
* `penalty`, weight decay on W, V and h0 and no bound: with V = (1 - gap) times the identity of r directions, W and h0
  cost nothing as gap -> 0, and V costs l r / 2. The infimum is that of the smallest r that separates K classes, 2
  (points on a circle), and no minimiser reaches it.

Each of them has, for the features z that W sees, a mean ||z||^2: at the same one and the same ||W|| the explicit
optimum is never worse, because (W, z) is feasible for the explicit program.

Claim examined: Sun & Shi, "Understanding Representation of Deep Equilibrium Models from Neural Collapse Perspective",
NeurIPS 2024, whose layer-peeled model has such a DEQ.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar

Convention = Literal["z", "spectral", "frobenius", "penalty"]


def gains(rho: float, steps: Sequence[int]) -> dict[str, float]:
    """What the maps of convention `spectral` multiply E_H by, by name.

    Args:
        rho: bound of ||V||_2, 0 or more and below 1.
        steps: numbers T of Picard steps.
    """
    unrolled = {f"{T} step{'s' * (T > 1)}": (1 - rho**T) / (1 - rho) for T in steps}
    stretch = {"equilibrium": 1 / (1 - rho), **unrolled, "residual layer": 1 + rho, "plain layer": rho}
    return {name: value**2 for name, value in stretch.items()}


def frobenius_radius(logits: np.ndarray, scales: np.ndarray, energy_v: float) -> float:
    """||M D||_* - sqrt(E_V) ||M D||_F: the least B for which a DEQ of convention `frobenius` has these logits.

    Args:
        logits: M (K, K).
        scales: d (K,), of D = diag(d).
        energy_v: E_V.
    """
    S = np.linalg.svd(logits * scales, compute_uv=False)
    return float(S.sum() - math.sqrt(energy_v) * np.linalg.norm(S))


def frobenius_etf_loss(classes: int, energy: float, energy_v: float) -> float:
    """Loss of balanced classes under `frobenius` if the logits are a multiple m (I - 1 1^T / K), a simplex ETF.

    Its K - 1 singular values are m, so m (K - 1 - sqrt(E_V (K-1))) = B = K sqrt(E_W E_H).
    """
    m = classes * math.sqrt(energy) / (classes - 1 - math.sqrt(energy_v * (classes - 1)))
    return math.log1p((classes - 1) * math.exp(-m))


def penalty_objective(frame: np.ndarray, gap: float, weight: float) -> float:
    """CE + (l/2) (||W||^2 + ||V||^2 + ||h0||^2) of balanced classes, at the best length of W and h0.

    W = c U and h0 = gap c U^T, V = (1 - gap) I on the r dimensions of the frame U: logits c^2 U U^T. ||W||^2 and
    ||h0||^2 trade at a fixed product, and are l gap t K together for logits t U U^T.

    Args:
        frame: unit rows U (K, r).
        gap: distance of the eigenvalues of V to 1, above 0, at most 1.
        weight: l.
    """
    K, r = frame.shape
    cosines = frame @ frame.T

    def objective(log_t: float) -> float:
        excess = math.exp(log_t) * (cosines - np.diag(cosines))
        loss = np.logaddexp.reduce(excess, axis=0).mean()
        return float(loss + weight * gap * math.exp(log_t) * K)

    most = math.log(math.log(K) / (weight * gap * K))  # beyond it the norms cost more than no logits at all
    least = minimize_scalar(objective, bounds=(most - 40, most), method="bounded", options={"xatol": 1e-10})
    return float(least.fun) + weight * r * (1 - gap) ** 2 / 2


def polygon(classes: int) -> np.ndarray:
    """K points evenly on a circle, (K, 2)."""
    angles = 2 * math.pi * np.arange(classes) / classes
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def simplex(classes: int) -> np.ndarray:
    """The unit vectors of a simplex ETF in K - 1 dimensions, (K, K-1)."""
    _, vectors = np.linalg.eigh(np.full((classes, classes), 1 / classes))
    return vectors[:, :-1] * math.sqrt(classes / (classes - 1))
