"""Deep equilibrium models for timm.

`import timm_deq` registers the models, so that `timm.create_model("deq_resnet18")` works, and gives the parts they are
made of: solvers, gradients and the layer that joins them.
"""

from timm_deq.correction import FixedPointCorrection
from timm_deq.dropout import VariationalDropout
from timm_deq.equilibrium import Equilibrium, NonFiniteInputError
from timm_deq.fixed_point import fixed_point
from timm_deq.gradients import Gradient, Implicit, Neumann, Phantom, Reversible, Shine, Unrolled
from timm_deq.hooks import equilibria
from timm_deq.log import SolveLog
from timm_deq.models import set_solver
from timm_deq.monotone import ForwardBackward, PeacemanRachford
from timm_deq.solution import Solution, Status
from timm_deq.solvers import Anderson, Broyden, Picard, ReversibleIteration, Solver
from timm_deq.spectral import JacobianPenalty, jacobian_penalty, spectral_radius
from timm_deq.version import __version__
from timm_deq.warm_start import WarmStart

__all__ = [
    "Anderson",
    "Broyden",
    "Equilibrium",
    "FixedPointCorrection",
    "ForwardBackward",
    "Gradient",
    "Implicit",
    "JacobianPenalty",
    "Neumann",
    "NonFiniteInputError",
    "PeacemanRachford",
    "Phantom",
    "Picard",
    "Reversible",
    "ReversibleIteration",
    "Shine",
    "Solution",
    "SolveLog",
    "Solver",
    "Status",
    "Unrolled",
    "VariationalDropout",
    "WarmStart",
    "__version__",
    "equilibria",
    "fixed_point",
    "jacobian_penalty",
    "set_solver",
    "spectral_radius",
]
