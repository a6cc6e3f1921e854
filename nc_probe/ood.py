"""Samples of no class: whether they are orthogonal to the class means (NC5), and how well collapse tells them apart."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from nc_probe.measures.detection import Detector, auroc, false_positive_rate, orthogonality
from nc_probe.moments import ranks
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.precision import cpu_by_default
from nc_probe.moments.validation import as_tensor, check_batch, check_samples, validate_features
from nc_probe.probe import NCProbe

__all__ = ["OODProbe", "OODReport"]

NAN = math.nan


@dataclass(frozen=True)
class OODReport:
    """How far samples of no class (out of distribution) are from those of the classes, which are called known.

    NaN stands for what is absent or undefined. `nc_probe.measures.detection` has the formulas.

    Attributes:
        known, unknown: samples of the classes, and of none, that were scored.
        known_source: where the known ones came from.
        num_classes: K, of the classes with samples.
        center: "balanced" or "empirical", by which means and covariances were weighted.
        nc5: mean |cos| of the class means and the mean of the unknown; 0 if they are orthogonal.
        neco_components: dimension of the span that NECO projects on.
        mahalanobis_rank: of the inverse of the within-class covariance.
        auroc: by score, the probability that a known sample scores higher than an unknown one. 1 is best, 1/2 chance.
        fpr95: by score, share of the unknown that pass where 95 % of the known do. 0 is best.
    """

    known: int
    unknown: int
    known_source: str
    num_classes: int
    center: str
    nc5: float = NAN
    neco_components: int = 0
    mahalanobis_rank: int = 0
    auroc: Mapping[str, float] = field(default_factory=dict)
    fpr95: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: finite numbers, strings, None for what is absent."""

        def jsonable(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: jsonable(v) for name, v in value.items()}
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {f.name: jsonable(getattr(self, f.name)) for f in fields(self)}

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """List every number that is there by name, for a tracker: `nc5`, `auroc/neco`, `fpr95/neco`.

        Args:
            prefix: before each name, e.g. "ood/".
        """
        out: dict[str, float] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Mapping):
                out |= {f"{prefix}{f.name}/{name}": float(v) for name, v in value.items()}
            elif isinstance(value, int | float):
                out[prefix + f.name] = float(value)
        return {name: value for name, value in out.items() if not math.isnan(value)}

    def __str__(self) -> str:
        lines = [f"NC5  |cos| of class means and OOD mean  {self.nc5:.4g}", f"{'score':<16}{'AUROC':>8}{'FPR95':>8}"]
        lines += [f"{name:<16}{self.auroc[name]:>8.4f}{self.fpr95[name]:>8.4f}" for name in self.auroc]
        lines.append(
            f"{self.known} known samples ({self.known_source}), {self.unknown} of no class; center {self.center}"
        )
        lines.append(f"NECO of {self.neco_components} components, Mahalanobis of rank {self.mahalanobis_rank}")
        return "\n".join(lines)


