"""Reports of collapse: the numbers of one pass over the data."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from nc_probe.measures.agreement import Agreement
from nc_probe.measures.assembly import Measurement
from nc_probe.measures.pairwise import cosine_gram
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.precision import cpu_by_default
from nc_probe.output.storage import decode, encode, replace_text
from nc_probe.output.text import as_text

__all__ = ["CollapseReport", "measure"]

NAN = math.nan

# Of files: what they are, and the version of their layout.
FORMAT, VERSION = "nc_probe.CollapseReport", 1

# Up to this many classes `as_dict(per_class=True)` has the Gram matrices: 2 x 10,000 numbers.
GRAM_CLASSES = 100


@dataclass(frozen=True, eq=False)
class CollapseReport:
    """Neural collapse of some classes: all of them, or in `groups` those of a group, about the centre of all.

    NaN stands for what is absent or undefined. Per-class tuples and matrices are in the order of `classes`, which are
    those with samples; so are the rows of the classifier that are measured. `nc_probe.measures` has the formulas.
    SELI and the frame follow from the class counts of the samples seen: measured on the training set, those trained on.
    A group is compared with its part of the geometry of all classes.

    Attributes:
        center: "balanced" (every class counts once in centre, S_W, S_B and NC4) or "empirical" (by its count).
        weight_decay: lambda of the general orthogonal frame compared with.
        classes: the classes reported.
        samples: of these classes.
        num_classes: K of the geometry that they are compared with: all classes with samples.
        nc1: tr(S_W S_B^+)/K, with the rank and the condition of the centred means it rests on.
        nc1_unresolved: directions among them that may be rounding of the features alone, of which NC1 is then made.
        nc1_precision: of the arithmetic behind NC1 and the variances: float64, or float32 where a witness found their
            relative error to be below 5e-7.
        nc1_source: where the scatter for it came from, or why it is absent.
        nc1_trace: tr S_W / tr S_B.
        cdnv: class-distance normalised variance.
        nc2_etf, nc2_etf_weight: distance to the simplex ETF, of class means and of classifier rows.
        nc2_seli, nc2_seli_weight: distance to the simplex-encoded-labels interpolation.
        nc2_gof, nc2_gof_weight: distance to the general orthogonal frame, of class means as they are, not centred.
        nc2_norm, nc2_norm_weight: coefficient of variation of norms.
        nc2_angle, nc2_angle_weight: standard deviation of cosines.
        nc2_maxangle, nc2_maxangle_weight: mean |cos + 1/(K-1)|.
        mean_cosine, mean_cosine_weight: mean of pairwise cosines; 1 if the classes have merged.
        mean_norm, mean_norm_weight: mean norm of centred class means and of classifier rows.
        mean_square_norm, mean_square_norm_weight: mean square norm of features, not centred, and of classifier rows.
        gnc2_log, gnc2_riesz: hyperspherical energy of the class means above that of the simplex ETF of as many.
        nc3: || W/||W|| - M/||M|| ||.
        nc3_cosine: mean cosine of a classifier row and its class mean.
        nc4: share of samples on which classifier and nearest class mean agree, averaged as `center` says.
        nc4_source: where the features for it came from, or why it is absent.
        accuracy, center_accuracy: share of samples that the classifier, and the nearest class mean, get right.
        balanced_accuracy, balanced_center_accuracy: the same, averaged over classes.
        mean_accuracy: share of class means that the classifier puts in their class.
        feature_rank, stable_rank, participation_ratio: of the total covariance S_W + S_B; of all classes only, and of a
            probe only where `spectrum=True` asked for them.
        class_...: per class; the mean of `class_nc1` is nc1 (balanced); it needs a scatter for each class.
        means: (m, d) centred class means, float64 on the CPU.
        weight: (m, d) classifier rows, float64 on the CPU.
        conventions: measures as published, see `nc_probe.measures.conventions`, by paper.
        groups: a report for each group.
        heads: a report for each classifier, of a model with several.
        layers: a report for the features of each layer.
        iterates: a report for the features of each iterate of a solver.
    """

    center: str
    classes: tuple[int, ...]
    samples: int
    num_classes: int = 0
    weight_decay: float = 0.0
    nc1: float = NAN
    nc1_rank: int = 0
    nc1_condition: float = NAN
    nc1_unresolved: int = 0
    nc1_source: str = "absent: no scatter that resolves it"
    nc1_precision: str = "float64"
    nc1_trace: float = NAN
    cdnv: float = NAN
    nc2_etf: float = NAN
    nc2_etf_weight: float = NAN
    nc2_seli: float = NAN
    nc2_seli_weight: float = NAN
    nc2_gof: float = NAN
    nc2_gof_weight: float = NAN
    nc2_norm: float = NAN
    nc2_norm_weight: float = NAN
    nc2_angle: float = NAN
    nc2_angle_weight: float = NAN
    nc2_maxangle: float = NAN
    nc2_maxangle_weight: float = NAN
    mean_cosine: float = NAN
    mean_cosine_weight: float = NAN
    mean_norm: float = NAN
    mean_norm_weight: float = NAN
    mean_square_norm: float = NAN
    mean_square_norm_weight: float = NAN
    gnc2_log: float = NAN
    gnc2_riesz: float = NAN
    nc3: float = NAN
    nc3_cosine: float = NAN
    nc4: float = NAN
    nc4_source: str = "absent: measured from moments alone"
    accuracy: float = NAN
    balanced_accuracy: float = NAN
    center_accuracy: float = NAN
    balanced_center_accuracy: float = NAN
    mean_accuracy: float = NAN
    feature_rank: int | None = None
    stable_rank: float = NAN
    participation_ratio: float = NAN
    class_count: tuple[int, ...] = ()
    class_nc1: tuple[float, ...] = ()
    class_variance: tuple[float, ...] = ()
    class_norm: tuple[float, ...] = ()
    class_norm_weight: tuple[float, ...] = ()
    class_nc3_cosine: tuple[float, ...] = ()
    class_nc4: tuple[float, ...] = ()
    class_accuracy: tuple[float, ...] = ()
    class_center_accuracy: tuple[float, ...] = ()
    means: Tensor | None = field(default=None, repr=False)
    weight: Tensor | None = field(default=None, repr=False)
    conventions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    groups: Mapping[str, "CollapseReport"] = field(default_factory=dict)
    heads: Mapping[str, "CollapseReport"] = field(default_factory=dict)
    layers: Mapping[str, "CollapseReport"] = field(default_factory=dict)
    iterates: Mapping[str, "CollapseReport"] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make a report of its fields by name, in which those of `groups` are such mappings too."""
        return cls(**{**values, "groups": {name: cls(**group) for name, group in values["groups"].items()}})

    @property
    def nc2(self) -> float:
        """The one number for NC2: distance of the class means to the simplex ETF."""
        return self.nc2_etf

    @property
    def gram(self) -> Tensor | None:
        """(m, m) cosines of the centred class means, computed when asked for; None without samples."""
        return None if self.means is None else cosine_gram(self.means)

    @property
    def gram_weight(self) -> Tensor | None:
        """(m, m) cosines of the classifier rows, computed when asked for; None without them."""
        return None if self.weight is None else cosine_gram(self.weight)

    def as_dict(self, *, per_class: bool = False) -> dict[str, Any]:
        """For JSON: finite numbers, strings, None for what is absent; reports within this one nested.

        Args:
            per_class: also the per-class lists, the classes and, for at most 100 of them, the Gram matrices. The means
                and the rows themselves are not for JSON.
        """
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _NESTED:
                out[f.name] = {name: report.as_dict(per_class=per_class) for name, report in value.items()}
            elif f.name == "conventions":
                out[f.name] = {paper: {k: _jsonable(v) for k, v in values.items()} for paper, values in value.items()}
            elif f.name not in ("means", "weight") and (per_class or not isinstance(value, tuple)):
                out[f.name] = _jsonable(value)
        if per_class and len(self.classes) <= GRAM_CLASSES:
            out |= {"gram": _jsonable(self.gram), "gram_weight": _jsonable(self.gram_weight)}
        infinite = [f.name for f in fields(self) if isinstance(v := getattr(self, f.name), float) and math.isinf(v)]
        return out | ({"infinite": infinite} if infinite else {})

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """List every number that is there by name, for a tracker: `nc1`, `minority/nc1`, `layers/layer4/nc1`.

        Args:
            prefix: before each name, e.g. "nc/".
        """
        out: dict[str, float] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _NESTED:
                for name, report in value.items():
                    out |= report.scalars(f"{prefix}{name}/" if f.name == "groups" else f"{prefix}{f.name}/{name}/")
            elif f.name == "conventions":
                out |= {f"{prefix}conventions/{p}/{k}": v for p, values in value.items() for k, v in values.items()}
            elif isinstance(value, int | float):
                out[prefix + f.name] = float(value)
        return {name: value for name, value in out.items() if not math.isnan(value)}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, all of it: the class means and the classifier's rows too.

        A file of that name is replaced by a whole one, or is left as it was.
        """
        document = {"format": FORMAT, "version": VERSION, "report": encode(self)}
        replace_text(Path(path), json.dumps(document, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written, by this version or an older one: what that did not measure is absent.

        Raises:
            ValueError: the file is no report, a damaged one, or one of a newer version.
        """
        try:
            document = json.loads(Path(path).read_text())
            found = document["format"], document["version"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            found = None, None
        if found[0] != FORMAT or type(found[1]) is not int or not 1 <= found[1] <= VERSION:
            raise ValueError(
                f"{path} must be a {FORMAT} of version 1..{VERSION}, got format {found[0]!r}, version {found[1]!r}"
            )
        try:
            return decode(cls, document["report"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} must hold a whole report, got a damaged one: {error!r}") from None

    def __str__(self) -> str:
        return as_text(self, [kind for kind in _NESTED[1:] if getattr(self, kind)])


@cpu_by_default()
def measure(
    moments: ClassMoments,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    center: str = "balanced",
    groups: Mapping[str, Iterable[int]] | None = None,
    agreement: Agreement | None = None,
    conventions: Iterable[str] = (),
    weight_decay: float = 0.0,
    features_dtype: torch.dtype = torch.float32,
) -> CollapseReport:
    """Measure collapse from moments and a linear classifier.

    >>> import torch
    >>> from nc_probe import ClassMoments, measure
    >>> simplex = torch.eye(3) - 1 / 3
    >>> report = measure(ClassMoments(3, 3).update(4 + 2 * simplex, torch.arange(3)), simplex, groups={"rare": [1, 2]})
    >>> round(report.nc2, 6), round(report.nc3, 6), round(report.mean_cosine, 6)
    (0.0, 0.0, -0.5)
    >>> report.groups["rare"].samples, report.accuracy
    (2, nan)

    Classes without samples are left out. On several ranks give it `moments.sync()`.

    Args:
        moments: of the features that enter the classifier.
        weight: (K, d), or None for features without a classifier: what needs it is then absent.
        bias: (K,); it decides `mean_accuracy` only.
        center: "balanced" or "empirical", see CollapseReport.
        groups: classes of each group by name. A group's measures take its classes only, about the centre of all, and
            compare with the part of the K-class geometry that the group should be.
        agreement: samples counted with the features at hand, for NC4 and the accuracies.
        conventions: papers whose own formulas to add, of `nc_probe.measures.conventions`.
        weight_decay: of the general orthogonal frame, see `orthogonal_frame`; its default, 0, is the limit.
        features_dtype: precision that the features came in, which decides what counts in `feature_rank`.

    Raises:
        ValueError: a bad argument, no samples, or moments that do not resolve the weighting.
    """
    measurement = Measurement(
        moments,
        weight,
        bias,
        center=center,
        groups=groups,
        conventions=conventions,
        weight_decay=weight_decay,
        features_dtype=features_dtype,
    )
    return CollapseReport.of(measurement.values(agreement))


_NESTED = ("groups", "heads", "layers", "iterates")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _jsonable(value.tolist())
    if isinstance(value, tuple | list):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
