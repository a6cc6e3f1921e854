"""Input validation: features, labels and settings, each error in one line."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_tensor",
    "check_batch",
    "check_class_counts",
    "check_samples",
    "check_scatters",
    "short",
    "validate_features",
    "validate_values",
]

# K d^2 float64 that may be taken without having been asked for: K = 100 classes of d = 512 features fit.
SCATTER_BYTES = 256 * 2**20


def as_tensor(name: str, values: Tensor | Sequence[Any]) -> Tensor:
    """Make a tensor of an array or a list.

    Raises:
        ValueError: it is neither, or a tensor whose values cannot be read one by one.
    """
    if isinstance(values, Tensor):
        if values.is_meta or values.layout != torch.strided:
            raise ValueError(f"{name} must be dense and have values, got {values.layout} on {values.device}")
        return values
    try:
        return torch.tensor(values, device="cpu")  # a copy: of an array that is read-only no other can be made
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor, an array or a list, got {type(values).__name__}: {error}") from None


def check_samples(batch_size: int, labels: Tensor, mask: Tensor | None) -> None:
    """Check what is said of the samples of a forward pass: labels (B,), and a bool mask (B,) or none.

    Raises:
        ValueError: they have another shape or type.
    """
    if labels.shape != (batch_size,):
        raise ValueError(f"labels must have shape ({batch_size},) as the batch has, got {tuple(labels.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != labels.shape):
        raise ValueError(f"mask must be bool {tuple(labels.shape)}, got {mask.dtype} {tuple(mask.shape)}")


def check_batch(features: Tensor, labels: Tensor, num_features: int) -> None:
    """Check shapes and types: features floating point (B, d), labels integers (B,).

    Raises:
        ValueError: they are not so.
    """
    if features.ndim != 2 or features.shape[1] != num_features or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point of shape (B, {num_features}), "
            f"got {features.dtype} {tuple(features.shape)}"
        )
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape ({len(features)},) as features have, got {tuple(labels.shape)}")


def validate_values(
    features: Tensor, labels: Tensor, num_classes: int, *, batch: int, bad: Tensor, norms: Tensor | None = None
) -> Tensor:
    """Validate the values: at once on the CPU, by a flag kept on the accelerator otherwise.

    Args:
        features: (B, d), to be finite.
        labels: (B,), to be in 0..K-1.
        num_classes: K.
        batch: its number, for the message.
        bad: (2,) first batch with bad labels, and with bad features, on an accelerator; -1 if there was none so far.
        norms: (B,) of features on the CPU, if known.

    Returns:
        `bad`, with this batch in it.

    Raises:
        ValueError: bad values on the CPU.
    """
    low, high = labels.aminmax() if labels.numel() else labels.new_zeros(2)
    if labels.device.type == "cpu" and not 0 <= int(low) <= int(high) < num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {int(low)}..{int(high)} in batch {batch}")
    infinite = validate_features(features, batch=batch, norms=norms)
    if features.device.type == "cpu":
        return bad
    outside = (low < 0) | (high >= num_classes)
    found = torch.stack([outside.to(bad.device), infinite])
    return torch.where(found & (bad < 0), batch, bad)


def validate_features(features: Tensor, *, batch: int, norms: Tensor | None = None) -> Tensor:
    """Find out whether features (B, d), with norms (B,) if known, are not all finite: a bool on their device.

    Raises:
        ValueError: they are not, and on the CPU.
    """
    if features.device.type == "cpu" and math.isfinite(float((features if norms is None else norms).sum())):
        return torch.zeros((), dtype=torch.bool)  # NaN and infinity show in a sum; where that overflows, look closer
    extremes = torch.stack(features.aminmax()) if features.numel() else features.new_zeros(1)
    infinite = ~extremes.isfinite().all()
    if features.device.type == "cpu" and infinite:
        raise ValueError(f"features must be finite, got NaN or infinity in batch {batch}")
    return infinite


def check_class_counts(observed: Tensor, declared: Tensor) -> None:
    """Check that counts (K,) observed are in proportion to those declared.

    Raises:
        ValueError: they are not.
    """
    if not torch.allclose(observed * declared.sum(), declared * observed.sum(), rtol=1e-9, atol=0):
        raise ValueError(f"class_counts is {short(declared)} but the samples seen are {short(observed)}")


def check_scatters(num_classes: int, num_features: int) -> None:
    """Check the size of a scatter for each class.

    Raises:
        ValueError: it is more than one would take without being asked.
    """
    wanted = num_classes * num_features**2 * 8
    if wanted > SCATTER_BYTES:
        raise ValueError(
            f"a scatter for each of num_classes={num_classes} with num_features={num_features} takes "
            f"{wanted / 2**30:.1f} GiB: give class_counts (center='balanced'), or partition=torch.zeros(K) "
            "(center='empirical'), so that one is enough"
        )


def short(values: Tensor) -> str:
    """Format the first ten."""
    listed = ", ".join(f"{v:g}" for v in values.tolist()[:10])
    return f"[{listed}{', ...' if len(values) > 10 else ''}]"
