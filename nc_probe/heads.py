"""Finds the linear map that ends a classifier, in models that this package knows nothing about.

What is looked for, in this order: what the caller names; timm's `get_classifier()`; an attribute `fc`, `classifier`
or `head` (torchvision, transformers), or the last `nn.Linear` in it; the last `nn.Linear` of the model.
"""

from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Head", "find_head", "unwrap"]


class Head(NamedTuple):
    """The linear map logits = weight @ feature + bias.

    module: its input is the feature. name: as found in the unwrapped model.
    """

    name: str
    module: nn.Linear

    @property
    def weight(self) -> Tensor:
        """(K, d)"""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """(K,)"""
        return self.module.bias


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile, an EMA, or any wrapper whose only child is `module`."""
    while not hasattr(model, "get_classifier"):
        children = dict(model.named_children())
        if set(children) not in ({"module"}, {"_orig_mod"}):
            break
        (model,) = children.values()
    return model


def find_head(model: nn.Module, *, name: str | None = None) -> Head:
    """The classifier of a model.

    Args:
        model: a classifier, wrapped or not.
        name: of the classifier in `model.named_modules()`, where the search would not find it.

    Raises:
        ValueError: no linear classifier there; the message says what is.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            raise ValueError(f"head must be the name of a module of {type(model).__name__}, got {name!r}")
        return _last_linear(model, name, modules[name])
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()  # pyright: ignore[reportCallIssue]
        if not isinstance(found, nn.Linear):
            raise ValueError(
                f"{type(model).__name__}.get_classifier() must be nn.Linear, got {type(found).__name__}: "
                "name the linear layer with head='...'"
            )
        return Head(next((n for n, m in modules.items() if m is found), "get_classifier()"), found)
    name = next((n for n in ("fc", "classifier", "head") if n in modules), "")
    return _last_linear(model, name, modules[name])


def _last_linear(model: nn.Module, name: str, module: nn.Module) -> Head:
    linears = [(n, m) for n, m in module.named_modules(prefix=name) if isinstance(m, nn.Linear)]
    if not linears:
        where = f"{type(model).__name__}.{name}" if name else type(model).__name__
        raise ValueError(f"{where} must be or contain an nn.Linear, got {type(module).__name__} without one")
    return Head(*linears[-1])
