"""Gradients: one way to differentiate an equilibrium per file."""

from timm_deq.gradients.base import Gradient
from timm_deq.gradients.implicit import Implicit
from timm_deq.gradients.neumann import Neumann
from timm_deq.gradients.phantom import Phantom
from timm_deq.gradients.reversible import Reversible
from timm_deq.gradients.shine import Shine
from timm_deq.gradients.unrolled import Unrolled

__all__ = ["Gradient", "Implicit", "Neumann", "Phantom", "Reversible", "Shine", "Unrolled"]
