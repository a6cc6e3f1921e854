"""Captures: hooks that hold what one forward pass of a model gave, at its classifier, its output, layers and iterates.

What is captured is a copy, for activations may be overwritten before they are read; but for logits where whoever reads
them makes sure that they are still those of the features. Only what happens inside a forward pass of the whole model
counts: not what gradient checkpointing computes again in a backward pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nc_probe.hooks.heads import Head, unwrap
from nc_probe.hooks.pooling import pooled, tensors

__all__ = [
    "Capture",
    "ClassifierInputCapture",
    "IterateCapture",
    "LayerCapture",
    "OutputCapture",
    "iterate_captures",
    "layer_captures",
]


class Capture(ABC):
    """What hooks saw of the last forward pass, until it is popped.

    Attributes:
        recording: whether a forward pass is under way, whose calls of hooks count.
    """

    def __init__(self) -> None:
        self.recording = False
        self.clear()

    @abstractmethod
    def register(self) -> list[RemovableHandle]:
        """Add the hooks."""

    @abstractmethod
    def pop(self) -> Any:
        """Return what the last forward pass gave, and clear it.

        Raises:
            ValueError: there was not exactly one call.
        """

    @abstractmethod
    def clear(self) -> None:
        """Drop what was captured."""


class ClassifierInputCapture(Capture):
    """What the linear maps of a classifier receive."""

    def __init__(self, head: Head) -> None:
        self.head = head
        super().__init__()

    def register(self) -> list[RemovableHandle]:
        modules = dict.fromkeys(linear.module for linear in self.head.maps)
        return [module.register_forward_pre_hook(self._capture, with_kwargs=True) for module in modules]

    def pop(self, *, tokens: bool = False) -> Tensor:
        """Return the features (B, d) of all maps side by side, or with `tokens` (B, T, d), and clear them.

        Raises:
            ValueError: there was not exactly one call of each map, or one did not receive a vector a sample.
        """
        captured = self._captured
        self.clear()
        for linear in self.head.maps:
            passes = len(captured.get(linear.module, ()))
            if passes != 1:
                raise ValueError(
                    f"update must follow exactly one forward pass of the model, got {passes} through its classifier "
                    f"{linear.name!r} since the last update"
                )
        features = [linear.feature(captured[linear.module][0], tokens=tokens) for linear in self.head.maps]
        return features[0] if len(features) == 1 else torch.cat(features, -1)

    def clear(self) -> None:
        self._captured: dict[nn.Module, list[Tensor]] = {}

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.recording:
            received = args[0] if args else kwargs["input"]
            self._captured.setdefault(module, []).append(received.detach().clone())


class OutputCapture(Capture):
    """What a model gives: logits, or features if it has no classifier; and the extent of a forward pass.

    Args:
        model: wrapped or not.
        inner: captures inside the model, which are cleared as a pass begins: one that raised midway leaves nothing.
        num_classes: K, by which logits (B, T, K) of tokens are known among other outputs.

    Attributes:
        copies: whether the output is copied.
    """

    def __init__(self, model: nn.Module, inner: Sequence[Capture] = (), *, num_classes: int | None = None) -> None:
        self.model, self.inner, self.num_classes, self.copies = unwrap(model), inner, num_classes, True
        super().__init__()

    def register(self) -> list[RemovableHandle]:
        # Around the hooks of the captures inside, one of which may be on the model itself.
        before = self.model.register_forward_pre_hook(self._begin, prepend=True)
        inside = [handle for capture in self.inner for handle in capture.register()]
        return [before, *inside, self.model.register_forward_hook(self._end)]

    def pop(self) -> list[Tensor]:
        """Return the last output, or what may be logits of several tensors in it, and clear it.

        Raises:
            ValueError: there was not exactly one forward pass.
        """
        output, passes = self._output, self._passes
        self._output, self._passes = [], 0
        if passes != 1:
            raise ValueError(
                f"update must follow exactly one forward pass of the model, got {passes} since the last update"
            )
        return output

    def clear(self) -> None:
        """Drop what this and the captures inside have captured."""
        for capture in self.inner:
            capture.clear()
            capture.recording = False
        self._output: list[Tensor] = []
        self._passes = 0

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for capture in self.inner:
            capture.clear()
            capture.recording = True

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for capture in self.inner:
            capture.recording = False
        found = [x.detach() for x in _logits(output, self.num_classes)]
        self._output = [x.clone() for x in found] if self.copies else found
        self._passes += 1


class LayerCapture(Capture):
    """The pooled output of a module.

    Args:
        name: in reports, and in errors.
        module: hooked.
        layout: keywords of `pooled`.
    """

    def __init__(self, name: str, module: nn.Module, layout: Mapping[str, Any]) -> None:
        self.name, self.module, self.layout = name, module, layout
        super().__init__()

    def register(self) -> list[RemovableHandle]:
        return [self.module.register_forward_hook(self._capture)]

    def names(self, count: int) -> list[str]:
        """Of the first `count` places."""
        return [self.name][:count]

    def pop(self) -> dict[str, Tensor]:
        """Return {name: (B, d)}, and clear it.

        Raises:
            ValueError: the module was not called exactly once.
        """
        captured = self._captured
        self.clear()
        if len(captured) != 1:
            raise ValueError(f"layer {self.name!r} must be called once in a forward pass, got {len(captured)} calls")
        return {self.name: captured[0]}

    def clear(self) -> None:
        self._captured: list[Tensor] = []

    def _capture(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recording:
            self._captured.append(pooled(output, **self.layout))


class IterateCapture(Capture):
    """The pooled iterates of an equilibrium layer: its input H0, z1, z2, ..., and the equilibrium z*.

    A layer of this kind has `register_iterate_hook(hook)`, which has `hook(layer, step, z)` called with the states of
    all samples after `step` updates; a sample that has converged stays where it is. Where the solve starts is left out:
    most often it is zero.

    Args:
        name: of the layer.
        module: hooked.
        prefix: before the names of the places.
    """

    def __init__(self, name: str, module: nn.Module, *, prefix: str = "") -> None:
        self.name, self.module, self.prefix = name, module, prefix
        super().__init__()

    def register(self) -> list[RemovableHandle]:
        return [
            self.module.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.module.register_iterate_hook(self._step),  # pyright: ignore[reportCallIssue]
            self.module.register_forward_hook(self._end),
        ]

    def names(self, count: int) -> list[str]:
        """Of `count` places, the input and the equilibrium among them."""
        places = ["H0", *(f"z{k}" for k in range(1, count - 1)), "z*"] if count else []
        return [self.prefix + place for place in places]

    def pop(self) -> dict[str, Tensor]:
        """Return {name: (B, d)}, and clear it.

        Raises:
            ValueError: there was not exactly one solve.
        """
        states, solves = self._states, self._solves
        self.clear()
        if solves != 1:
            raise ValueError(f"equilibrium {self.name!r} must be solved once in a forward pass, got {solves} solves")
        return dict(zip(self.names(len(states)), states, strict=True))

    def clear(self) -> None:
        self._states: list[Tensor] = []
        self._solves = 0

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.recording:
            self._states = [pooled(args[0] if args else kwargs["x"])]

    def _step(self, module: nn.Module, step: int, z: Tensor) -> None:
        if self.recording and step:
            self._states.append(pooled(z))

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recording:
            self._states.append(pooled(output))
            self._solves += 1


def _logits(output: Any, num_classes: int | None) -> list[Tensor]:
    """Find the tensors in an output that may be its logits: the one of that name, or all (B, K) and (B, T, K)."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(output, Tensor):
        return [output]
    if isinstance(named, Tensor):
        return [named]
    found = [x for x in tensors(output) if x.is_floating_point()]
    return [x for x in found if x.ndim == 2 or (x.ndim == 3 and x.shape[2] == num_classes)]


