"""Parametrised weights (`torch.nn.utils.parametrize`), computed once for a solve and its gradient."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ONE_AT_A_TIME = threading.RLock()
"""Held while torch's cache is in use: it is one for all threads, which would take each other's weights and old ones."""


def cached_parametrizations(cell: nn.Module, *, differentiable: bool) -> AbstractContextManager:
    """Compute the parametrised weights of a cell, recorded by autograd if `differentiable`, and hold them."""
    parametrized = [m for m in cell.modules() if parametrize.is_parametrized(m)]
    return _cached(parametrized, differentiable) if parametrized else nullcontext()


@contextmanager
def _cached(modules: list[nn.Module], differentiable: bool) -> Iterator[None]:
    device = next(p for module in modules for p in module.parameters()).device.type
    with _exclusive(), parametrize.cached():
        with torch.set_grad_enabled(differentiable), torch.autocast(device, enabled=False):
            for module in modules:
                for name in module.parametrizations:  # pyright: ignore[reportGeneralTypeIssues]
                    getattr(module, name)
        yield


def weights_of(cell: nn.Module) -> list[Tensor]:
    """Return the parameters of a cell, and the parametrised weights that are cached now in place of theirs."""
    return [*(p for _, p in unparametrized(cell)), *present_weights(cell).values()]


def unparametrized(cell: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the names and parameters of a cell, but those that parametrised weights are computed from."""
    return [(name, p) for name, p in cell.named_parameters() if "parametrizations." not in name]


def present_weights(cell: nn.Module) -> dict[tuple[int, str], Tensor]:
    """Return the parametrised weights of a cell that are cached now."""
    if not parametrize._cache:
        return {}
    own = {id(module) for module in cell.modules()}
    return {key: weight for key, weight in parametrize._cache.items() if key[0] in own}  # pyright: ignore


@contextmanager
def cached_again(weights: dict[tuple[int, str], Tensor]) -> Iterator[None]:
    """Hold parametrised weights, as `present_weights` gave them, in place of those that are cached now."""
    if not weights:
        yield
        return
    with _exclusive(), parametrize.cached():
        outer = {**parametrize._cache}
        parametrize._cache.update(weights)
        try:
            yield
        finally:
            parametrize._cache.clear()
            parametrize._cache.update(outer)


def _exclusive() -> AbstractContextManager:
    return nullcontext() if torch.compiler.is_compiling() else _ONE_AT_A_TIME
