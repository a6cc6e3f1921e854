"""Where a probe reads a model: what its classifier receives, what it gives, its layers, the iterates of a fixed point.

A tap is attached by hooks, holds what it saw of the last forward pass, and hands it over once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nc_probe.hooks.heads import Head, unwrap

__all__ = ["HeadTap", "LayerTap", "OutputTap", "SolveTap", "layer_taps", "pooled", "solve_taps"]


def pooled(output: Any, *, channels: int | None = None, prefix: int = 0, token: bool = False) -> Tensor:
    """One vector for each sample, (B, d) float64, out of what a layer gave.

    The mean over places, in float64: over height and width of (B, C, H, W) or (B, H, W, C), over the tokens of
    (B, T, C); (B, C) as it is. Of several tensors the first with C channels, or if none is known all side by side.

    Args:
        output: a tensor, or a nest of them; what else it holds (the size of a grid of tokens) is left out.
        channels: C, where it is known. It tells the layout; without it that is (B, C, H, W) or (B, T, C).
        prefix: tokens at the front that are no places of the image.
        token: of (B, T, C) take the first token, the class token, instead of the mean.

    Raises:
        ValueError: there is no floating-point tensor of two to four dimensions in it.
    """
    found = [x.detach() for x in _tensors(output) if x.is_floating_point() and 2 <= x.ndim <= 4]
    fitting = [x for x in found if channels in x.shape[1:]][:1] or found
    if not fitting:
        raise ValueError(f"a layer must give a tensor (B, ...) of 2 to 4 dimensions, got {type(output).__name__}")
    return torch.cat([_vector(x, channels, prefix, token) for x in fitting], 1)


def _vector(x: Tensor, channels: int | None, prefix: int, token: bool) -> Tensor:
    if x.ndim == 2:
        return x.double()
    if x.ndim == 4:
        last = channels is not None and x.shape[-1] == channels != x.shape[1]
        return x.mean((1, 2) if last else (2, 3), dtype=torch.float64)
    if channels is not None and x.shape[1] == channels != x.shape[-1]:
        return x.mean(2, dtype=torch.float64)
    return x[:, 0].double() if token else x[:, prefix:].mean(1, dtype=torch.float64)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


class HeadTap:
    """What the linear maps of a classifier receive."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.forget()

    def attach(self) -> list[RemovableHandle]:
        self.forget()
        modules = dict.fromkeys(linear.module for linear in self.head.maps)
        return [module.register_forward_pre_hook(self._capture, with_kwargs=True) for module in modules]

    def take(self) -> Tensor:
        """(B, d) features of the last forward pass side by side, which are then forgotten.

        Raises:
            ValueError: there was not exactly one forward pass, or the classifier did not receive a vector a sample.
        """
        captured = self._captured
        self.forget()
        for linear in self.head.maps:
            passes = len(captured.get(linear.module, ()))
            if passes != 1:
                raise ValueError(
                    f"update must follow exactly one forward pass of the model, got {passes} through its classifier "
                    f"{linear.name!r} since the last update"
                )
        features = [linear.feature(captured[linear.module][0]) for linear in self.head.maps]
        return features[0] if len(features) == 1 else torch.cat(features, 1)

    def forget(self) -> None:
        self._captured: dict[nn.Module, list[Tensor]] = {}

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._captured.setdefault(module, []).append((args[0] if args else kwargs["input"]).detach())


