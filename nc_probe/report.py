"""CollapseReport: the numbers of one pass over the data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Agreement", "CollapseReport"]

NAN = math.nan


class Agreement(NamedTuple):
    """Samples counted per true class, all (K,) integers.

    correct: the classifier is right. center_correct: the nearest class mean is right. agree: both choose the same
    class; these two are None if the features are gone. source: where they came from, or why they are absent.
    """

    correct: Tensor
    center_correct: Tensor | None
    agree: Tensor | None
    source: str


@dataclass(frozen=True, eq=False)
class CollapseReport:
    """Neural collapse of some classes: all of them, or in `groups` those of a group, about the centre of all.

    NaN stands for what is absent or undefined. Per-class tuples and Gram matrices are in the order of `classes`, which
    are those with samples; the other measures of the classifier take its rows for all classes. `nc_probe.measures` has
    the formulas.

    Attributes:
        center: "balanced" (every class counts once in centre, S_W, S_B and NC4) or "empirical" (by its count).
        classes: the classes reported.
        samples: of these classes.
        nc1: tr(S_W S_B^+)/K, with the rank and the condition of the centred means it rests on.
        nc1_trace: tr S_W / tr S_B.
        cdnv: class-distance normalised variance.
        nc2_etf, nc2_etf_weight: distance to the simplex ETF, of class means and of classifier rows.
        nc2_norm, nc2_norm_weight: coefficient of variation of norms.
        nc2_angle, nc2_angle_weight: standard deviation of cosines.
        nc2_maxangle, nc2_maxangle_weight: mean |cos + 1/(K-1)|.
        mean_cosine, mean_cosine_weight: mean of pairwise cosines; 1 if the classes have merged.
        nc3: || W/||W|| - M/||M|| ||.
        nc3_cosine: mean cosine of a classifier row and its class mean.
        nc4: share of samples on which classifier and nearest class mean agree, averaged as `center` says.
        nc4_source: where the features for it came from, or why it is absent.
        accuracy, center_accuracy: share of samples that the classifier, and the nearest class mean, get right.
        balanced_accuracy, balanced_center_accuracy: the same, averaged over classes.
        mean_accuracy: share of class means that the classifier puts in their class.
        class_...: per class; the mean of `class_nc1` is nc1 (balanced); it needs a scatter for each class.
        gram, gram_weight: (m, m) cosines of centred class means and of classifier rows, on the CPU.
        groups: a report for each group.
    """

    center: str
    classes: tuple[int, ...]
    samples: int
    nc1: float = NAN
    nc1_rank: int = 0
    nc1_condition: float = NAN
    nc1_trace: float = NAN
    cdnv: float = NAN
    nc2_etf: float = NAN
    nc2_etf_weight: float = NAN
    nc2_norm: float = NAN
    nc2_norm_weight: float = NAN
    nc2_angle: float = NAN
    nc2_angle_weight: float = NAN
    nc2_maxangle: float = NAN
    nc2_maxangle_weight: float = NAN
    mean_cosine: float = NAN
    mean_cosine_weight: float = NAN
    nc3: float = NAN
    nc3_cosine: float = NAN
    nc4: float = NAN
    nc4_source: str = "absent: measured from moments alone"
    accuracy: float = NAN
    balanced_accuracy: float = NAN
    center_accuracy: float = NAN
    balanced_center_accuracy: float = NAN
    mean_accuracy: float = NAN
    class_count: tuple[int, ...] = ()
    class_nc1: tuple[float, ...] = ()
    class_variance: tuple[float, ...] = ()
    class_norm: tuple[float, ...] = ()
    class_norm_weight: tuple[float, ...] = ()
    class_nc3_cosine: tuple[float, ...] = ()
    class_nc4: tuple[float, ...] = ()
    class_accuracy: tuple[float, ...] = ()
    class_center_accuracy: tuple[float, ...] = ()
    gram: Tensor | None = field(default=None, repr=False)
    gram_weight: Tensor | None = field(default=None, repr=False)
    groups: Mapping[str, "CollapseReport"] = field(default_factory=dict)

    @property
    def nc2(self) -> float:
        """The one number for NC2: distance of the class means to the simplex ETF."""
        return self.nc2_etf

    def as_dict(self, *, per_class: bool = False) -> dict[str, Any]:
        """For JSON: finite numbers, strings, None for what is absent; `groups` nested.

        Args:
            per_class: also the per-class lists, the classes and the Gram matrices.
        """
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "groups":
                out["groups"] = {name: group.as_dict(per_class=per_class) for name, group in value.items()}
            elif per_class or isinstance(value, str | int | float):
                out[f.name] = _jsonable(value)
        return out

    def __str__(self) -> str:
        columns = {"all": self, **self.groups}
        lines = [("", *columns), ("classes", *(str(len(r.classes)) for r in columns.values()))]
        lines.append(("samples", *(str(r.samples) for r in columns.values())))
        for label, name in _TABLE:
            lines.append((label, *(_number(getattr(r, name)) for r in columns.values())))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in lines]
        notes = f"center {self.center}; NC1 of rank {self.nc1_rank}, condition {_number(self.nc1_condition)}"
        return "\n".join([*table, f"{notes}; NC4 {self.nc4_source}"])


_TABLE = (
    ("NC1  tr(S_W S_B^+)/K", "nc1"),
    ("     tr S_W / tr S_B", "nc1_trace"),
    ("     CDNV", "cdnv"),
    ("NC2  means to ETF", "nc2_etf"),
    ("     weights to ETF", "nc2_etf_weight"),
    ("     means, norms", "nc2_norm"),
    ("     means, angles", "nc2_angle"),
    ("     means, mean cosine", "mean_cosine"),
    ("     weights, mean cosine", "mean_cosine_weight"),
    ("NC3  weights to means", "nc3"),
    ("NC4  agreement", "nc4"),
    ("accuracy", "accuracy"),
    ("  nearest mean", "center_accuracy"),
)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _jsonable(value.tolist())
    if isinstance(value, tuple | list):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
