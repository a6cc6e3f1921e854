"""Neural collapse, measured on any classifier with a linear head, in one pass, exactly, on any number of ranks.

    with NCProbe(model, groups={"majority": [0, 1, 2], "minority": range(3, 10)}) as probe:
        for images, labels in loader:       # evaluation mode, data as they are: neither resampled nor padded
            model(images)
            probe.update(labels)
    report = probe.compute()
    print(report)                           # report.nc1, report.as_dict(), report.groups["minority"].mean_cosine

`NCProbe` reads what enters the classifier with a hook; `ClassMoments` keeps its class means and scatter; `measure`
turns them into a `CollapseReport`; `OODProbe` scores samples of no class by them. In `nc_probe.measures`, `formulas`
and `pairwise` have the formulas, `geometry` the geometries that theory predicts, `detection` the scores, and
`conventions` the papers' own variants; `nc_probe.plots` draws (needs matplotlib).
"""

from nc_probe.hooks.heads import Head, find_head
from nc_probe.loops.model import measure_model, measure_ood
from nc_probe.measures.agreement import Agreement
from nc_probe.measures.conventions import CONVENTIONS
from nc_probe.measures.geometry import ReferenceGram, orthogonal_frame, seli, simplex_etf
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.ood import OODProbe, OODReport
from nc_probe.probe import NCProbe
from nc_probe.report import CollapseReport, measure

__all__ = [
    "CONVENTIONS",
    "Agreement",
    "ClassMoments",
    "CollapseReport",
    "Head",
    "NCProbe",
    "OODProbe",
    "OODReport",
    "ReferenceGram",
    "find_head",
    "measure",
    "measure_model",
    "measure_ood",
    "orthogonal_frame",
    "seli",
    "simplex_etf",
]
