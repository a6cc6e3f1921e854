"""Finds the linear map that ends a classifier, in models that this package knows nothing about.

What is looked for, in this order: what the caller names; timm's `get_classifier()`; an attribute `fc`, `classifier`,
`head` or `lm_head` (torchvision, transformers), or the last linear map in it; the last linear map of the model. A
linear map is an `nn.Linear`, or an `nn.Conv2d` with a 1 x 1 kernel, which some models apply to their pooled features.

Some models have several heads and give the mean of their logits: one for each of a vision transformer's branches
(CrossViT), or one for the labels and one for a teacher (distillation: DeiT, LeViT, RepViT, where `head_dist` stands
beside `head`). The mean of n linear maps is a linear map of the features of all, one after the other:

    sum_i p_i (W_i f_i + b_i) = [p_1 W_1 ... p_n W_n] [f_1; ...; f_n] + sum_i p_i b_i,   p_i = 1/n.

EfficientViM has learned weights p instead.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["Head", "LinearMap", "count_classes", "find_head", "is_compiled", "unwrap"]

# EfficientViM weighs its heads by the softmax of these: those of the labels, those of the teacher.
MIXTURES = ("weights", "weights_dist")

# Two heads whose logits are averaged, one of them for a teacher: in timm, and in transformers' LeViT and DeiT.
PAIRS = (("head", "head_dist"), ("classifier", "classifier_distill"), ("cls_classifier", "distillation_classifier"))

# Models that hold nothing but another one, under one of these names.
WRAPPERS = ({"module"}, {"_orig_mod"}, {"timm_model"})


class LinearMap(NamedTuple):
    """logits = weight @ feature + bias.

    name: as found in the unwrapped model. module: what receives the feature. token: it is applied to the class token
    and to others (B, T, d), which are then dropped (attention pooling, CLIP).
    """

    name: str
    module: nn.Linear | nn.Conv2d
    token: bool = False

    @property
    def weight(self) -> Tensor:
        """(K, d)"""
        return _whole(self.module.weight).flatten(1)

    @property
    def num_features(self) -> int:
        """d"""
        return self.module.weight.shape[1]

    @property
    def bias(self) -> Tensor | None:
        """(K,)"""
        return None if self.module.bias is None else _whole(self.module.bias)

    def feature(self, received: Tensor, *, tokens: bool = False) -> Tensor:
        """(B, d) out of what the module received, or with `tokens` (B, T, d).

        Raises:
            ValueError: it received one vector for each of several places, not for each sample, or the other way round.
        """
        feature = received.detach()
        if tokens:
            if feature.ndim != 3:
                raise ValueError(
                    f"labels must have shape ({len(feature)},) as the batch has, got (B, T), which is for tokens "
                    f"(B, T, d): the classifier {self.name!r} received {tuple(received.shape)}"
                )
            return feature
        if self.token and feature.ndim == 3:
            feature = feature[:, 0]
        elif feature.ndim > 2 and feature.shape[2:].numel() == 1:
            feature = feature.flatten(1)
        if feature.ndim != 2:
            raise ValueError(
                f"the classifier {self.name!r} must receive (B, d) where labels are (B,), got {tuple(received.shape)}"
            )
        return feature


class Head(NamedTuple):
    """The mean of one or more linear maps of K logits, as one linear map of their features side by side.

    maps: n of them. mixtures: their weights in the mean, before a softmax of each vector, of which each has an equal
    part; none if all weigh the same.
    """

    maps: tuple[LinearMap, ...]
    mixtures: tuple[Tensor, ...] = ()

    def check(self, model: nn.Module) -> None:
        """Check that these are modules of a model still.

        Raises:
            ValueError: one is not.
        """
        modules = set(model.modules())
        for linear in self.maps:
            if linear.module not in modules:
                raise ValueError(
                    f"the classifier {linear.name!r} must be that of the model as the probe was made, but it has been "
                    "replaced since: make a new NCProbe"
                )

    @property
    def name(self) -> str:
        return " + ".join(m.name for m in self.maps)

    @property
    def shares(self) -> Tensor:
        """(n,) the weights, of sum 1."""
        if not self.mixtures:
            return torch.full((len(self.maps),), 1 / len(self.maps), dtype=torch.float64)
        return torch.cat([_whole(m).detach().double().softmax(0) for m in self.mixtures]) / len(self.mixtures)

    @property
    def weight(self) -> Tensor:
        """(K, d) float64, d the sum of the lengths of the features."""
        if len(self.maps) == 1:
            return self.maps[0].weight.double()
        return torch.cat([p * m.weight.double() for p, m in zip(self.shares.tolist(), self.maps, strict=True)], 1)

    @property
    def num_classes(self) -> int:
        """K"""
        return self.maps[0].module.weight.shape[0]

    @property
    def num_features(self) -> int:
        """d"""
        return sum(linear.num_features for linear in self.maps)

    @property
    def bias(self) -> Tensor | None:
        """(K,) float64"""
        biases = [(p, m.bias) for p, m in zip(self.shares.tolist(), self.maps, strict=True)]
        known = [p * bias.double() for p, bias in biases if bias is not None]
        return torch.stack(known).sum(0) if known else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile, an EMA, transformers' TimmWrapper, or any wrapper whose
    only child is `module`."""
    while not hasattr(model, "get_classifier"):
        children = dict(model.named_children())
        if set(children) not in WRAPPERS:
            break
        (model,) = children.values()
    return model