def layer_captures(model: nn.Module, layers: str | Sequence[str]) -> list[LayerCapture]:
    """Capture layers named by the caller, or the stages that the model names itself.

    The stages are those of timm's `feature_info`, whose number of channels tells (B, C, H, W) from (B, H, W, C). Tokens
    are pooled as the model does: the class token if its `global_pool` is "token", else the mean of the tokens after its
    `num_prefix_tokens`.

    Args:
        model: wrapped or not.
        layers: names in `model.named_modules()`, or "stages".

    Raises:
        ValueError: a name that the model does not have, or "stages" for a model that does not name them.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    kind = type(model).__name__
    if layers == "stages":
        info = getattr(model, "feature_info", None)
        stages = list(getattr(info, "info", info) or [])
        named = [stage for stage in stages if stage.get("module") in modules and modules[stage["module"]] is not model]
        channels = {stage["module"]: stage["num_chs"] for stage in named}
        if not channels:
            raise ValueError(
                f"layers='stages' needs feature_info that names modules, which {kind} has not: name layers"
            )
    elif isinstance(layers, str):
        raise ValueError(f"layers must be 'stages' or a list of names, got {layers!r}")
    else:
        channels = dict.fromkeys(layers)
        for name in channels:
            if name not in modules:
                raise ValueError(f"layers must be names of modules of {kind}, got {name!r}")
    layout = {"prefix": getattr(model, "num_prefix_tokens", 0), "token": getattr(model, "global_pool", "") == "token"}
    return [LayerCapture(name, modules[name], {"channels": count, **layout}) for name, count in channels.items()]


def iterate_captures(model: nn.Module) -> list[IterateCapture]:
    """Capture every equilibrium layer of a model.

    Raises:
        ValueError: it has none.
    """
    found = {n: m for n, m in unwrap(model).named_modules() if hasattr(m, "register_iterate_hook")}
    if not found:
        raise ValueError(f"iterates=True needs a model with an equilibrium layer, got {type(unwrap(model)).__name__}")
    return [IterateCapture(n, m, prefix=f"{n}." if len(found) > 1 else "") for n, m in found.items()]
