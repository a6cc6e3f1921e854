"""Reference geometries: the Gram matrices that theory predicts for class means and classifier rows.

Simplex equiangular tight frame (ETF), the geometry of balanced neural collapse (Papyan, Han & Donoho 2020): K unit
vectors with pairwise cosine -1/(K-1), the smallest that K vectors can share. Gram matrix: K/(K-1) (I - 1 1^T / K).
"""

import torch
from torch import Tensor

__all__ = ["simplex_etf_cosine", "simplex_etf_gram"]


def simplex_etf_cosine(num_classes: int) -> float:
    """Cosine -1/(K-1) between two vectors of the simplex ETF of K = `num_classes` >= 2 vectors."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    return -1 / (num_classes - 1)


def simplex_etf_gram(
    num_classes: int,
    *,
    size: int | None = None,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Gram matrix of `size` of the K unit vectors of a simplex ETF, or some of its rows.

    Args:
        num_classes: K.
        size: m <= K vectors of the frame (any m: they are alike). Default: all K.
        start: first row.
        stop: one past the last row. Default: m.
        device: of the result.

    Returns:
        (stop - start, m) float64 with unit diagonal.
    """
    size = num_classes if size is None else size
    if not 0 <= size <= num_classes:
        raise ValueError(f"size must be in 0..{num_classes}, got {size}")
    rows = torch.arange(start, size if stop is None else stop, device=device)
    gram = torch.full((len(rows), size), simplex_etf_cosine(num_classes), dtype=torch.float64, device=device)
    return gram.scatter_(1, rows[:, None], 1.0)
