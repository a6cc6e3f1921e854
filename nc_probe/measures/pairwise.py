"""Measures of neural collapse that compare classes two by two, tile by tile: a K x K matrix is never held.

Notation as in `formulas.py`. Every class counts once. What is undefined (one class, a zero vector) is NaN.

Sources:

* `papyan2020`: Papyan, Han & Donoho, PNAS 117(40), 2020.
* `fang2021`: Fang, He, Long & Su, PNAS 118(43), 2021. Minority collapse.
* `zhu2021`: Zhu et al., "A Geometric Analysis of Neural Collapse with Unconstrained Features", NeurIPS 2021.
* `galanti2022`: Galanti, Gyorgy & Hutter, ICLR 2022. CDNV.
* `liu2023`: Liu, Yu, Weller & Scholkopf, "Generalizing and Decoupling Neural Collapse via Hyperspherical Uniformity
  Gap", ICLR 2023 (GNC2); with the logarithmic kernel also Wu & Papyan, "Linguistic Collapse", NeurIPS 2024.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nc_probe.measures.geometry import ReferenceGram, simplex_etf_cosine

__all__ = [
    "PairMeasures",
    "cdnv",
    "compare_means",
    "cosine_gram",
    "equiangle",
    "gram_distance",
    "gram_norm",
    "mean_cosine",
    "squared_gaps",
    "uniformity_gap",
    "unit",
]

# Rows of a K x K matrix held at once: 128 x 21841 float64 is 22 MB, the whole would be 3.8 GB.
TILE = 128

# Numbers in the differences of pairs taken at once: 4 MB.
PAIRS = 2**19


class PairMeasures(NamedTuple):
    """What `cdnv`, `equiangle` and `uniformity_gap` find."""

    cdnv: float
    angle: float
    maxangle: float
    log_gap: float
    riesz_gap: float


def compare_means(means: Tensor, variances: Tensor, *, num_classes: int | None = None) -> PairMeasures:
    """Compute CDNV, angles and energies of class means in one pass over their pairs.

    All follow from the squared distances g of the directions: cos = 1 - g/2, and with norms a and b

        ||mu_i - mu_j||^2 = (a - b)^2 + a b g,

    which has all digits but where means are close, and is nothing where one is zero: `cdnv` is then asked by itself.

    Args:
        means: (m, d) centred class means: all K, or those of a group.
        variances: (m,) v_k = tr S_k / n_k.
        num_classes: K of the simplex that the means should be part of. Default: m.
    """
    m, norms = len(means), means.norm(dim=1)
    if m < 2:
        return PairMeasures(*[math.nan] * 5)
    target, mean, energies = simplex_etf_cosine(num_classes or m), mean_cosine(means), _Energies(means, num_classes)
    ratio = squares = deviation = 0.0
    far, filled = True, 0
    for start, gaps in squared_gaps(unit(means)):
        energies.add(gaps)
        a, b = norms[start : start + len(gaps), None], norms[start:]
        distances = torch.addcmul((a - b).square_(), a * b, gaps)  # infinite where i >= j
        far = far and bool((distances / torch.addcmul(a.square(), b, b)).amin() > 1e-4)  # not so where NaN
        v = variances[start:]
        ratio += float(((v[: len(gaps), None] + v) / distances).sum())
        cosines = gaps.masked_fill_(_seen(gaps), 2 - 2 * mean).div_(-2).add_(1)  # those not asked for at the mean
        filled += len(gaps) * (len(gaps) + 1) // 2
        squares += float((cosines - mean).square_().sum())
        deviation += float(cosines.sub_(target).abs_().sum())
    pairs = m * (m - 1) / 2
    return PairMeasures(
        ratio / (2 * pairs) if far else cdnv(means, variances),
        math.sqrt(squares / pairs),
        max(deviation - filled * abs(mean - target), 0.0) / pairs if not math.isnan(deviation) else math.nan,
        *energies.gaps(),
    )


def cdnv(means: Tensor, variances: Tensor) -> float:
    """Class-distance normalised variance: mean over i != j of (v_i + v_j) / (2 ||mu_i - mu_j||^2).

    Range [0, inf]; 0 at collapse, infinite if two class means coincide. `galanti2022`.

    Args:
        means: (K, d), centred or not.
        variances: (K,) v_k = tr S_k / n_k.
    """
    K = len(means)
    if K < 2:
        return math.nan
    total = 0.0
    for start, gaps in squared_gaps(means):
        v = variances[start:]
        # Ordered pairs: (v_i + v_j) / (2 gap) twice. With no variance at all coinciding means are 0/0: NaN.
        total += float(((v[: len(gaps), None] + v) / gaps).sum())
    return total / (K * (K - 1))


def uniformity_gap(rows: Tensor, *, num_classes: int | None = None) -> tuple[float, float]:
    """GNC2, hyperspherical energy of the directions u_i = row_i / ||row_i|| above that of the simplex ETF.

    Two kernels, the mean over i != j of

    * log(1 / ||u_i - u_j||), minus its value at the ETF;
    * ||u_i - u_j||^{-s} with s = d - 2, the Riesz kernel that is harmonic in d dimensions; as a generalised mean,
      log(mean)/s, minus its value at the ETF. Powers with s of a thousand leave the range of float64, their logarithms
      do not. NaN where d < 3.

    With the distance of the ETF, delta = sqrt(2 K/(K-1)), both are a mean of log(delta / ||u_i - u_j||): the plain one,
    and one that with growing s looks at the closest pair alone. Range [0, inf] for all K classes, of which the ETF is
    the minimum (where d < K - 1 there is none, and the minimum is above 0), [-log(2/delta), inf] for a part. 0 at the
    ETF, infinite if two directions coincide. `liu2023`.

    Args:
        rows: (m, d) centred class means: all K, or those of a group.
        num_classes: K of the simplex that the rows should be part of. Default: m.

    Returns:
        The gaps for the logarithmic and for the Riesz kernel.
    """
    if len(rows) < 2:
        return math.nan, math.nan
    energies = _Energies(rows, num_classes)
    for _, gaps in squared_gaps(unit(rows)):
        energies.add(gaps)
    return energies.gaps()


class _Energies:
    """Both energies, summed tile by tile over the squared distances of directions."""

    def __init__(self, rows: Tensor, num_classes: int | None) -> None:
        m, self._power = len(rows), rows.shape[1] - 2
        self._pairs, self._etf = m * (m - 1) / 2, math.log(2 - 2 * simplex_etf_cosine(num_classes or m)) / 2
        self._total, self._parts = 0.0, []

    def add(self, gaps: Tensor) -> None:
        """Add a tile, infinite where nothing is to be added."""
        logs = gaps.log().div_(-2)
        self._parts.append((self._power * logs).flatten().logsumexp(0))
        self._total += float(logs.masked_fill_(gaps == math.inf, 0.0).sum())

    def gaps(self) -> tuple[float, float]:
        """Return both, above those of the simplex."""
        mean = float(torch.stack(self._parts).logsumexp(0)) - math.log(self._pairs)
        riesz_gap = mean / self._power + self._etf if self._power > 0 else math.nan
        return self._total / self._pairs + self._etf, riesz_gap


def equiangle(rows: Tensor, *, num_classes: int | None = None) -> tuple[float, float]:
    """NC2, equal angles: of the cosines of all pairs, (standard deviation, mean |cos + 1/(K-1)|).

    Ranges [0, 1] and [0, 1 + 1/(K-1)]; both 0 for a simplex ETF. `papyan2020`, figs. 3 and 4.

    Args:
        rows: (m, d) centred means or classifier rows: all K, or those of a group.
        num_classes: K of the simplex that the rows should be part of. Default: m.
    """
    m = len(rows)
    if m < 2:
        return math.nan, math.nan
    target, mean, directions = simplex_etf_cosine(num_classes or m), mean_cosine(rows), unit(rows)
    squares = deviation = 0.0
    for start in range(0, m, TILE):
        cosines = directions[start : start + TILE] @ directions[start:].T
        seen = _seen(cosines)
        squares += float((cosines - mean).masked_fill_(seen, 0.0).square().sum())
        deviation += float((cosines - target).masked_fill_(seen, 0.0).abs().sum())
    pairs = m * (m - 1) / 2
    return math.sqrt(squares / pairs), deviation / pairs


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine over all pairs of rows. Range [-1/(m-1), 1].

    -1/(K-1) for a simplex ETF; 1 if the rows have merged to one direction, as minority classes do beyond a critical
    imbalance (`fang2021`).
    """
    m = len(rows)
    # The sum over all ordered pairs is ||sum of unit rows||^2, of which m are a row with itself.
    return float(unit(rows).sum(0).square().sum() - m) / (m * (m - 1)) if m > 1 else math.nan


