"""What a solve returns: the state it found, and what is known about it, per sample."""

from enum import IntEnum
from typing import Any, NamedTuple

from torch import Tensor


class Status(IntEnum):
    """How the solve of one sample ended. Failure is a value, never an exception."""

    CONVERGED = 0, "The relative residual fell to the tolerance or below it."
    MAX_STEPS = 1, "The budget of evaluations ran out; the value is the iterate with the smallest residual."
    NONFINITE = 2, "An evaluation gave a NaN or an infinity; the value is the best iterate before it."

    sentence: str

    def __new__(cls, value: int, sentence: str) -> "Status":
        member = int.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member


class Solution(NamedTuple):
    """The result of :func:`timm_deq.fixed_point`.

    Attributes:
        value: The best iterate of each sample, always finite where the initial state was, shape of `z0`.
        residual: `||f(z) - z|| / ||f(z)||` at that iterate, shape `(B,)`; infinite where no evaluation was finite.
        steps: Evaluations of f until the sample was frozen, shape `(B,)`, int64.
        status: A :class:`Status` per sample, shape `(B,)`, int64.
        evaluations: Evaluations of f spent on the sample, shape `(B,)`, int64: at least `steps`, because a frozen
            sample is evaluated along with its batch until it is set aside.
        state: What the solver knows at the end, for the gradients that use it; None if samples were set aside.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    status: Tensor
    evaluations: Tensor
    state: Any = None
