"""The models. Importing this package registers them with timm."""

from timm_deq.models import deq_resnet as deq_resnet
from timm_deq.models._factory import set_solver

__all__ = ["set_solver"]
