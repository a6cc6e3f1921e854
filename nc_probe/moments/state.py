"""State of an accumulator: tensors that change with samples, named once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from nc_probe.moments.precision import float64_context

__all__ = ["State"]


class State(ABC):
    """Tensors under names, and the number of batches in them.

    Attributes:
        NAMES: of the tensors, which are attributes.
        device: where they are.
        batches: added so far.
    """

    NAMES: ClassVar[tuple[str, ...]]

    def __init__(self, device: torch.device | str | None) -> None:
        self.device = _checked(device)
        self.batches = 0

    @abstractmethod
    def empty(self) -> dict[str, Tensor]:
        """Make the tensors as they are without samples."""

    def reset(self) -> Self:
        """Drop every sample."""
        self.batches = 0
        with float64_context(self.device):
            vars(self).update(self.empty())
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has been summed, by name: for `torch.save`, and for `load_state_dict` of one made alike."""
        return {name.lstrip("_"): getattr(self, name) for name in self.NAMES} | {
            "batches": torch.tensor(self.batches, device="cpu")
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Self:
        """Replace what has been summed by a copy of a `state_dict`.

        Raises:
            ValueError: it is of other names or shapes.
        """
        expected = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != expected:
            raise ValueError(f"state must have tensors of shapes {expected}, got {found}")
        with float64_context(self.device):
            for name in self.NAMES:
                setattr(self, name, state[name.lstrip("_")].detach().to(getattr(self, name), copy=True))
        self.batches = int(state["batches"])
        return self

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors to another device.

        Raises:
            ValueError: it has no float64.
        """
        self.device = _checked(device)
        for name in self.NAMES:
            setattr(self, name, getattr(self, name).to(self.device))
        return self


def _checked(device: torch.device | str | None) -> torch.device:
    device = torch.device("cpu" if device is None else device)
    if device.type == "mps":
        raise ValueError("device 'mps' has no float64: keep the moments on 'cpu'")
    return device
