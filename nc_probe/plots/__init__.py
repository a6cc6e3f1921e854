"""Pictures of a report. Needs matplotlib; draws on figures of its own and leaves pyplot alone.

`plot_grams` and `plot_angles` compare classes two by two, `plot_depth` goes through the layers of a model,
`plot_iterates` through the steps of a solver.
"""

from nc_probe.plots.angles import plot_angles
from nc_probe.plots.grams import plot_grams
from nc_probe.plots.places import plot_depth, plot_iterates

__all__ = ["plot_angles", "plot_depth", "plot_grams", "plot_iterates"]