def find_head(model: nn.Module, *, name: str | Sequence[str] | None = None) -> Head | None:
    """The classifier of a model; None if it says that it has none (timm's `num_classes=0`).

    Args:
        model: a classifier, wrapped or not.
        name: of the classifier in `model.named_modules()`, where the search would not find it; several names if the
            logits are the mean of several.

    Raises:
        ValueError: no linear classifier there, or several that do not fit together; the message says what is.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    if not (name is None or isinstance(name, str | list | tuple)):
        raise ValueError(f"head must be a name or a list of names, got {name!r}")
    if name is not None:
        names = [name] if isinstance(name, str) else list(name)
        for each in names:
            if each not in modules:
                raise ValueError(f"head must be the name of a module of {type(model).__name__}, got {each!r}")
        return _head(model, [modules[each] for each in names])
    if hasattr(model, "get_classifier"):
        found = list(_parts(model.get_classifier()))  # pyright: ignore[reportCallIssue]
        return None if all(isinstance(part, nn.Identity) for part in found) else _head(model, found)
    pair = next((pair for pair in PAIRS if all(isinstance(getattr(model, n, None), nn.Module) for n in pair)), None)
    name = next((n for n in ("fc", "classifier", "head", "lm_head") if n in modules), "")
    return _head(model, [modules[n] for n in pair or (name,)])


def count_classes(head: Head | None, given: int | None) -> int:
    """K, of the classifier or as given for a model that has none.

    Raises:
        ValueError: it is not known, or known twice and not the same.
    """
    known = None if head is None else head.num_classes
    number = given if known is None else known
    if number is None:
        raise ValueError("num_classes must be given for a model without classifier, got None")
    if number < 1 or given not in (None, number):
        raise ValueError(f"num_classes must be {known or 'at least 1'}, got {given}")
    return number


def is_compiled(model: nn.Module) -> bool:
    """Whether some of it is code of torch.compile."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


def _head(model: nn.Module, parts: Iterable[nn.Module]) -> Head:
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    maps = []
    for part in parts:
        inside = [m for m in part.modules() if _is_linear(m)]
        if not inside:
            where = ".".join(filter(None, (type(model).__name__, names.get(part, "get_classifier()"))))
            raise ValueError(
                f"{where} must be or contain an nn.Linear or a 1x1 nn.Conv2d, got {type(part).__name__} without one: "
                "name the layer with head='...'"
            )
        name = names.get(inside[-1], "get_classifier()")
        pooling = modules.get(name.rpartition(".")[0])
        maps.append(LinearMap(name, inside[-1], getattr(pooling, "pool_type", "") == "token"))
    sizes = [m.weight.shape[0] for m in maps]
    if len(set(sizes)) > 1:
        raise ValueError(f"heads must have equally many classes, got {[(m.name, m.weight.shape[0]) for m in maps]}")
    mixtures = [m for m in (getattr(model, name, None) for name in MIXTURES) if isinstance(m, nn.Parameter)]
    if sum(m.numel() for m in mixtures if m.ndim == 1) != len(maps):
        mixtures = []
    return Head(tuple(maps), tuple(mixtures))


def _parts(found: Any) -> Iterable[nn.Module]:
    """The classifiers that stand side by side in what `get_classifier` gave."""
    if isinstance(found, tuple | list | nn.ModuleList):
        for part in found:
            yield from _parts(part)
        return
    children = dict(found.named_children())
    if {"head", "head_dist"} <= set(children):
        beside = [child for child in (children["head"], children["head_dist"]) if not isinstance(child, nn.Identity)]
        yield from _parts(beside or [children["head"]])
    else:
        yield found


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that `fully_shard` has spread over the ranks, put together; all ranks must ask for it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
