"""What the measures are at a predicted geometry, from the class counts alone: reference lines for what is measured.

Features and classifier of the simplex ETF have NC2 = 0 and cosines -1/(K-1). At the simplex-encoded-labels
interpolation (SELI, `geometry.seli`), what cross-entropy tends to under imbalance, they have others.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nc_probe.measures.geometry import ReferenceGram, seli, simplex_etf_cosine

__all__ = ["at_seli"]


def at_seli(counts: Tensor | Sequence[int], classes: Sequence[int] | None = None) -> dict[str, float]:
    """Compute fields of a report, balanced, of which features and classifier are a SELI of the classes with samples.

    Args:
        counts: (K,) training samples of each class.
        classes: those of a group. Default: all.

    Returns:
        `nc2_etf` and `mean_cosine` of the class means, `nc2_etf_weight` and `mean_cosine_weight` of the classifier;
        NaN for fewer than two classes.
    """
    counts = torch.as_tensor(counts, device="cpu")
    present = counts > 0
    kept = present if classes is None else present & torch.isin(torch.arange(len(counts)), torch.tensor(classes))
    position = (present.cumsum(0) - 1)[kept]
    cosine = simplex_etf_cosine(int(present.sum())) if present.sum() > 1 else math.nan
    found = {}
    for suffix, gram in zip(("_weight", ""), seli(counts), strict=True):
        part = gram.subset(position)
        found[f"nc2_etf{suffix}"] = _distance_to_simplex(part, cosine)
        found[f"mean_cosine{suffix}"] = _mean_cosine(part)
    return found


def _distance_to_simplex(gram: ReferenceGram, cosine: float) -> float:
    """|| G/||G|| - E/||E|| || for a Gram G of m classes and E of 1 on its diagonal and `cosine` elsewhere."""
    m = len(gram)
    if m < 2:
        return math.nan
    trace, every = float(_diagonal(gram)[gram.kind].sum()), _sum(gram, torch.ones_like(gram.diagonal))
    norm = math.sqrt(m + m * (m - 1) * cosine**2)
    squared = 2 - 2 * ((1 - cosine) * trace + cosine * every) / (norm * gram.norm())
    return math.sqrt(squared) if squared > 1e-12 else 0.0  # rounding, where SELI is the simplex


def _mean_cosine(gram: ReferenceGram) -> float:
    m = len(gram)
    if m < 2:
        return math.nan
    return (_sum(gram, _diagonal(gram).rsqrt()) - m) / (m * (m - 1))


def _diagonal(gram: ReferenceGram) -> Tensor:
    """(D,) what a class of each kind has with itself."""
    return gram.diagonal + gram.block.diagonal()


def _sum(gram: ReferenceGram, scale: Tensor) -> float:
    """Sum of all entries of diag(s) G diag(s), where s is `scale` (D,) of the kind of a class."""
    size = torch.bincount(gram.kind, minlength=len(scale)).double()
    weighted = size * scale
    return float(size @ (gram.diagonal * scale.square()) + weighted @ gram.block @ weighted)
