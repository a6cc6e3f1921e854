"""Detection of samples of no class by the geometry of collapse: scores of features, and how well a score tells.

Notation as in `formulas.py`: S_W the within-class covariance, S_T = S_W + S_B the total one, mu_G the centre; every
average over classes is weighted by pi. A score is high for samples of the classes, which are called known.

Sources:

* `ammar2024`: Ben Ammar, Belkhir, Popescu, Manzanera & Franchi, "NECO: Neural Collapse Based Out-of-Distribution
  Detection", ICLR 2024; code released at gitlab.com/drti/neco.
* `lee2018`: Lee, Lee, Lee & Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
  Attacks", NeurIPS 2018. Mahalanobis distances with one covariance for all classes.
* `hendrycks2022`: Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022. The
  largest logit, to compare with.
"""

import math

import torch
from torch import Tensor

from nc_probe.moments.blocks import block_rows
from nc_probe.moments.precision import float64_context

__all__ = ["Detector", "auroc", "false_positive_rate", "orthogonality"]


class Detector:
    """Scores of features by what is known of the classes, in float64.

    * `neco` = ||V^T z|| / ||z|| with z_j = (x_j - mu_j) / sigma_j, mu and sigma those of all samples, and V (d, q) the
      first q principal components of z. At collapse z of a known sample lies within the span of K - 1 directions, and
      its score is 1; of a sample that is orthogonal to it, 0. Without `standardize` sigma is 1. A feature that is the
      same for all known samples, up to rounding, has sigma 1, as in scikit-learn's StandardScaler. `ammar2024`.
    * `nearest_mean` = -min_k ||x - mu_k||.
    * `mahalanobis` = -min_k ((x - mu_k)^T S_W^+ (x - mu_k))^(1/2); as detectors, a distance and its square are one. The
      pseudo-inverse leaves out eigenvalues that may be rounding of the features. `lee2018`.
    * `max_logit` = max_k w_k . x + b_k. `hendrycks2022`.
    * `neco_max_logit`, their product, which `ammar2024` has for all networks but ResNets.

    Args:
        means: (m, d) class means mu_k, of the classes with samples.
        center: (d,) mu_G.
        within: (d, d) S_W.
        total: (d, d) S_T.
        weight: (K, d), or None without a classifier.
        bias: (K,) or None.
        components: q in 1..d.
        standardize: whether sigma is the standard deviation of all samples.
        dtype: precision that the features came in.

    Attributes:
        rank: of S_W^+. If 0, there is no `mahalanobis`.
        names: of the scores.
    """

    def __init__(
        self,
        means: Tensor,
        center: Tensor,
        within: Tensor,
        total: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        components: int,
        standardize: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.center, self.weight, self.bias = center, weight, bias
        rounding = max(torch.finfo(dtype).eps / 2, 2.0**-48) ** 2  # of the features, of their sums in float64
        with float64_context(center.device):
            self._means = means - center
            variance = total.diagonal()
            same = variance <= rounding * (variance + center.square())
            self._scale = torch.where(same, 1.0, variance.sqrt()) if standardize else torch.ones_like(variance)
            standardized = total / self._scale / self._scale[:, None]
            self._components = torch.linalg.eigh(standardized)[1][:, -components:]
            values, vectors = torch.linalg.eigh(within)
            power = float(total.trace() + center.square().sum())
            floor = max(rounding * power, 8 * len(within) * torch.finfo(within.dtype).eps * float(values[-1]))
            kept = values > floor
            self.rank = int(kept.sum())
            self._whitening = vectors[:, kept] / values[kept].sqrt()
            self._white_means = self._means @ self._whitening
        self.names = ["neco", "nearest_mean"] + ["mahalanobis"] * (self.rank > 0)
        self.names += ["max_logit", "neco_max_logit"] * (weight is not None)

    def scores(self, features: Tensor) -> Tensor:
        """Compute the scores (S, B) float64, in the order of `names`, of features (B, d) of any precision."""
        with float64_context(self.center.device):
            parts = features.detach().split(block_rows(self.center.device, features.shape[1]))
            return torch.cat([self._scores(part.to(self.center)) for part in parts], 1)

    def _scores(self, x: Tensor) -> Tensor:
        y = x - self.center
        z = y / self._scale
        length = z.norm(dim=1)
        # The centre itself, which no direction has, is as far from the classes as a sample can be.
        neco = torch.where(length > 0, (z @ self._components).norm(dim=1) / length, 0.0)
        found = [neco, -_to_nearest(y, self._means)]
        if self.rank:
            found.append(-_to_nearest(y @ self._whitening, self._white_means))
        if self.weight is not None:
            logits = x @ self.weight.T if self.bias is None else torch.addmm(self.bias, x, self.weight.T)
            found += [logits.amax(1), neco * logits.amax(1)]
        return torch.stack(found)


def orthogonality(means: Tensor, unknown: Tensor) -> float:
    """NC5: mean over classes of |cos(mu_k, mu)|, mu the mean of the features of no class; neither is centred.

    Range [0, 1]; 0 if the mean of the unknown is orthogonal to every class mean. `ammar2024`, and `rhubarbwu`'s
    orthogonality_deviation.

    Args:
        means: (m, d) mu_k.
        unknown: (d,) mu.
    """
    return float((means @ unknown / (means.norm(dim=1) * unknown.norm())).abs().mean())


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Area under the ROC curve: the probability that a known sample scores higher than one of no class, ties by half.

    Counted in integers, so exactly and in any order.

    Args:
        known: (n,) scores.
        unknown: (m,) scores.
    """
    ordered = unknown.sort().values
    below = torch.searchsorted(ordered, known).sum() + torch.searchsorted(ordered, known, right=True).sum()
    return int(below) / (2 * len(known) * len(unknown)) if len(known) and len(unknown) else math.nan


def false_positive_rate(known: Tensor, unknown: Tensor, *, recall: tuple[int, int] = (95, 100)) -> float:
    """Share of the unknown samples taken for known at the highest threshold that keeps a share of the known: FPR95.

    Args:
        known: (n,) scores.
        unknown: (m,) scores.
        recall: the share as a fraction of integers, of which no rounding decides how many samples it is.
    """
    if not len(known) or not len(unknown):
        return math.nan
    kept = -(-recall[0] * len(known) // recall[1])
    threshold = known.sort(descending=True).values[kept - 1]
    return int((unknown >= threshold).sum()) / len(unknown)


def _to_nearest(rows: Tensor, means: Tensor) -> Tensor:
    """Distance of rows (B, d) to the nearest of means (m, d): found by expanded squares, then taken by differences."""
    nearest = torch.addmm(means.square().sum(1) / 2, rows, means.T, alpha=-1).argmin(1)
    return (rows - means[nearest]).norm(dim=1)
