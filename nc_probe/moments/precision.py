"""The arithmetic of the probe: float64, whatever the model was run with."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["DTYPES", "float64_context"]

# Of features, from fine to coarse.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def float64_context(device: torch.device) -> Iterator[None]:
    """No autograd, no autocast, and no inference mode, whose tensors could not be updated outside of it.

    TF32 does not touch float64, in which everything here is computed.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