def cosine_gram(rows: Tensor) -> Tensor:
    """(m, m) cosines of all pairs of rows (m, d); NaN beside a zero row."""
    return unit(rows) @ unit(rows).T


def gram_norm(rows: Tensor, other: Tensor | None = None) -> float:
    """||G||_F of G = rows other^T, both (m, d). Default: other = rows."""
    m, d = rows.shape
    # <a b^T, a b^T> = <a^T a, b^T b>: of K x K and d x d matrices take the smaller.
    if m <= d:
        square = (rows @ (rows if other is None else other).T).square().sum()
    else:
        gram = rows.T @ rows
        square = (gram * (gram if other is None else other.T @ other)).sum()
    return math.sqrt(float(square))


def gram_distance(
    rows: Tensor, reference: ReferenceGram, other: Tensor | None = None, *, norm: float | None = None
) -> float:
    """NC2, distance to a reference geometry: || G/||G||_F - E/||E||_F ||_F with G = rows rows^T, E the reference.

    Range [0, sqrt 2]; 0 for rows of that geometry in any size and orientation. `zhu2021` (ETF, there with rows = W);
    Thrampoulidis et al. 2022 (SELI); Dang et al. 2023 (orthogonal frame).

    Args:
        rows: (m, d) class means or classifier rows.
        reference: Gram matrix of m classes.
        other: (m, d), for G = rows other^T; the range is then [0, 2]. Default: rows.
        norm: ||G||_F, where it is known.
    """
    m = len(rows)
    if m < 2:
        return math.nan
    norm, reference_norm = gram_norm(rows, other) if norm is None else norm, reference.norm()
    reference, other = reference.to(rows.device), rows if other is None else other
    if not norm * reference_norm > 0:
        return math.nan
    squared = 2 - 2 * reference.inner(rows, other) / (norm * reference_norm)
    if squared < 1e-3:  # it is right to 1e-14 or so, not enough where so much of the 2 cancels: entry by entry then
        squared = 0.0
        for start in range(0, m, TILE):
            gram = rows[start : start + TILE] @ other.T
            squared += float((gram / norm - reference.rows(start, start + TILE) / reference_norm).square().sum())
    return math.sqrt(squared)


