"""Every number of a CollapseReport from the full batch: loops and dense matrices in NumPy, each formula spelled out."""

import itertools
import math

import numpy as np


def pairs(m):
    return list(itertools.combinations(range(m), 2))


def cosine(a, b):
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def distance(G, E):
    return float(np.sqrt(((G / np.sqrt((G**2).sum()) - E / np.sqrt((E**2).sum())) ** 2).sum()))


def dense_etf(K):
    return K / (K - 1) * (np.eye(K) - np.ones((K, K)) / K)


def one_hot(labels):
    """(classes with samples, N), in the order of the classes."""
    present = np.unique(labels)
    return (labels[None] == present[:, None]).astype(float)


def interpolating_grams(Z, Y):
    """W W^T and M M^T where Z = V L U^T, W W^T = V L V^T, H H^T = U L U^T, and M the class means of the rows of H."""
    V, L, Ut = np.linalg.svd(Z, full_matrices=False)
    keep = L > 1e-9 * L[0]
    V, L, U = V[:, keep], L[keep], Ut[keep].T
    average = Y / Y.sum(1, keepdims=True)
    return (V * L) @ V.T, average @ ((U * L) @ U.T) @ average.T


def dense_seli(labels):
    Y = one_hot(labels)
    return interpolating_grams(Y - 1 / len(Y), Y)


def dense_frame(labels):
    Y = one_hot(labels)
    return interpolating_grams(Y, Y)


def rows_alone(rows, K, suffix):
    """NC2 of rows that should be part of a simplex of K."""
    m, norms = len(rows), [math.sqrt(float(r @ r)) for r in rows]
    out = {}
    if m > 0:
        out[f"mean_norm{suffix}"] = sum(norms) / m
        out[f"mean_square_norm{suffix}"] = float(np.trace(rows @ rows.T)) / m
    if m > 1:
        mean = sum(norms) / m
        cosines = [cosine(rows[i], rows[j]) for i, j in pairs(m)]
        middle = sum(cosines) / len(cosines)
        out[f"nc2_norm{suffix}"] = math.sqrt(sum((n - mean) ** 2 for n in norms) / m) / mean
        out[f"mean_cosine{suffix}"] = middle
        out[f"nc2_angle{suffix}"] = math.sqrt(sum((c - middle) ** 2 for c in cosines) / len(cosines))
        out[f"nc2_maxangle{suffix}"] = sum(abs(c + 1 / (K - 1)) for c in cosines) / len(cosines)
        out[f"nc2_etf{suffix}"] = distance(rows @ rows.T, dense_etf(K)[:m, :m])
    return out


def energies(M, K):
    units = [r / math.sqrt(float(r @ r)) for r in M]
    gaps = [math.sqrt(float(((units[i] - units[j]) ** 2).sum())) for i, j in pairs(len(M))]
    etf, s = math.sqrt(2 * K / (K - 1)), M.shape[1] - 2
    with np.errstate(divide="ignore"):
        out = {"gnc2_log": float(np.mean(-np.log(gaps)) - np.log(1 / etf))}
        if s > 0:
            out["gnc2_riesz"] = float(np.mean(np.array(gaps) ** -s) ** (1 / s) / (1 / etf))
            out["gnc2_riesz"] = math.log(out["gnc2_riesz"])
    return out


def predictions(x, labels, W, b):
    """Class that the classifier chooses, and class of the nearest mean, of each sample."""
    present = np.unique(labels)
    means = [x[labels == k].mean(0) for k in present]
    nearest = [present[int(np.argmin([((xi - mu) ** 2).sum() for mu in means]))] for xi in x]
    return np.argmax(x @ W.T + b, axis=1), np.array(nearest)


