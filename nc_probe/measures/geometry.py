"""Reference geometries: the Gram matrices that theory predicts for class means and classifier rows.

* `simplex_etf`: simplex equiangular tight frame, the geometry of balanced neural collapse (Papyan, Han & Donoho, PNAS
  2020): K unit vectors with pairwise cosine -1/(K-1), the smallest that K vectors can share.
* `seli`: simplex-encoded-labels interpolation, what cross-entropy on unconstrained features tends to under class
  imbalance (Thrampoulidis, Kini, Vakilian & Behnia, "Imbalance Trouble: Revisiting Neural-Collapse Geometry", NeurIPS
  2022). With equal counts it is the simplex ETF.
* `orthogonal_frame`: general orthogonal frame, the same for squared error without a bias (Dang et al., "Neural Collapse
  in Deep Linear Networks: From Balanced to Imbalanced Data", ICML 2023). It speaks of means that are not centred.

The last two follow from the class counts alone, and classes of the same count are alike. So one small type holds them
all, at any K: a number per distinct count and a number per pair of distinct counts.
"""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real
from typing import Self

import torch
from torch import Tensor

from nc_probe.moments.precision import cpu_by_default

__all__ = ["ReferenceGram", "check_weight_decay", "orthogonal_frame", "seli", "simplex_etf", "simplex_etf_cosine"]


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceGram:
    """Gram matrix of m classes that fall into D kinds: diag(diagonal[kind]) + block[kind][:, kind].

    Attributes:
        kind: (m,) int64 in 0..D-1.
        diagonal: (D,) float64, what a class has with itself beyond what it has with others of its kind.
        block: (D, D) float64.
    """

    kind: Tensor
    diagonal: Tensor
    block: Tensor

    def __len__(self) -> int:
        return len(self.kind)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of the matrix, (stop - start, m) float64. Default: all."""
        kind = self.kind[start:stop]
        tile = self.block[kind][:, self.kind]
        tile.diagonal(start).add_(self.diagonal[kind])
        return tile

    def subset(self, classes: Tensor | Sequence[int]) -> Self:
        """The Gram matrix of some of the classes, in that order."""
        return dataclasses.replace(self, kind=self.kind[torch.as_tensor(classes, device=self.kind.device).long()])

    def norm(self) -> float:
        """Frobenius norm."""
        size = torch.bincount(self.kind, minlength=len(self.diagonal)).double()
        others = torch.outer(size, size) - torch.diag(size)
        own = self.diagonal + self.block.diagonal()
        return float(((others * self.block.square()).sum() + (size * own.square()).sum()).sqrt())

    def inner(self, rows: Tensor, other: Tensor) -> float:
        """Inner product with rows other^T, both (m, d), in O(m d + D^2 d) operations."""
        left, right = (x.new_zeros(len(self.diagonal), x.shape[1]).index_add_(0, self.kind, x) for x in (rows, other))
        return float(self.diagonal[self.kind] @ (rows * other).sum(1) + ((self.block @ left) * right).sum())

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return dataclasses.replace(
            self,
            kind=self.kind.to(device),
            diagonal=self.diagonal.to(device),
            block=self.block.to(device),
        )


def simplex_etf_cosine(num_classes: int) -> float:
    """Cosine -1/(K-1) between two vectors of the simplex ETF of K = `num_classes` >= 2 vectors."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    return -1 / (num_classes - 1)


@cpu_by_default()
def simplex_etf(num_classes: int, *, size: int | None = None) -> ReferenceGram:
    """K/(K-1) (I - 1 1^T / K): the unit vectors of a simplex ETF.

    Args:
        num_classes: K >= 2.
        size: m <= K vectors of the frame (any m: they are alike). Default: all K.
    """
    cosine, size = simplex_etf_cosine(num_classes), num_classes if size is None else size
    if not 0 <= size <= num_classes:
        raise ValueError(f"size must be in 0..{num_classes}, got {size}")
    block = torch.tensor([[cosine]], dtype=torch.float64)
    return ReferenceGram(torch.zeros(size, dtype=torch.int64), 1 - block[0], block)


