"""NC1 where minority means merge, by the ways in which it is computed, beside its closed form.

K_A = 3 majority means stand at t u + ETF, K_B = 7 minority means at -t K_A/K_B u + e ETF: a simplex each, one of size
1, one of size e, in subspaces orthogonal to each other and to u. So S_B is diagonal in known directions,

    S_B = (K_A/(K_A-1) P_A + t^2 K_A K/K_B u u^T + e^2 K_B/(K_B-1) P_B) / K,

and with samples mu_k +- s q_j, q_j the columns of an orthonormal Q (d, r) that spans all of them, S_W = s^2/r Q Q^T and

    NC1 = tr(S_W S_B^+)/K = s^2/r ((K_A-1)^2/K_A + K_B/(t^2 K_A K) + (K_B-1)^2/(e^2 K_B)).

As e goes to 0 the minority merges and NC1 goes to infinity. The eigenvalue of S_B that says so is e^2: a cut-off
relative to the largest, which a pseudo-inverse needs, takes it for zero, and NC1 is then that of the majority alone.
"""

from collections.abc import Iterator, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from nc_probe import ClassMoments, measure
from recipes.benchmarks.tables import Row

__all__ = ["merged_figure", "merged_minorities"]

MAJORITY, MINORITY, FEATURES = 3, 7, 512
APART, SPREAD = 0.7, 1e-3  # t and s

# Okabe & Ito (2008): told apart by readers of any colour vision.
COLORS = {"truth": "#000000", "this tool": "#56B4E9", "pinv, float32": "#D55E00", "pinv, float64": "#009E73"}


def merged_minorities(distances: Sequence[float] = tuple(10.0**-k for k in range(9))) -> Iterator[Row]:
    """Relative error of NC1 by method, for distances e of the minority means."""
    for distance in distances:
        values = nc1_by_method(distance)
        truth = values.pop("truth")
        yield {"distance": f"{distance:g}", "NC1": truth} | {name: abs(v / truth - 1) for name, v in values.items()}


def nc1_by_method(distance: float) -> dict[str, float]:
    """NC1: the truth, ours, and what is usual: the pseudo-inverse of S_B, or its K - 1 largest eigenvalues."""
    K = MAJORITY + MINORITY
    x, labels = samples(distance)
    values = {"truth": closed_form(distance)}
    for dtype, name in ((torch.float64, "this tool"), (torch.float32, "this tool, features in float32")):
        moments = ClassMoments(K, FEATURES, class_counts=torch.bincount(labels)).update(x.to(dtype), labels)
        values[name] = measure(moments, None).nc1
    for dtype in (torch.float32, torch.float64):
        rows = x.to(dtype)
        means = torch.stack([rows[labels == k].mean(0) for k in range(K)])
        centered, within = means - means.mean(0), rows - means[labels]
        S_B, S_W = centered.T @ centered / K, within.T @ within / len(x)
        name = str(dtype).removeprefix("torch.")
        values[f"pinv, {name}"] = float((torch.linalg.pinv(S_B) * S_W).sum()) / K
        eigenvalues, vectors = torch.linalg.eigh(S_B)
        inside = ((S_W @ vectors) * vectors).sum(0)
        values[f"K - 1 largest, {name}"] = float((inside / eigenvalues)[1 - K :].sum()) / K
    return values


def closed_form(distance: float) -> float:
    """The truth."""
    A, B = MAJORITY, MINORITY
    directions = (A - 1) ** 2 / A + B / (APART**2 * A * (A + B)) + (B - 1) ** 2 / (distance**2 * B)
    return SPREAD**2 / (A + B + 1) * directions


def samples(distance: float) -> tuple[Tensor, Tensor]:
    """Features (N, d) float64 of exactly known class means and covariance, and labels (N,)."""
    A, B = MAJORITY, MINORITY
    gen = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(FEATURES, A + B + 1, generator=gen, dtype=torch.float64)).Q
    u = APART * Q[:, -1]
    means = torch.cat([u + simplex(A) @ Q[:, :A].T, -A / B * u + distance * simplex(B) @ Q[:, A:-1].T])
    arms = SPREAD * torch.cat([Q.T, -Q.T])
    x = (means[:, None] + arms).flatten(0, 1)
    return x, torch.arange(A + B).repeat_interleave(len(arms))


def simplex(m: int) -> Tensor:
    """(m, m) unit vectors of a simplex ETF."""
    corners = torch.eye(m, dtype=torch.float64) - 1 / m
    return corners / corners[0].norm()


def merged_figure(distances: Sequence[float] = tuple(10 ** (-k / 8) for k in range(65))) -> Figure:
    """NC1 against the distance of minority means, by method; the means merge to the right."""
    found = [nc1_by_method(distance) for distance in distances]
    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {
        "this tool": {"linewidth": 7, "alpha": 0.75, "solid_capstyle": "round"},
        "pinv, float32": {"linewidth": 2.2},
        "pinv, float64": {"linewidth": 2.2},
        "truth": {"linewidth": 1.5, "linestyle": (0, (5, 3))},
    }
    for name, style in styles.items():
        axes.plot(distances, [values[name] for values in found], color=COLORS[name], label=name, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("distance of minority means, relative to the majority's")
    axes.set_ylabel("NC1")
    axes.set_title("NC1 as minority means merge", fontsize=11.5, loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    note = {"color": "0.35", "fontsize": 9, "ha": "center", "va": "bottom"}
    axes.annotate(
        "NC1 of the majority alone", (1e-4, found[-1]["pinv, float32"]), (0, 5), textcoords="offset points", **note
    )
    axes.legend(frameon=False, fontsize=9.5)
    return figure
