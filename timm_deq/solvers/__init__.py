"""Solvers: one update rule per file, all run by :func:`timm_deq.fixed_point`."""

from timm_deq.solvers.anderson import Anderson
from timm_deq.solvers.base import Solver
from timm_deq.solvers.broyden import Broyden
from timm_deq.solvers.picard import Picard
from timm_deq.solvers.reversible import ReversibleIteration

__all__ = ["Anderson", "Broyden", "Picard", "ReversibleIteration", "Solver"]