@cpu_by_default()
def seli(counts: Tensor | Sequence[int]) -> tuple[ReferenceGram, ReferenceGram]:
    """Simplex-encoded-labels interpolation: logits W H^T equal, up to a factor, to the simplex-encoded labels.

    Column i of the labels Z (K, N) is 1 - 1/K in the row of its class and -1/K elsewhere; with Z = V L U^T the geometry
    is W W^T = V L V^T and H H^T = U L U^T, H (N, d) being the features, equal within a class. In terms of the K
    classes, with C = I - 1 1^T / K and N = diag(counts), Z Z^T = C N C, so

        G_W = W W^T = (C N C)^{1/2},    G_M = M M^T = (C N C)^{-1/2} (pseudo-inverse),

    the second because averaging U = Y^T V L^{-1} (Y the one-hot labels) over a class leaves the row of V L^{-1}. Both
    sum to zero over classes: M is centred in the balanced sense.

    With m_g classes of count c_g: a vector that lives on the classes of one count and sums to zero there is an
    eigenvector of C N C with eigenvalue c_g. What is left is the span of the normalised indicators 1_g / sqrt(m_g), in
    which C is I - s s^T with s_g = sqrt(m_g / K), and C N C is R^T R with R = diag(sqrt c) (I - s s^T). Its roots are
    the singular values of R, the last of which is the zero of s. Hence, with a = 1/2 or -1/2,

        (C N C)^a = sum_g c_g^a (I_g - 1_g 1_g^T / m_g) + sum_gh 1_g ((R^T R)^a)_gh 1_h^T / sqrt(m_g m_h).

    Args:
        counts: (K,) training samples of each class. Classes of count zero are left out.

    Returns:
        Grams of the classifier's rows and of the centred class means, of the classes with samples, in their order.
    """
    kind, count, size = _kinds(counts)
    D = len(count)
    s = (size / size.sum()).sqrt()
    _, sigma, Vh = torch.linalg.svd(count.sqrt()[:, None] * (torch.eye(D, dtype=torch.float64) - torch.outer(s, s)))
    sigma, Vh = sigma[:-1], Vh[:-1]

    def power(root: Tensor, singular: Tensor) -> ReferenceGram:
        between = (Vh.T * singular) @ Vh / torch.outer(size, size).sqrt()
        return ReferenceGram(kind, root, between - torch.diag(root / size))

    return power(count.sqrt(), sigma), power(count.rsqrt(), 1 / sigma)


@cpu_by_default()
def orthogonal_frame(
    counts: Tensor | Sequence[int], *, weight_decay: float = 0.0
) -> tuple[ReferenceGram, ReferenceGram]:
    """General orthogonal frame: logits W H^T that fit the one-hot labels Y (K, N), by balanced factors.

    The minimum of squared error without a bias, N = sum_k n_k,

        ||W H^T - Y||^2 / (2N) + lambda_W ||W||^2 / 2 + lambda_H ||H||^2 / 2.

    Y has orthogonal rows of length sqrt n_k, which are its singular values. Decay shrinks each, as over factors of one
    product the penalty is at least sqrt(lambda_W lambda_H) times its nuclear norm:

        s_k = max(sqrt n_k - N lambda, 0),    lambda = sqrt(lambda_W lambda_H),

    and up to a factor W W^T = diag(s_k), and for the class means, which are not centred, M M^T = diag(s_k / n_k). A
    class of sqrt n_k <= N lambda is not learned at all: its rows are zero (minority collapse of squared error).

    Args:
        counts: (K,) training samples n_k of each class. Classes of count zero are left out.
        weight_decay: lambda. Default: its limit 0, where s_k = sqrt n_k.

    Returns:
        Grams of the classifier's rows and of the class means, of the classes with samples, in their order.

    Raises:
        ValueError: counts or weight decay are no numbers >= 0.
    """
    kind, count, size = _kinds(counts)
    singular = (count.sqrt() - check_weight_decay(weight_decay) * float(count @ size)).clamp(min=0)
    block = torch.zeros(len(count), len(count), dtype=torch.float64)
    return ReferenceGram(kind, singular, block), ReferenceGram(kind, singular / count, block)


def check_weight_decay(weight_decay: float) -> float:
    """Return it as a float.

    Raises:
        ValueError: it is no finite number >= 0.
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, Real) or not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a finite number >= 0, got {weight_decay!r}")
    return float(weight_decay)


def _kinds(counts: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Kind (m,) of each class with samples, count (D,) and number of classes (D,) of each kind."""
    n = torch.as_tensor(counts, device="cpu").double()
    if n.ndim != 1 or not (n >= 0).all() or not (n > 0).any():
        raise ValueError(f"counts must be numbers >= 0 that are not all 0, got {n.flatten()[:10].tolist()} ...")
    count, kind, size = n[n > 0].unique(return_inverse=True, return_counts=True)
    return kind, count, size.double()
