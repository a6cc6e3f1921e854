"""Parametrised weights (`torch.nn.utils.parametrize`), computed once for a solve and its gradient."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from timm_deq.fixed_point import Map


def cached_parametrizations(cell: nn.Module, *, differentiable: bool) -> AbstractContextManager:
    """Compute the parametrised weights of a cell, recorded by autograd if `differentiable`, and hold them."""
    parametrized = [m for m in cell.modules() if parametrize.is_parametrized(m)]
    return _cached(parametrized, differentiable) if parametrized else nullcontext()


@contextmanager
def _cached(modules: list[nn.Module], differentiable: bool) -> Iterator[None]:
    device = next(p for module in modules for p in module.parameters()).device.type
    with parametrize.cached():
        with torch.set_grad_enabled(differentiable), torch.autocast(device, enabled=False):
            for module in modules:
                for name in module.parametrizations:  # pyright: ignore[reportGeneralTypeIssues]
                    getattr(module, name)
        yield


def weights_of(cell: nn.Module) -> list[Tensor]:
    """Return the parameters of a cell, and the parametrised weights that are cached now in place of theirs."""
    parameters = [p for name, p in cell.named_parameters() if "parametrizations." not in name]
    return [*parameters, *parametrize._cache.values()]  # pyright: ignore[reportReturnType]


def with_present_weights(f: Map) -> Map:
    """Let f use the parametrised weights that are cached now whenever it is called."""
    weights = dict(parametrize._cache)

    def evaluate(z: Tensor) -> Tensor:
        with parametrize.cached():
            parametrize._cache.update(weights)
            return f(z)

    return evaluate if weights else f
