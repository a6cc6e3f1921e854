"""Batches of a loader: what the model is given, the labels, and which samples count."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nc_probe.hooks.heads import unwrap

__all__ = ["Batch", "Entry", "keyword_names", "read_batch", "to_device"]

Entry = str | int
"""Where something is in a batch: the key of a mapping, the position in a tuple."""

LABELS = ("labels", "label", "label_ids", "targets", "target", "y")
IMAGES = ("pixel_values", "image", "images", "img", "inputs", "input", "x")


class Batch(NamedTuple):
    """model(*args, **kwargs), labels (B,) or None, and a mask (B,), False for what is not to be counted, or None."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    mask: Any


def keyword_names(model: nn.Module) -> set[str]:
    """Names of the keywords that a model takes; none where its signature cannot be read."""
    try:
        parameters = inspect.signature(unwrap(model).forward).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def read_batch(
    batch: Any,
    keywords: set[str],
    *,
    inputs: Entry | Sequence[str] | None = None,
    labels: Entry | None = None,
    mask: Entry | None = None,
    labelled: bool = True,
) -> Batch:
    """Take a batch apart.

    Args:
        batch: a tuple or a list, of which the first entry is what the model is given and the second the labels; or a
            mapping, of which the model is given the entries that it has a keyword for, or else its images; without
            labels a tensor too, which is what the model is given.
        keywords: of the model.
        inputs, labels, mask: the entries, where they are others. A mapping's entry called "mask" is one.
        labelled: whether there must be labels. If not, they are read only where `labels` names them.

    Raises:
        ValueError: one of them is not there.
    """
    named = labels is not None
    if isinstance(batch, Tensor) and not labelled:
        batch = (batch,)
    if isinstance(batch, Mapping):
        entries = dict(batch)
        labels = next((name for name in LABELS if name in entries), None) if labels is None else labels
        mask = "mask" if mask is None and "mask" in entries else mask
    elif isinstance(batch, tuple | list):
        entries = dict(enumerate(batch))
        labels, inputs = 1 if labels is None else labels, 0 if inputs is None else inputs
    else:
        raise ValueError(
            f"loader must give tuples, lists or mappings with images and labels, got a {type(batch).__name__}"
        )
    found = _entry(entries, "labels", labels) if labelled or named else None
    shown = None if mask is None else _entry(entries, "mask", mask)
    if inputs is None:
        inputs = _find_inputs([name for name in entries if name not in (labels, mask)], keywords)
    names = [inputs] if isinstance(inputs, str | int) else list(inputs)
    values: dict[Any, Any] = {name: _entry(entries, "inputs", name) for name in names}
    if len(names) > 1 or names[0] in keywords:
        return Batch((), values, found, shown)
    return Batch(tuple(values.values()), {}, found, shown)


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Move the tensors in a value, in mappings, tuples and lists too; those of floating point to `dtype`, if given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: to_device(v, device, dtype) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_device(v, device, dtype) for v in value]
    return value


def _find_inputs(names: Sequence[Any], keywords: set[str]) -> Entry | list[str]:
    known = [name for name in names if name in keywords]
    if known:
        return known
    image = next((name for name in IMAGES if name in names), None)
    if image is None and len(names) != 1:
        raise ValueError(
            f"inputs must name entries of a batch, which has {names or 'nothing but labels'}: none of them is a "
            "keyword of the model"
        )
    return names[0] if image is None else image


def _entry(entries: Mapping[Any, Any], what: str, key: Entry | None) -> Any:
    if key is None or key not in entries:
        got = f"none of {LABELS}" if key is None else repr(key)
        raise ValueError(f"{what} must be an entry of a batch, one of {list(entries)}, got {got}: name it by {what}=")
    return entries[key]