class OODProbe:
    """Score samples of no class by what a pass over those of the classes has found.

        with NCProbe(model) as probe:           # samples of the classes, those trained on
            for images, labels in loader:
                model(images)
                probe.update(labels)
        with OODProbe(probe) as ood:
            for images in held_out_loader:      # of the classes, not trained on: as fair as accuracy on them
                model(images)
                ood.update_known()
            for images in ood_loader:           # of no class
                model(images)
                ood.update()
        print(ood.compute())

    >>> import torch
    >>> from nc_probe import NCProbe, OODProbe
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    >>> with NCProbe(model) as probe:
    ...     logits = model(torch.tensor([[9.0, 0, 0, 0], [8, 1, 0, 0], [0, 9, 0, 0], [1, 8, 0, 0]]))
    ...     probe = probe.update([0, 0, 1, 1])
    >>> with OODProbe(probe) as ood:
    ...     logits = model(torch.tensor([[0, 0, 5.0, 1], [0, 0, 1, 5]]))
    ...     ood = ood.update()
    >>> report = ood.compute()
    >>> report.known, report.unknown, report.nc5, report.auroc["nearest_mean"]
    (4, 2, 0.0, 1.0)

    Where no known samples are shown, those of the pass are scored, if their features were kept: trained on, they
    flatter every score. The scores and what they rest on are float64; a score of each sample is kept, so that AUROC and
    FPR95 are exact, in any order of samples and on any number of ranks.

    Args:
        probe: after its pass. Means and covariances are weighted by its `center`: the published scores, which weigh by
            samples, are those of "empirical", and on balanced data of both.
        components: of NECO. Default: K - 1, the dimension of the simplex of the K classes with samples.
        standardize: whether NECO divides each feature by its standard deviation, as its released code does but for
            features that have collapsed well.
        sync: over all ranks, every one of which must enter and call `compute`; or this one alone.

    Raises:
        ValueError: a bad argument; on entering, a pass without samples, or without the within-class covariance.
    """

    @cpu_by_default()
    def __init__(
        self, probe: NCProbe, *, components: int | None = None, standardize: bool = True, sync: bool = True
    ) -> None:
        if components is not None and (isinstance(components, bool) or components < 1):
            raise ValueError(f"components must be at least 1, got {components}")
        self.probe, self.components, self.standardize, self.sync = probe, components, standardize, sync
        self._attached: contextlib.AbstractContextManager[Any] | None = None
        self._detector: Detector | None = None

    @cpu_by_default()
    def __enter__(self) -> Self:
        if self._attached is not None:
            raise ValueError("the OOD probe is already attached: enter it once")
        measurement, within = self.probe.covariance(sync=self.sync)
        present = measurement.present.to(measurement.origin.device)
        means, (_, d) = measurement.moments.mean[present], measurement.moments.mean.shape
        components = min(len(means) - 1, d) if self.components is None else self.components
        if not 1 <= components <= d:
            raise ValueError(
                f"components must be in 1..{d}, the length of a feature, got {components} with {len(means)} classes"
            )
        self._detector = Detector(
            means,
            measurement.origin,
            within,
            measurement.total(within),
            measurement.weight,
            measurement.bias,
            components=components,
            standardize=self.standardize,
            dtype=measurement.features_dtype,
        )
        self._means, self._components = means, components
        self._mean = ClassMoments(1, d, scatter=False, device=means.device)
        self._known: list[Tensor] = []
        self._unknown: list[Tensor] = []
        attached = self.probe.attached()
        attached.__enter__()
        self._attached = attached
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._attached is not None
        attached, self._attached = self._attached, None
        attached.__exit__(None, None, None)

    @property
    def detector(self) -> Detector:
        """What was fitted to the pass on entering.

        Raises:
            ValueError: the probe was not entered yet.
        """
        if self._detector is None:
            raise ValueError("scores need a pass: enter `with OODProbe(probe) as ood:` first")
        return self._detector

    @cpu_by_default()
    def update(self, labels: Tensor | Sequence[int] | None = None, mask: Tensor | Sequence[bool] | None = None) -> Self:
        """Add the samples of the last forward pass, which are of no class.

        Args:
            labels: (B,) if the loader gives some: none of them may be one of the classes 0..K-1. Labels of another
                data set, whose numbers mean nothing here, are left out.
            mask: (B,) bool, False for a sample that is not to be counted.

        Raises:
            ValueError: labels of the classes, or as for `NCProbe.update`.
        """
        features = self._received(mask, None if labels is None else as_tensor("labels", labels))
        self._unknown.append(self.detector.scores(features).cpu())
        self._mean.update(features, torch.zeros(len(features), dtype=torch.int64))
        return self

    @cpu_by_default()
    def update_known(self, mask: Tensor | Sequence[bool] | None = None) -> Self:
        """Add the samples of the last forward pass, which are of the classes.

        Args:
            mask: (B,) bool, False for a sample that is not to be counted.

        Raises:
            ValueError: as for `NCProbe.update`.
        """
        self._known.append(self.detector.scores(self._received(mask, None)).cpu())
        return self

    @cpu_by_default()
    def scores(self) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
        """Return scores by name, (n,) of known and (m,) of unknown samples, and where the known samples came from.

        In no order that means anything; over all ranks, every one of which must call it.

        Raises:
            ValueError: there are no unknown samples, or no known ones and the features of the pass are not kept.
        """
        detector = self.detector
        known, unknown, source = self._gathered(self._known), self._gathered(self._unknown), "shown"
        if not known.shape[1]:
            if self.probe.gave_up_features(sync=self.sync):
                raise ValueError(
                    "known samples must be shown by update_known, as the features of the pass are not kept"
                )
            kept = [detector.scores(features).cpu() for features, _ in self.probe.kept()]
            known, source = self._gathered(kept), "those of the pass"
        if not unknown.shape[1]:
            raise ValueError("compute needs at least one sample of no class: call update first")
        if not (known.isfinite().all() and unknown.isfinite().all()):
            raise ValueError("features must be finite, got NaN or infinity, or what overflows in a score")
        return {name: (known[i], unknown[i]) for i, name in enumerate(detector.names)}, source

    @cpu_by_default()
    def compute(self) -> OODReport:
        """Make the report.

        Raises:
            ValueError: as for `scores`.
        """
        pairs, source = self.scores()
        mean = self._mean.sync() if self.sync else self._mean
        mean.check()
        known, unknown = pairs["neco"]
        return OODReport(
            known=len(known),
            unknown=len(unknown),
            known_source=source,
            num_classes=len(self._means),
            center=self.probe.center,
            nc5=orthogonality(self._means, mean.mean[0]),
            neco_components=self._components,
            mahalanobis_rank=self.detector.rank,
            auroc={name: auroc(*pair) for name, pair in pairs.items()},
            fpr95={name: false_positive_rate(*pair) for name, pair in pairs.items()},
        )

    def _received(self, mask: Tensor | Sequence[bool] | None, labels: Tensor | None) -> Tensor:
        """Return the features of the last forward pass, of the samples that count."""
        if self._attached is None:
            raise ValueError("update must be called inside `with OODProbe(probe) as ood:`")
        features = self.probe.received()
        shown = None if mask is None else as_tensor("mask", mask)
        check_samples(len(features), torch.zeros(len(features)) if labels is None else labels, shown)
        if labels is not None:
            labels = labels if shown is None else labels[shown.to(labels.device)]
            K = self.probe.num_classes
            if bool(((labels >= 0) & (labels < K)).any()):
                raise ValueError(
                    f"labels of unknown samples must be none of the classes 0..{K - 1}, got "
                    f"{int(labels.min())}..{int(labels.max())}: leave out labels of another data set"
                )
        features = features if shown is None else features[shown.to(features.device)]
        check_batch(features, torch.zeros(len(features), dtype=torch.int64), self._means.shape[1])
        validate_features(features, batch=self._mean.batches)
        return features

    def _gathered(self, parts: Sequence[Tensor]) -> Tensor:
        """Put scores (S, B) of batches side by side, of all ranks in their order or of this one: (S, n)."""
        here = torch.cat([torch.zeros(len(self.detector.names), 0, dtype=torch.float64), *parts], 1)
        if not self.sync:
            return here
        sizes = [int(size) for (size,) in ranks.broadcast_each([torch.tensor(here.shape[1])])]
        padded = torch.nn.functional.pad(here, (0, max(sizes) - here.shape[1]))
        everyone = ranks.broadcast_each([padded])
        return torch.cat([scores[:, :size] for size, (scores,) in zip(sizes, everyone, strict=True)], 1)
