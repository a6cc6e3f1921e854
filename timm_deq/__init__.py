"""Deep equilibrium models for timm.

`import timm_deq` registers the models, so that `timm.create_model("deq_resnet18")` works, and gives the parts they are
made of: solvers, gradients and the layer that joins them.
"""

from timm_deq.equilibrium import Equilibrium
from timm_deq.fixed_point import fixed_point
from timm_deq.gradients import Gradient, Implicit, Phantom, Unrolled
from timm_deq.log import SolveLog
from timm_deq.models import set_solver
from timm_deq.solution import Solution, Status
from timm_deq.solvers import Anderson, Broyden, Picard, Solver

__all__ = [
    "Anderson",
    "Broyden",
    "Equilibrium",
    "Gradient",
    "Implicit",
    "Phantom",
    "Picard",
    "Solution",
    "SolveLog",
    "Solver",
    "Status",
    "Unrolled",
    "fixed_point",
    "set_solver",
]
