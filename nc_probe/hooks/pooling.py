"""Pooling of what layers give, in any layout, to one vector for each sample."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["pooled", "tensors"]


def pooled(output: Any, *, channels: int | None = None, prefix: int = 0, token: bool = False) -> Tensor:
    """One vector for each sample, (B, d) float64, out of what a layer gave.

    The mean over places, in float64: over height and width of (B, C, H, W) or (B, H, W, C), over the tokens of
    (B, T, C); (B, C) as it is. Of several tensors the first with C channels, or if none is known all side by side.

    It is a copy, so that what changes the output later does not change it.

    Args:
        output: a tensor, or a nest of them; what else it holds (the size of a grid of tokens) is left out.
        channels: C, where it is known. It tells the layout; without it that is (B, C, H, W) or (B, T, C).
        prefix: tokens at the front that are no places of the image.
        token: of (B, T, C) take the first token, the class token, instead of the mean.

    Raises:
        ValueError: there is no floating-point tensor of two to four dimensions in it.
    """
    found = [x.detach() for x in tensors(output) if x.is_floating_point() and 2 <= x.ndim <= 4]
    fitting = [x for x in found if channels in x.shape[1:]][:1] or found
    if not fitting:
        raise ValueError(f"a layer must give a tensor (B, ...) of 2 to 4 dimensions, got {type(output).__name__}")
    # A copy, of one tensor too.
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


def tensors(output: Any) -> list[Tensor]:
    """List the tensors of a nest of tuples, lists and mappings, whatever else is in it left out."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]
