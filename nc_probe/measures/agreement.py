"""Accuracies and NC4: how many samples the classifier and the nearest class mean get right, and agree on."""

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Agreement", "shares"]


class Agreement(NamedTuple):
    """Samples counted per true class, all (K,) integers.

    correct: the classifier is right; None without one. center_correct: the nearest class mean is right. agree: both
    choose the same class. The last two are None if the features are gone. source: where they came from, or why they are
    absent.
    """

    correct: Tensor | None
    center_correct: Tensor | None
    agree: Tensor | None
    source: str


def shares(counted: Agreement, shown: Tensor, count: Tensor, class_weights: Tensor) -> dict[str, Any]:
    """Compute accuracies and NC4 of some classes, by the names that they have in a report.

    Args:
        counted: samples per class.
        shown: (m,) the classes, each with samples.
        count: (m,) samples of each.
        class_weights: (m,) pi, by which NC4 is averaged.
    """
    values: dict[str, Any] = {"nc4_source": counted.source}
    if not len(shown):
        return values
    n, pi = count.double().cpu(), class_weights.cpu()
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