def report(x, labels, W, b, *, center="balanced", classes=None):
    """The numbers of the report of all classes (`classes` None) or of a group, by name; absent what is undefined."""
    K_rows, whole = len(W), classes is None
    classes = list(range(K_rows)) if whole else sorted(classes)
    present = [int(k) for k in np.unique(labels)]
    shown = [k for k in classes if k in present]
    N, K, m = len(labels), len(present), len(shown)
    of = {k: x[labels == k] for k in present}
    n = {k: len(of[k]) for k in present}
    mu = {k: of[k].mean(0) for k in present}
    mass = {k: 1 / K if center == "balanced" else n[k] / N for k in present}
    mu_G = sum(mass[k] * mu[k] for k in present)
    S = {k: sum(np.outer(v, v) for v in of[k] - mu[k]) / n[k] for k in present}
    part = sum(mass[k] for k in shown)

    out = {"classes": shown, "samples": sum(n[k] for k in shown), "class_count": [n[k] for k in shown]}
    if not m:
        return out
    pi = {k: mass[k] / part for k in shown}
    M, V = np.array([mu[k] - mu_G for k in shown]), W[shown]
    out |= rows_alone(M, K, "") | rows_alone(V, K_rows, "_weight")
    out["mean_square_norm"] = sum(pi[k] * float((of[k] ** 2).sum()) / n[k] for k in shown)
    S_W = sum(pi[k] * S[k] for k in shown)
    S_B = sum(pi[k] * np.outer(mu[k] - mu_G, mu[k] - mu_G) for k in shown)
    variance = [float(np.trace(S[k])) for k in shown]
    out["class_variance"], out["class_norm"] = variance, [math.sqrt(float(r @ r)) for r in M]
    out["class_norm_weight"] = [math.sqrt(float(w @ w)) for w in V]
    eigenvalues = np.linalg.eigvalsh(S_B)[::-1]
    rank = min(m, K - 1, int((eigenvalues > 1e-11 * eigenvalues[0]).sum())) if K > 1 else 0
    out["nc1_rank"] = rank
    if rank:
        inverse = np.linalg.pinv(S_B, rcond=1e-11, hermitian=True)
        out["nc1"] = float(np.trace(S_W @ inverse)) / m
        out["nc1_condition"] = math.sqrt(eigenvalues[0] / eigenvalues[rank - 1])
        out["nc1_trace"] = float(np.trace(S_W) / np.trace(S_B))
        out["class_nc1"] = [float(np.trace(S[k] @ inverse)) / m for k in shown]
        out["class_nc3_cosine"] = [cosine(w, h) for w, h in zip(V, M, strict=True)]
        out["nc3_cosine"] = sum(out["class_nc3_cosine"]) / m
        out["nc3"] = math.sqrt(((V / np.sqrt((V**2).sum()) - M / np.sqrt((M**2).sum())) ** 2).sum())
    if m > 1:
        gaps = [((mu[shown[i]] - mu[shown[j]]) ** 2).sum() for i, j in pairs(m)]
        ratios = [(variance[i] + variance[j]) / (2 * gap) for (i, j), gap in zip(pairs(m), gaps, strict=True)]
        out["cdnv"] = float(sum(ratios) / len(ratios))
        out |= energies(M, K)
        at = np.array([present.index(k) for k in shown])
        H = np.array([mu[k] for k in shown])
        of_weight, of_means = dense_seli(labels)
        out["nc2_seli"] = distance(M @ M.T, of_means[at][:, at])
        out["nc2_seli_weight"] = distance(V @ V.T, of_weight[at][:, at])
        of_weight, of_means = dense_frame(labels)
        out["nc2_gof"] = distance(H @ H.T, of_means[at][:, at])
        out["nc2_gof_weight"] = distance(V @ V.T, of_weight[at][:, at])

    chosen, nearest = predictions(x, labels, W, b)
    for prefix, answer in (("", chosen), ("center_", nearest)):
        shares = [float((answer[labels == k] == k).mean()) for k in shown]
        out[f"class_{prefix}accuracy"], out[f"balanced_{prefix}accuracy"] = shares, sum(shares) / m
        counted = np.isin(labels, shown)
        out[f"{prefix}accuracy"] = float((answer == labels)[counted].mean())
    out["class_nc4"] = [float((chosen == nearest)[labels == k].mean()) for k in shown]
    out["nc4"] = sum(pi[k] * share for k, share in zip(shown, out["class_nc4"], strict=True))
    out["mean_accuracy"] = sum(int(np.argmax(W @ mu[k] + b)) == k for k in shown) / m
    if whole:
        weighted = np.array([math.sqrt(mass[k] / n[k]) for k in labels])[:, None] * (x - mu_G)
        out["feature_rank"] = int(np.linalg.matrix_rank(weighted)) if N > 1 else 0
        squares = np.linalg.svd(weighted, compute_uv=False) ** 2
        if out["feature_rank"]:
            out["stable_rank"] = float(squares.sum() / squares[0])
            out["participation_ratio"] = float(squares.sum() ** 2 / (squares**2).sum())
    return out
