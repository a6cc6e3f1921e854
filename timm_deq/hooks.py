"""Contexts that follow the equilibria of a model by hooks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from timm_deq.equilibrium import Equilibrium


def equilibria(model: nn.Module) -> dict[str, Equilibrium]:
    """Return the :class:`Equilibrium` layers of a model by their qualified names, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Equilibrium)}


class HookContext(ABC):
    """A context manager whose hooks are in place while it is open. A copy of the model made meanwhile has none."""

    _handles: list[RemovableHandle] | None = None  # while it is open

    @abstractmethod
    def register(self) -> Iterable[RemovableHandle]:
        """Register the hooks, each wrapped in :class:`Hook`."""

    def __enter__(self) -> Self:
        """Register the hooks.

        Raises:
            RuntimeError: The context is open already.
        """
        if self._handles is not None:
            raise RuntimeError(f"{type(self).__name__} must not be entered twice: it is already active")
        self._handles = []
        try:
            for handle in self.register():
                self._handles.append(handle)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        handles, self._handles = self._handles or [], None
        for handle in handles:
            handle.remove()


class Hook:
    """A hook that does nothing in a copy of its module, by `deepcopy` or pickle: the copy is nobody's to follow."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __reduce__(self) -> tuple[type["Hook"], tuple[Callable[..., None]]]:
        return Hook, (_do_nothing,)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass
