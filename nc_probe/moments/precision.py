"""The arithmetic of the probe: float64, on devices of its own choice, whatever the model was run with."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["DTYPES", "cpu_by_default", "float32_has_all_bits", "float64_context"]

# Of features, from fine to coarse.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def float64_context(device: torch.device) -> Iterator[None]:
    """No autograd, no autocast, and no inference mode, whose tensors could not be updated outside of it.

    TF32 does not touch float64, in which everything is computed that float32 is not known to be enough for.
    """
    changed = torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device.type)
    if not changed and torch.empty(0).device.type == "cpu":  # within another: entering again takes its time
        yield
        return
    with cpu_by_default(), torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def cpu_by_default() -> Iterator[None]:
    """Make tensors on the CPU where no device is named, whatever `torch.set_default_device` says."""
    # Entered only where there is need, as it costs every call of PyTorch inside some microseconds.
    elsewhere = torch.empty(0).device.type != "cpu"  # `torch.get_default_device` takes longer
    with torch.device("cpu") if elsewhere else contextlib.nullcontext():
        yield


def float32_has_all_bits(device: torch.device) -> bool:
    """Tell whether a product of float32 matrices is one of float32: on the CPU, unless fewer bits have been allowed."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return device.type == "cpu" and precision in ("none", "ieee") and _products_are_exact()


@functools.cache
def _products_are_exact() -> bool:
    """Multiply numbers of 24 bits by one: libraries have ways of their own to be told that fewer bits are enough."""
    with float64_context(torch.device("cpu")):
        x = torch.full((128, 128), 1 + 2.0**-23, dtype=torch.float32)
        return torch.equal(_product(x, torch.eye(128, dtype=torch.float32)), x)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b