class OutputTap:
    """What a model gives: logits, or features if it has no classifier."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.forget()

    def attach(self) -> list[RemovableHandle]:
        self.forget()
        return [self.model.register_forward_hook(self._capture)]

    def take(self) -> Tensor | None:
        """The last output, which is then forgotten, or None if it was no tensor.

        Raises:
            ValueError: there was not exactly one forward pass.
        """
        captured = self._captured
        self.forget()
        if len(captured) != 1:
            raise ValueError(
                f"update must follow exactly one forward pass of the model, got {len(captured)} since the last update"
            )
        output = getattr(captured[0], "logits", captured[0])  # transformers wrap them
        return output.detach() if isinstance(output, Tensor) else None

    def forget(self) -> None:
        self._captured: list[Any] = []

    def _capture(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._captured.append(output)


class LayerTap:
    """The pooled output of a module.

    Args:
        name: in reports, and in errors.
        module: hooked.
        layout: keywords of `pooled`.
    """

    def __init__(self, name: str, module: nn.Module, layout: Mapping[str, Any]) -> None:
        self.name, self.module, self.layout = name, module, layout
        self.forget()

    def attach(self) -> list[RemovableHandle]:
        self.forget()
        return [self.module.register_forward_hook(self._capture)]

    def names(self, count: int) -> list[str]:
        """Of the first `count` places."""
        return [self.name][:count]

    def take(self) -> dict[str, Tensor]:
        """{name: (B, d)} of the last forward pass, which is then forgotten.

        Raises:
            ValueError: the module was not called exactly once.
        """
        captured = self._captured
        self.forget()
        if len(captured) != 1:
            raise ValueError(f"layer {self.name!r} must be called once in a forward pass, got {len(captured)} calls")
        return {self.name: captured[0]}

    def forget(self) -> None:
        self._captured: list[Tensor] = []

    def _capture(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._captured.append(pooled(output, **self.layout))


class SolveTap:
    """The pooled iterates of an equilibrium layer: its input H0, z1, z2, ..., and the equilibrium z*.

    A layer of this kind has `register_iterate_hook(hook)`, which has `hook(layer, step, z)` called with the states of
    all samples after `step` updates; a sample that has converged stays where it is. Where the solve starts is left out:
    most often it is zero.

    Args:
        name: of the layer. prefix: before the names of the places.
        module: hooked.
    """

    def __init__(self, name: str, module: nn.Module, *, prefix: str = "") -> None:
        self.name, self.module, self.prefix = name, module, prefix
        self.forget()

    def attach(self) -> list[RemovableHandle]:
        self.forget()
        return [
            self.module.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.module.register_iterate_hook(self._step),  # pyright: ignore[reportCallIssue]
            self.module.register_forward_hook(self._end),
        ]

    def names(self, count: int) -> list[str]:
        """Of `count` places, the input and the equilibrium among them."""
        places = ["H0", *(f"z{k}" for k in range(1, count - 1)), "z*"] if count else []
        return [self.prefix + place for place in places]

    def take(self) -> dict[str, Tensor]:
        """{name: (B, d)} of the last forward pass, which is then forgotten.

        Raises:
            ValueError: there was not exactly one solve.
        """
        states, solves = self._states, self._solves
        self.forget()
        if solves != 1:
            raise ValueError(f"equilibrium {self.name!r} must be solved once in a forward pass, got {solves} solves")
        return dict(zip(self.names(len(states)), states, strict=True))

    def forget(self) -> None:
        self._states: list[Tensor] = []
        self._solves = 0

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states = [pooled(args[0] if args else kwargs["x"])]

    def _step(self, module: nn.Module, step: int, z: Tensor) -> None:
        if step:
            self._states.append(pooled(z))

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._states.append(pooled(output))
        self._solves += 1


def layer_taps(model: nn.Module, layers: str | Sequence[str]) -> list[LayerTap]:
    """Taps on layers named by the caller, or on the stages that the model names itself.

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
    return [LayerTap(name, modules[name], {"channels": count, **layout}) for name, count in channels.items()]


def solve_taps(model: nn.Module) -> list[SolveTap]:
    """Taps on every equilibrium layer of a model.

    Raises:
        ValueError: it has none.
    """
    found = {n: m for n, m in unwrap(model).named_modules() if hasattr(m, "register_iterate_hook")}
    if not found:
        raise ValueError(f"iterates=True needs a model with an equilibrium layer, got {type(unwrap(model)).__name__}")
    return [SolveTap(n, m, prefix=f"{n}." if len(found) > 1 else "") for n, m in found.items()]
