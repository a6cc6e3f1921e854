"""From moments to the numbers of a report: the classes, weights and reference that go into each measure."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nc_probe.measures import formulas, pairwise
from nc_probe.measures.agreement import Agreement, shares
from nc_probe.measures.conventions import CONVENTIONS, INVERSES, SAME_IF_BALANCED, check_conventions
from nc_probe.measures.geometry import check_weight_decay, orthogonal_frame, seli, simplex_etf
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.decisions import Scores
from nc_probe.moments.precision import float64_context
from nc_probe.moments.second_pass import SecondPassStats

__all__ = ["CENTERS", "Measurement", "finest_partition", "check_groups"]

CENTERS = ("balanced", "empirical")


def check_groups(groups: Mapping[str, Iterable[int]] | None, num_classes: int) -> dict[str, Tensor]:
    """The groups as sorted int64 tensors.

    Raises:
        ValueError: a group names a class twice, or one outside 0..num_classes-1, or what is no class.
    """
    checked = {}
    if groups is not None and not isinstance(groups, Mapping):
        raise ValueError(f"groups must be a mapping of names to classes, got a {type(groups).__name__}")
    for name, classes in (groups or {}).items():
        try:
            listed = sorted(_class_number(k) for k in classes)
        except TypeError:
            kind = type(classes).__name__
            raise ValueError(
                f"groups[{name!r}] must be different classes in 0..{num_classes - 1}, got a {kind} of other things"
            ) from None
        if len(set(listed)) < len(listed) or (listed and not 0 <= listed[0] <= listed[-1] < num_classes):
            raise ValueError(f"groups[{name!r}] must be different classes in 0..{num_classes - 1}, got {listed}")
        checked[name] = torch.tensor(listed, dtype=torch.int64)
    return checked


def _class_number(value: Any) -> int:
    """Return an integer as one, but for a mask's True and False, which are no classes.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        raise TypeError
    return operator.index(value)


def finest_partition(groups: Mapping[str, Sequence[int]], num_classes: int) -> Tensor:
    """(K,) the finest partition that builds every group: classes in the same groups share a number."""
    membership = torch.zeros(num_classes, len(groups) + 1, dtype=torch.int64)
    for column, classes in enumerate(groups.values()):
        membership[classes, column] = 1
    return membership.unique(dim=0, return_inverse=True)[1]