def unit(rows: Tensor) -> Tensor:
    """(m, d) the rows over their norms; NaN for a zero row."""
    return rows / rows.norm(dim=1, keepdim=True)


def _seen(tile: Tensor) -> Tensor:
    """Mask of a tile (t, m - start) of the rows from `start` against all from `start` on: pairs i >= j."""
    return torch.ones(tile.shape, dtype=torch.bool, device=tile.device).tril()


def squared_gaps(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(start, squared distances (t, m - start) of t rows to all from `start` on), infinite where i >= j.

    ||a||^2 + ||b||^2 - 2 a.b is one matrix product, and loses as many digits as the distance is small beside the norms.
    So it is taken about the mean of the rows, and where minority means merge again about one of them.
    """
    centered = rows - rows.mean(0)
    for start in range(0, len(rows), TILE):
        gaps, close = _expanded_gaps(centered[start : start + TILE], centered[start:])
        seen = _seen(gaps)
        gaps.masked_fill_(seen, math.inf)
        close &= ~seen
        while close.any():
            # The first row with close pairs left and all that is close to it: as columns, and as rows of this tile.
            pivot = close.any(1).nonzero()[0]
            columns = close[pivot[0]].nonzero()[:, 0]
            members = torch.cat([pivot, columns[columns < len(gaps)]])
            origin = rows[start + pivot]
            local, still = _expanded_gaps(rows[start + members] - origin, rows[start + columns] - origin)
            asked = close[members[:, None], columns]
            # What is closer still is exact by differences.
            indices = (still & asked).nonzero(as_tuple=True)
            for i, j in zip(*(index.split(max(1, PAIRS // rows.shape[1])) for index in indices), strict=True):
                local[i, j] = (rows[start + members[i]] - rows[start + columns[j]]).square().sum(1)
            gaps[members[:, None], columns] = torch.where(asked, local, gaps[members[:, None], columns])
            close[members[:, None], columns] = False
        yield start, gaps


def _expanded_gaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of rows, and which of them are below 1e-4 of the squared norms: there digits are missing."""
    scale = a.square().sum(1)[:, None] + b.square().sum(1)
    gaps = torch.addmm(scale, a, b.T, alpha=-2)
    return gaps, gaps < 1e-4 * scale
