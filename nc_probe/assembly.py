"""From moments to a report: which classes, which weights, which reference go into each measure."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nc_probe import measures, pairwise
from nc_probe.conventions import CONVENTIONS
from nc_probe.geometry import orthogonal_frame, seli, simplex_etf
from nc_probe.moments import ClassMoments, exact_arithmetic
from nc_probe.report import NAN, Agreement, CollapseReport

__all__ = ["CENTERS", "check_groups", "measure"]

CENTERS = ("balanced", "empirical")


def measure(
    moments: ClassMoments,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    center: str = "balanced",
    groups: Mapping[str, Iterable[int]] | None = None,
    agreement: Agreement | None = None,
    conventions: Iterable[str] = (),
    features_dtype: torch.dtype = torch.float32,
) -> CollapseReport:
    """Measures collapse from moments and a linear classifier.

    Classes without samples are left out. On several ranks give it `moments.sync()`.

    Args:
        moments: of the features that enter the classifier.
        weight: (K, d), or None for features without a classifier: what needs it is then absent.
        bias: (K,); it decides `mean_accuracy` only.
        center: "balanced" or "empirical", see CollapseReport.
        groups: classes of each group by name. A group's measures take its classes only, about the centre of all, and
            compare with the part of the K-class geometry that the group should be.
        agreement: samples counted with the features at hand, for NC4 and the accuracies.
        conventions: papers whose own formulas to add, of `nc_probe.conventions`.
        features_dtype: precision that the features came in, which decides what counts in `feature_rank`.

    Raises:
        ValueError: a bad argument, no samples, or moments that do not resolve the weighting.
    """
    if center not in CENTERS:
        raise ValueError(f"center must be one of {CENTERS}, got {center!r}")
    K, d = moments.num_classes, moments.num_features
    if weight is not None and weight.shape != (K, d):
        raise ValueError(f"weight must have shape {(K, d)} as the moments have, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (K,):
        raise ValueError(f"bias must have shape {(K,)}, got {tuple(bias.shape)}")
    members, papers = check_groups(groups, K), tuple(conventions)
    for paper in papers:
        if paper not in CONVENTIONS:
            raise ValueError(f"conventions must be among {tuple(CONVENTIONS)}, got {paper!r}")
    moments.check()
    if not moments.count.any():
        raise ValueError("moments must hold at least one sample, got none: call update first")
    with exact_arithmetic(moments.device):
        if weight is not None:
            weight = weight.detach().to(moments.mean)
        if bias is not None:
            bias = bias.detach().to(moments.mean)
        measured = _Pass(moments, weight, bias, center, agreement)
        report = measured.report(torch.arange(K), whole=True)
        spectrum = measured.spectrum(features_dtype)
        parts = {name: measured.report(classes, whole=False) for name, classes in members.items()}
        published = {paper: CONVENTIONS[paper](moments, weight, bias, agreement, members) for paper in papers}
    return dataclasses.replace(
        report,
        feature_rank=spectrum.rank,
        stable_rank=spectrum.stable_rank,
        participation_ratio=spectrum.participation_ratio,
        conventions=published,
        groups=parts,
    )


def check_groups(groups: Mapping[str, Iterable[int]] | None, num_classes: int) -> dict[str, Tensor]:
    """The groups as sorted int64 tensors.

    Raises:
        ValueError: a group names a class twice, or one outside 0..num_classes-1.
    """
    checked = {}
    for name, classes in (groups or {}).items():
        listed = sorted(int(k) for k in classes)
        if len(set(listed)) < len(listed) or (listed and not 0 <= listed[0] <= listed[-1] < num_classes):
            raise ValueError(f"groups[{name!r}] must be different classes in 0..{num_classes - 1}, got {listed}")
        checked[name] = torch.tensor(listed, dtype=torch.int64)
    return checked


class _Pass:
    """What the report of all classes and those of the groups share."""

    def __init__(
        self,
        moments: ClassMoments,
        weight: Tensor | None,
        bias: Tensor | None,
        center: str,
        agreement: Agreement | None,
    ) -> None:
        self.moments, self.weight, self.bias, self.center, self.agreement = moments, weight, bias, center, agreement
        self.present = (moments.count > 0).cpu()
        self.num_present = int(self.present.sum())
        n = moments.count.double()
        mass = n if center == "empirical" else (n > 0).double()
        self.pi = mass / mass.sum()
        self.per_sample = self.pi / n.clamp(min=1)
        self.origin = self.pi @ moments.mean
        self.centered = moments.mean - self.origin
        # Geometries of the classes with samples, and where in them a class stands.
        self.seli, self.frame = seli(moments.count), orthogonal_frame(moments.count)
        self.position = self.present.cumsum(0) - 1
        self.magnitude = float((self.pi @ moments.mean.square().sum(1)).sqrt())

    def spectrum(self, dtype: torch.dtype) -> measures.Spectrum:
        """Ranks of the features of all classes."""
        between = self.pi.sqrt()[:, None] * self.centered
        total = self.moments.within(self.per_sample).addmm_(between.T, between)
        return measures.spectrum(total, self.origin, dtype=dtype)

    def report(self, classes: Tensor, *, whole: bool) -> CollapseReport:
        shown = classes[self.present[classes]]
        n = self.moments.count[shown]
        values: dict[str, Any] = {
            "center": self.center,
            "classes": tuple(shown.tolist()),
            "samples": int(n.sum()),
            "class_count": tuple(n.tolist()),
        }
        if len(shown):
            values |= self._means(shown, whole)
        if self.weight is not None and len(classes):
            values |= self._classifier(classes, shown)
        if self.agreement is not None:
            values |= self._agreement(self.agreement, shown)
        return CollapseReport(**values)

    def _means(self, shown: Tensor, whole: bool) -> dict[str, Any]:
        """What the class means and their scatter say."""
        m, K = len(shown), self.num_present
        M, n = self.centered[shown], self.moments.count[shown].double()
        pi = self.pi[shown] / self.pi[shown].sum()
        variance = self.moments.trace[shown] / n
        values = {
            "nc1_trace": measures.trace_quotient(pi @ variance, pi @ M.square().sum(1)),
            "cdnv": pairwise.cdnv(M, variance),
            "nc2_norm": measures.equinorm(M),
            "mean_norm": measures.mean_norm(M),
            "mean_cosine": pairwise.mean_cosine(M),
            "class_variance": tuple(variance.tolist()),
            "class_norm": tuple(M.norm(dim=1).tolist()),
            "means": M.cpu(),
        }
        if m > 1:
            position = self.position[shown]
            values["nc2_angle"], values["nc2_maxangle"] = pairwise.equiangle(M, num_classes=K)
            values["gnc2_log"], values["gnc2_riesz"] = pairwise.uniformity_gap(M, num_classes=K)
            values["nc2_etf"] = pairwise.gram_distance(M, simplex_etf(K, size=m))
            values["nc2_seli"] = pairwise.gram_distance(M, self.seli[1].subset(position))
            values["nc2_gof"] = pairwise.gram_distance(self.moments.mean[shown], self.frame[1].subset(position))
        # The centring takes one direction from all classes together, none from a part of them.
        inverse = measures.between_inverse(M, pi, max_rank=min(m, K - 1), magnitude=self.magnitude)
        values |= {"nc1_rank": inverse.rank, "nc1_condition": inverse.condition}

        def nc1(classes: Tensor, weights: Tensor) -> float:
            per_sample = torch.zeros_like(self.pi).index_copy_(0, classes.to(self.pi.device), weights)
            # Moments pooled over other classes too cannot give this part; for the whole it is an error that `within`
            # explains.
            if not whole and not self.moments.resolves(per_sample):
                return NAN
            return measures.nc1(inverse, self.moments.within(per_sample), m)

        values["nc1"] = nc1(shown, pi / n)
        if self.moments.num_scatters == self.moments.num_classes:
            values["class_nc1"] = tuple(nc1(shown[i : i + 1], 1 / n[i : i + 1]) for i in range(m))
        return values

    def _classifier(self, classes: Tensor, shown: Tensor) -> dict[str, Any]:
        """What the classifier says, alone and beside the class means."""
        assert self.weight is not None
        W, K = self.weight[classes], len(self.weight)
        values: dict[str, Any] = {
            "nc2_norm_weight": measures.equinorm(W),
            "mean_norm_weight": measures.mean_norm(W),
            "mean_cosine_weight": pairwise.mean_cosine(W),
        }
        if len(classes) > 1:
            values["nc2_angle_weight"], values["nc2_maxangle_weight"] = pairwise.equiangle(W, num_classes=K)
            values["nc2_etf_weight"] = pairwise.gram_distance(W, simplex_etf(K, size=len(W)))
        if len(shown):
            W, M, position = self.weight[shown], self.centered[shown], self.position[shown]
            values["nc2_seli_weight"] = pairwise.gram_distance(W, self.seli[0].subset(position))
            values["nc2_gof_weight"] = pairwise.gram_distance(W, self.frame[0].subset(position))
            cosines = measures.self_duality_cosines(W, M)
            bias = 0 if self.bias is None else self.bias
            tiles = self.moments.mean[shown].split(pairwise.TILE)
            chosen = torch.cat([(tile @ self.weight.T + bias).argmax(1) for tile in tiles])
            values |= {
                "class_norm_weight": tuple(W.norm(dim=1).tolist()),
                "weight": W.cpu(),
                "nc3": measures.self_duality(W, M),
                "nc3_cosine": float(cosines.mean()),
                "class_nc3_cosine": tuple(cosines.tolist()),
                "mean_accuracy": float((chosen.cpu() == shown).double().mean()),
            }
        return values

    def _agreement(self, counted: Agreement, shown: Tensor) -> dict[str, Any]:
        """Shares of the counted samples."""
        values: dict[str, Any] = {"nc4_source": counted.source}
        if not len(shown):
            return values
        n, pi = self.moments.count[shown].double().cpu(), self.pi[shown].cpu()
        for prefix, hits in (("", counted.correct), ("center_", counted.center_correct)):
            if hits is not None:
                hits = hits.cpu()[shown].double()
                values[f"{prefix}accuracy"] = float(hits.sum() / n.sum())
                values[f"balanced_{prefix}accuracy"] = float((hits / n).mean())
                values[f"class_{prefix}accuracy"] = tuple((hits / n).tolist())
        if counted.agree is not None:
            share = counted.agree.cpu()[shown].double() / n
            values["nc4"] = float((pi * share).sum() / pi.sum())  # 1 exactly if every share is
            values["class_nc4"] = tuple(share.tolist())
        return values
