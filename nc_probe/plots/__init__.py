"""Pictures of a report. Needs matplotlib; draws on figures of its own and leaves pyplot alone.

`plot_grams` and `plot_angles` compare classes two by two, `plot_classes` shows each against its frequency.
`plot_depth` goes through the layers of a model, `plot_iterates` through the steps of a solver, `plot_history` through
the epochs of training. `plot_compare` shows two reports. `figure.savefig("x.svg")` writes one, as PDF and PNG too.
"""

from nc_probe.plots.angles import plot_angles
from nc_probe.plots.classes import plot_classes
from nc_probe.plots.compare import plot_compare
from nc_probe.plots.grams import plot_grams
from nc_probe.plots.history import plot_history
from nc_probe.plots.places import plot_depth, plot_iterates

__all__ = [
    "plot_angles",
    "plot_classes",
    "plot_compare",
    "plot_depth",
    "plot_grams",
    "plot_history",
    "plot_iterates",
]
