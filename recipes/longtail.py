"""Imbalanced training sets, cut from a data set by index.

With n_A the size of the smallest class and K_A of the K classes in the majority, the two-group profile of the
layer-peeled model keeps n_A images of each majority class and n_B = n_A // R of each minority class, R >= 1 being the
imbalance ratio. A `Manifest` records the images chosen, so that a run can be repeated, checked and compared.

Source: Fang, He, Long & Su, "Exploring deep neural networks via layer-peeled model: Minority collapse in imbalanced
training", PNAS 2021 (arXiv 2101.12699).
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Groups = dict[str, list[int]]

# One random stream per purpose and class, so that one choice never moves another.
_VALIDATION, _SUBSET = 1, 2


@dataclass(frozen=True)
class Manifest:
    """Which images of a split are trained on and validated on, and why.

    `indices` and `validation` are sorted row numbers of the train split, `counts` the number of training images per
    class, `groups` the classes of each group (none for a balanced set), `fingerprint` the identity of the data set.
    """

    profile: str
    parameters: dict[str, Any]
    seed: int
    fingerprint: str
    counts: list[int]
    groups: Groups
    indices: list[int]
    validation: list[int]

    @property
    def sha256(self) -> str:
        """Hash of everything the manifest says, independent of the spelling of the file."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "sha256": self.sha256})

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """Read a manifest back.

        Raises:
            ValueError: the file was changed since it was written.
        """
        content = json.loads(Path(path).read_text())
        expected = content.pop("sha256")
        manifest = cls(**content)
        if manifest.sha256 != expected:
            raise ValueError(
                f"manifest {str(path)!r} has sha256 {manifest.sha256}, but says {expected}: it was changed"
            )
        return manifest


def balanced(sizes: np.ndarray) -> tuple[np.ndarray, Groups]:
    """As many images of every class as the smallest class has.

    Args:
        sizes: images at hand per class, (K,).

    Returns:
        Images to keep per class (K,), and no groups.
    """
    return np.full_like(sizes, sizes.min()), {}


def two_group(sizes: np.ndarray, *, majority: int | list[int], ratio: float) -> tuple[np.ndarray, Groups]:
    """n_A images of each majority class, n_A // R of each minority class.

    Args:
        sizes: images at hand per class, (K,).
        majority: K_A, meaning the first K_A classes, or the majority classes themselves.
        ratio: R = n_A / n_B, at least 1.

    Returns:
        Images to keep per class (K,), and the classes of the groups 'majority' and 'minority'.

    Raises:
        ValueError: K_A outside 0..K, a class outside 0..K-1 or given twice, R below 1, R so large that a minority
            class is empty.
    """
    num_classes, largest = len(sizes), int(sizes.min())
    if isinstance(majority, int):
        if not 0 <= majority <= num_classes:
            raise ValueError(f"majority (K_A) is {majority}; allowed: 0 to {num_classes}, the number of classes")
        majority = list(range(majority))
    if len(set(majority)) < len(majority) or not set(majority) <= set(range(num_classes)):
        raise ValueError(f"majority is {majority}; allowed: different classes out of 0 to {num_classes - 1}")
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"ratio (R) is {ratio:g}; allowed: 1 or more")
    minority = [k for k in range(num_classes) if k not in set(majority)]
    smallest = int(largest // ratio)
    if minority and smallest < 1:
        raise ValueError(
            f"ratio (R) is {ratio:g}, which leaves a minority class empty; allowed: 1 to {largest}, "
            "the size of a majority class"
        )
    counts = np.full(num_classes, largest)
    counts[minority] = smallest
    return counts, {"majority": sorted(majority), "minority": minority}


PROFILES: dict[str, Callable[..., tuple[np.ndarray, Groups]]] = {"balanced": balanced, "two_group": two_group}


def carve_validation(
    labels: np.ndarray, num_classes: int, *, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split the images into training and validation, class by class.

    Every class gives `fraction` of its images, rounded, but at least one and never its last.

    Args:
        labels: classes, (N,).
        fraction: part taken for validation, 0 <= fraction < 1; 0 takes none.

    Returns:
        Sorted indices of the training and of the validation images.
    """
    if fraction == 0:
        return np.arange(len(labels)), np.arange(0)
    taken = []
    for k in range(num_classes):
        members = np.flatnonzero(labels == k)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        taken.append(np.random.default_rng((seed, _VALIDATION, k)).permutation(members)[: max(count, 0)])
    validation = np.sort(np.concatenate(taken))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def subsample(labels: np.ndarray, indices: np.ndarray, counts: np.ndarray, *, seed: int) -> np.ndarray:
    """Choose counts[k] of the images of each class k.

    A smaller count chooses a subset of what a larger one chooses at the same seed, so sets of different R are nested.

    Args:
        labels: classes of the whole split, (N,).
        indices: the images to choose from, (M,).
        counts: images to keep per class, (K,).

    Returns:
        Sorted indices, (sum of counts,).
    """
    chosen = []
    for k, count in enumerate(counts):
        members = indices[labels[indices] == k]
        chosen.append(np.random.default_rng((seed, _SUBSET, k)).permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def build_manifest(
    labels: np.ndarray,
    class_names: tuple[str, ...],
    *,
    profile: str,
    parameters: Mapping[str, Any],
    val_fraction: float,
    seed: int,
    fingerprint: str,
) -> Manifest:
    """Carve the validation images, then apply an imbalance profile to what is left.

    Args:
        labels: classes of the train split, (N,), each in 0..K-1.
        class_names: names of the K classes.
        profile: a key of `PROFILES`, with its keyword arguments in `parameters`.

    Raises:
        ValueError: a class without a training image, or parameters that the profile does not allow.
    """
    num_classes = len(class_names)
    pool, validation = carve_validation(labels, num_classes, fraction=val_fraction, seed=seed)
    sizes = np.bincount(labels[pool], minlength=num_classes)
    if not sizes.all():
        k = int(np.argmin(sizes))
        raise ValueError(
            f"class {k} ({class_names[k]!r}) has no image in the train split; allowed: 1 or more of every class"
        )
    counts, groups = PROFILES[profile](sizes, **parameters)
    return Manifest(
        profile=profile,
        parameters=dict(parameters),
        seed=seed,
        fingerprint=fingerprint,
        counts=counts.tolist(),
        groups=groups,
        indices=subsample(labels, pool, counts, seed=seed).tolist(),
        validation=validation.tolist(),
    )
