"""Tokens as samples: a feature and a label for each position of a sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nc_probe.hooks.heads import unwrap

__all__ = ["check_shift", "counted", "token_samples"]

# Names of causal language models, in transformers and elsewhere.
CAUSAL = ("LMHeadModel", "ForCausalLM")


def check_shift(model: nn.Module, shift_labels: bool | None, ignore_index: int | None) -> bool:
    """Return whether labels are shifted by one.

    Raises:
        ValueError: it is not said of a model for which both are common.
    """
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")
    if shift_labels is None and type(unwrap(model)).__name__.endswith(CAUSAL):
        raise ValueError(
            "shift_labels must be given for a causal language model, got None: True if labels[:, t] is the token that "
            "stands at t, as transformers has them; False if it is the one to be predicted there"
        )
    return bool(shift_labels)


def token_samples(
    features: Tensor, labels: Tensor, mask: Tensor | None, output: Sequence[Tensor], *, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Lay out the tokens of all sequences one after the other.

    Args:
        features: (B, T, d).
        labels: (B, T).
        mask: (B, T) bool, or (B,) for whole sequences, or None.
        output: what the model gave; logits (B, T, K) are laid out too, and what is of another shape is left out.
        shift: the feature at t has the label at t + 1; the last of each sequence has none.

    Returns:
        features (N, d), labels (N,), mask (N,) or None, and logits (N, K).

    Raises:
        ValueError: the shapes do not fit together.
    """
    B, T = features.shape[:2]
    if labels.shape != (B, T):
        raise ValueError(f"labels must have shape ({B}, {T}) as the tokens have, got {tuple(labels.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((B,), (B, T))):
        raise ValueError(f"mask must be bool ({B}, {T}) or ({B},), got {mask.dtype} {tuple(mask.shape)}")
    logits = [x for x in output if x.ndim == 3 and x.shape[:2] == (B, T)]
    if mask is not None:
        mask = mask[:, None].expand(B, T) if mask.ndim == 1 else mask
    if shift:
        features, logits = features[:, :-1], [x[:, :-1] for x in logits]
        labels, mask = labels[:, 1:], None if mask is None else mask[:, 1:]
    flat = [x.flatten(0, 1) for x in logits]
    return features.flatten(0, 1), labels.flatten(), None if mask is None else mask.flatten(), flat


def counted(labels: Tensor, mask: Tensor | None, ignore_index: int | None) -> Tensor | None:
    """Tell which samples count: (B,) bool, or None if all do."""
    if ignore_index is None:
        return mask
    known = labels != ignore_index
    return known if mask is None else known & mask.to(known.device)