class Measurement:
    """What the report of all classes and those of the groups share.

    NC1 and the ranks of the features rest on the within-class scatter: that of the moments or, where they have none,
    what a second look at the features finds of `bases` and `class_weights`. Variances may be set by then, not before.

    Attributes:
        class_weights: (K,) with S_W = sum_k class_weights[k] S_k.
    """

    def __init__(
        self,
        moments: ClassMoments,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        center: str = "balanced",
        groups: Mapping[str, Iterable[int]] | None = None,
        conventions: Iterable[str] = (),
        weight_decay: float = 0.0,
        features_dtype: torch.dtype = torch.float32,
    ) -> None:
        if center not in CENTERS:
            raise ValueError(f"center must be one of {CENTERS}, got {center!r}")
        K, d = moments.num_classes, moments.num_features
        if weight is not None and weight.shape != (K, d):
            raise ValueError(f"weight must have shape {(K, d)} as the moments have, got {tuple(weight.shape)}")
        if bias is not None and bias.shape != (K,):
            raise ValueError(f"bias must have shape {(K,)}, got {tuple(bias.shape)}")
        check_conventions(conventions)
        moments.check()
        if not moments.count.any():
            raise ValueError("moments must hold at least one sample, got none: call update first")
        self.moments, self.center, self.features_dtype = moments, center, features_dtype
        self.weight_decay = check_weight_decay(weight_decay)
        self.members, self.papers = check_groups(groups, K), tuple(conventions)
        with float64_context(moments.device):
            self.weight = None if weight is None else weight.detach().to(moments.mean)
            self.bias = None if bias is None else bias.detach().to(moments.mean)
            self.present = (moments.count > 0).cpu()
            self.num_present = int(self.present.sum())
            n = moments.count.double()
            mass = n if center == "empirical" else (n > 0).double()
            self.pi = mass / mass.sum()
            self.class_weights = self.pi / n.clamp(min=1)
            self.origin = self.pi @ moments.mean
            self.centered = moments.mean - self.origin
            # Geometries of the classes with samples, and where in them a class stands.
            self.seli, self.frame = seli(moments.count), orthogonal_frame(moments.count, weight_decay=self.weight_decay)
            self.position = self.present.cumsum(0) - 1
            self.magnitude = float((self.pi @ moments.mean.square().sum(1)).sqrt())
            # S_B^+ of all classes (None), of each group, and by each convention that has one.
            everything = torch.arange(K)
            self._inverses: dict[str | None, formulas.BetweenInverse] = {None: self._inverse(everything)}
            self._inverses |= {name: self._inverse(classes) for name, classes in self.members.items()}
            if not self._inverses[None].rank:
                self.centered.zero_()  # all means coincide, but for the rounding of their centre
            # Where every class counts once that of a paper may be ours.
            same = SAME_IF_BALANCED if bool((n[n > 0] == n.max()).all()) else SAME_IF_BALANCED - {"zhu2021"}
            self._ours = {p for p in self.papers if center == "balanced" and p in same}
            self._published = {p: INVERSES[p](moments) for p in self.papers if p in INVERSES and p not in self._ours}

    @property
    def bases(self) -> list[tuple[Tensor, Tensor]]:
        """(B (d, r), classes) whose projected tr(B^T S_k B) are asked for."""
        classes = {None: torch.arange(self.moments.num_classes), **self.members}
        own = [(inverse.basis, classes[name]) for name, inverse in self._inverses.items()]
        return own + [(inverse.basis, classes[None]) for inverse in self._published.values()]

    def values(
        self,
        agreement: Agreement | None = None,
        looked: SecondPassStats | None = None,
        within: Tensor | None = None,
        *,
        ranks: bool = True,
    ) -> dict[str, Any]:
        """Compute the fields of a report by name; those of the groups' reports, by group, under "groups".

        Args:
            agreement: samples counted with the features at hand.
            looked: at every sample again, for `bases`.
            within: (d, d) their sum_k class_weights[k] S_k, for the ranks of the features.
            ranks: whether these are wanted.
        """
        with float64_context(self.moments.device):
            names = [*self._inverses, *self._published]
            projected = dict(zip(names, looked.projected, strict=True)) if looked else {}
            projected |= {paper: projected[None] for paper in self._ours} if looked else {}
            inverses = self._inverses | self._published | dict.fromkeys(self._ours, self._inverses[None])
            projected = {name: value for name, value in projected.items() if inverses[name].rank}
            whole = self._part(None, torch.arange(self.moments.num_classes), agreement, projected)
            parts = {name: self._part(name, classes, agreement, projected) for name, classes in self.members.items()}
            published = {
                paper: CONVENTIONS[paper](
                    self.moments, self.weight, self.bias, agreement, self.members, projected.get(paper)
                )
                for paper in self.papers
            }
            found = self._spectrum(within) if ranks else {}
        precision = {"nc1_precision": str(looked.dtype).removeprefix("torch.")} if looked else {}
        parts = {name: part | precision for name, part in parts.items()}
        return whole | found | precision | {"conventions": published, "groups": parts}

    def _power(self) -> float:
        """E ||x||^2."""
        return self.magnitude**2 + float(self.class_weights @ self.moments.trace)

    def _inverse(self, classes: Tensor) -> formulas.BetweenInverse:
        shown = classes[self.present[classes]]
        pi = self.pi[shown] / self.pi[shown].sum()
        # The centring takes one direction from all classes together, none from a part of them.
        most = min(len(shown), self.num_present - 1)
        return formulas.between_inverse(self.centered[shown], pi, max_rank=most, magnitude=self.magnitude)

    def total(self, within: Tensor) -> Tensor:
        """Add S_B (d, d) to S_W."""
        between = self.pi.sqrt()[:, None] * self.centered
        return within.addmm(between.T, between)

    def _spectrum(self, within: Tensor | None) -> dict[str, Any]:
        """Ranks of the features of all classes; `within` is S_W, if known."""
        if within is None:
            if not self.moments.num_scatters:
                return {}
            within = self.moments.within_class_scatter(self.class_weights)
        found = formulas.spectrum(self.total(within), self.origin, dtype=self.features_dtype)
        return {
            "feature_rank": found.rank,
            "stable_rank": found.stable_rank,
            "participation_ratio": found.participation_ratio,
        }

    def _part(
        self, name: str | None, classes: Tensor, agreement: Agreement | None, projected: Mapping[Any, Tensor]
    ) -> dict[str, Any]:
        """Of all classes (no name), or of a group."""
        shown = classes[self.present[classes]]
        n = self.moments.count[shown]
        values: dict[str, Any] = {
            "center": self.center,
            "weight_decay": self.weight_decay,
            "classes": tuple(shown.tolist()),
            "samples": int(n.sum()),
            "num_classes": self.num_present,
            "class_count": tuple(n.tolist()),
        }
        if len(shown):
            values |= self._means(shown) | self._within(name, shown, projected.get(name))
            if self.weight is not None:
                values |= self._classifier(shown)
        if agreement is not None:
            values |= shares(agreement, shown, n, self.pi[shown])
        return values

    def _means(self, shown: Tensor) -> dict[str, Any]:
        """What the class means and their variances say."""
        m, K = len(shown), self.num_present
        M, n = self.centered[shown], self.moments.count[shown].double()
        pi = self.pi[shown] / self.pi[shown].sum()
        variance = self.moments.trace[shown] / n
        values = {
            "nc1_trace": formulas.trace_quotient(pi @ variance, pi @ M.square().sum(1)),
            "nc2_norm": formulas.equinorm(M),
            "mean_norm": formulas.mean_norm(M),
            "mean_square_norm": float(pi @ (variance + self.moments.mean[shown].square().sum(1))),
            "mean_cosine": pairwise.mean_cosine(M),
            "class_variance": tuple(variance.tolist()),
            "class_norm": tuple(M.norm(dim=1).tolist()),
            "means": M.cpu(),
        }
        if m > 1:
            position, norm = self.position[shown], pairwise.gram_norm(M)
            pairs = pairwise.compare_means(M, variance, num_classes=K)
            values |= {"cdnv": pairs.cdnv, "nc2_angle": pairs.angle, "nc2_maxangle": pairs.maxangle}
            values |= {"gnc2_log": pairs.log_gap, "gnc2_riesz": pairs.riesz_gap}
            values["nc2_etf"] = pairwise.gram_distance(M, simplex_etf(K, size=m), norm=norm)
            values["nc2_seli"] = pairwise.gram_distance(M, self.seli[1].subset(position), norm=norm)
            values["nc2_gof"] = pairwise.gram_distance(self.moments.mean[shown], self.frame[1].subset(position))
        return values

    def _within(self, name: str | None, shown: Tensor, spread: Tensor | None) -> dict[str, Any]:
        """NC1 of all classes (no name) or of a group; `spread` (K,) is tr(B^T S_k B), if known."""
        inverse, m, n = self._inverses[name], len(shown), self.moments.count[shown].double()
        values: dict[str, Any] = {"nc1_rank": inverse.rank, "nc1_condition": inverse.condition}
        values["nc1_unresolved"] = formulas.unresolved(inverse, self._power(), dtype=self.features_dtype)
        weights = self.pi[shown] / self.pi[shown].sum() / n
        own = spread is None
        spread = self.moments.projected_scatter_trace(inverse.basis, shown) if spread is None else spread[shown]
        if inverse.rank == 0:
            return values
        if spread is not None:
            values["nc1"] = float(weights @ spread) / m
            values["class_nc1"] = tuple((spread / n / m).tolist())
            values["nc1_source"] = "a scatter for each class" if own else "a second look at the features"
            return values
        per_sample = torch.zeros_like(self.pi).index_copy_(0, shown.to(self.pi.device), weights)
        # Moments pooled over other classes too cannot give a part; for the whole it is an error, which is explained.
        if self.moments.supports_weights(per_sample) or (name is None and self.moments.num_scatters):
            values["nc1"] = formulas.nc1(inverse, self.moments.within_class_scatter(per_sample), m)
            values["nc1_source"] = "a pooled scatter"
        return values

    def _classifier(self, shown: Tensor) -> dict[str, Any]:
        """What the classifier's rows of classes with samples say, alone and beside the class means."""
        assert self.weight is not None
        W, M, K, position = self.weight[shown], self.centered[shown], len(self.weight), self.position[shown]
        cosines, norm = formulas.self_duality_cosines(W, M), pairwise.gram_norm(W)
        bias = self.weight.new_zeros(K) if self.bias is None else self.bias
        chosen = Scores(self.weight, bias).highest(self.moments.mean[shown])
        values: dict[str, Any] = {
            "nc2_norm_weight": formulas.equinorm(W),
            "mean_norm_weight": formulas.mean_norm(W),
            "mean_square_norm_weight": float(W.square().sum(1).mean()),
            "mean_cosine_weight": pairwise.mean_cosine(W),
            "nc2_seli_weight": pairwise.gram_distance(W, self.seli[0].subset(position), norm=norm),
            "nc2_gof_weight": pairwise.gram_distance(W, self.frame[0].subset(position), norm=norm),
            "class_norm_weight": tuple(W.norm(dim=1).tolist()),
            "weight": W.cpu(),
            "nc3": formulas.self_duality(W, M),
            "nc3_cosine": float(cosines.mean()),
            "class_nc3_cosine": tuple(cosines.tolist()),
            "mean_accuracy": float((chosen.cpu() == shown).double().mean()),
        }
        if len(shown) > 1:
            values["nc2_angle_weight"], values["nc2_maxangle_weight"] = pairwise.equiangle(W, num_classes=K)
            values["nc2_etf_weight"] = pairwise.gram_distance(W, simplex_etf(K, size=len(W)), norm=norm)
        return values
