"""Runs recipes/grid.py with recipes/train.py started by Python itself, as `accelerate launch` takes as long as a run.

    python direct_grid.py GRID --output DIR ...

The panels of the theory are left out.
"""

import sys

import recipes.results.page.build as build
import recipes.training.cells as cells
from recipes.grid import main


def direct():
    real, build._theory = cells.command, lambda gallery: None

    def command(cell, folder, **how):
        words = real(cell, folder, **how)
        return [sys.executable, *words[words.index(str(cells.TRAIN)) :]]

    cells.command = command


if __name__ == "__main__":
    direct()
    sys.exit(main(sys.argv[1:]))
