"""Geometry of the classifier rows and class features that optimal logits imply.

With M diag(d) = U S V^T the factors of least norm are W = U S^(1/2) and Z = diag(d)^-1 V S^(1/2) (rows: class
features), up to a rotation that both share and a factor for each. Definitions are those of nc_probe: class features are
centred with every class counting once, and G = rows rows^T:

    NC2 = || G / ||G||_F - E / ||E||_F ||_F,  E = I - 1 1^T / K the simplex ETF;    NC3 = || W / ||W|| - Z / ||Z|| ||_F.
"""

import math

import numpy as np

# Rows this much shorter than those of the majority are zero but for rounding, and have no direction.
VANISHED = 1e-4


def factors(logits: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows W and class features Z, both (K, K) and of the same norm once features are scaled, with W Z^T = logits.

    Args:
        logits: M (K, K), those of class k in column k.
        scales: d (K,).
    """
    U, S, Vt = np.linalg.svd(logits * scales)
    return U * np.sqrt(S), Vt.T * np.sqrt(S) / scales[:, None]


def minority_cosine(rows: np.ndarray, majority: int) -> float:
    """Mean cosine between the rows (K, d) of the minority classes; NaN where they have vanished."""
    norms = np.linalg.norm(rows, axis=1)
    if norms[majority:].min() < VANISHED * norms[:majority].max():
        return math.nan
    units, m = rows[majority:] / norms[majority:, None], len(rows) - majority
    return float((np.square(units.sum(0)).sum() - m) / (m * (m - 1)))


def nc2(rows: np.ndarray) -> float:
    """Distance of the Gram matrix of rows (K, d), centred here, to that of a simplex ETF."""
    K = len(rows)
    rows = rows - rows.mean(0)
    gram, frame = rows @ rows.T, np.eye(K) - 1 / K
    return float(np.linalg.norm(gram / np.linalg.norm(gram) - frame / np.linalg.norm(frame)))


def nc3(rows: np.ndarray, features: np.ndarray) -> float:
    """Distance between classifier rows and class features (K, d), each over its norm; features are centred here."""
    features = features - features.mean(0)
    return float(np.linalg.norm(rows / np.linalg.norm(rows) - features / np.linalg.norm(features)))


def measures(rows: np.ndarray, features: np.ndarray, majority: int) -> dict[str, float]:
    """All of the above, of classifier rows and class features (K, d), by name."""
    return {
        "minority_cosine_w": minority_cosine(rows, majority),
        "minority_cosine_h": minority_cosine(features - features.mean(0), majority),
        "nc2_w": nc2(rows),
        "nc2_h": nc2(features),
        "nc3": nc3(rows, features),
    }


def large_gain_limit(scales: np.ndarray, majority: int) -> dict[str, float]:
    """The measures that those of an optimum tend to as the budgets grow.

    With large budgets only the margins matter, and the logits tend to a multiple of the simplex-encoded labels I - 1
    1^T / K. With d = 1 (budget `class`) the factors are a simplex ETF; with d_k ~ sqrt(n_k) (budget `sample`) they are
    SELI, the simplex-encoded-labels interpolation of Thrampoulidis, Kini, Vakilian & Behnia, "Imbalance Trouble:
    Revisiting Neural-Collapse Geometry", NeurIPS 2022.

    Args:
        scales: d (K,).
        majority: K_A.
    """
    K = len(scales)
    return measures(*factors(np.eye(K) - 1 / K, scales), majority)
