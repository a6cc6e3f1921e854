"""Imbalanced training sets, cut from a data set by index.

Validation images are carved out first; of what is left, a profile of recipes/imbalance/profiles.py says how many
images of each class to keep. A `Manifest` records the images chosen, so that a run can be repeated, checked and
compared.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from recipes.errors import UserError
from recipes.images.sources import ImageSplit
from recipes.imbalance.profiles import PROFILES, Groups, groups_of, rank_classes
from recipes.settings.config import TrainConfig
from recipes.settings.hub_name import is_hub_name
from recipes.training.download import fetch

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
            UserError: there is no such file, it is not a manifest, or it was changed since it was written.
        """
        name = f"manifest {str(path)!r}"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}; allowed: a manifest.json of a run") from None
        except ValueError as error:  # not JSON, or not even text
            raise UserError(f"{name} is not JSON: {error}; allowed: a manifest.json of a run") from None
        keys = [*(field.name for field in fields(cls)), "sha256"]
        if not isinstance(content, dict) or content.keys() != set(keys):
            found = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
            raise UserError(f"{name} holds {found or 'nothing'}; allowed: {', '.join(keys)}")
        expected = content.pop("sha256")
        manifest = cls(**content)
        if manifest.sha256 != expected:
            raise UserError(f"{name} has sha256 {manifest.sha256}, but says {expected}: it was changed")
        return manifest

    def check(
        self, *, fingerprint: str | None = None, num_images: int | None = None, labels: np.ndarray | None = None
    ) -> None:
        """Make sure that the manifest is about this data set, as far as the data set is given.

        Args:
            fingerprint: identity of the train split.
            num_images: N, the images of the train split; the number of labels if these are given instead.
            labels: classes of the train split, (N,).

        Raises:
            UserError: another data set, an image that is not there or is listed twice, or classes that are not those
                counted.
        """
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise UserError(f"the manifest is of data set {self.fingerprint}; allowed: {fingerprint}, this one")
        listed = np.sort(np.array([*self.indices, *self.validation], dtype=np.int64))
        if (twice := listed[1:][listed[1:] == listed[:-1]]).size:
            raise UserError(f"the manifest lists image {twice[0]} twice; allowed: once, to train or to validate on")
        if num_images is None:
            num_images = None if labels is None else len(labels)
        if num_images is not None and listed.size and not 0 <= listed[0] <= listed[-1] < num_images:
            outside = listed[-1] if listed[0] >= 0 else listed[0]
            raise UserError(f"the manifest lists image {outside}; allowed: 0 to {num_images - 1}")
        if labels is None:
            return
        trained = labels[np.array(self.indices, dtype=np.int64)]
        counts = np.bincount(trained, minlength=len(self.counts)).tolist()
        if len(counts) > len(self.counts):
            raise UserError(f"the manifest counts {len(self.counts)} classes; allowed: {len(counts)}, as labels have")
        for k, (said, found) in enumerate(zip(self.counts, counts, strict=True)):
            if said != found:
                raise UserError(f"the manifest counts {said} images of class {k}; allowed: {found}, by their labels")


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
    grouping: str | None = None,
    bounds: tuple[float, float] | None = None,
) -> Manifest:
    """Carve the validation images, then apply an imbalance profile to what is left.

    Args:
        labels: classes of the train split, (N,), each in 0..K-1.
        class_names: names of the K classes.
        profile: a key of `PROFILES`, with its keyword arguments in `parameters`, of which `class_order` may also be
            'given' or 'random', which the seed decides.
        grouping: rule of `groups_of`, with its `bounds`; the groups of the profile if not given.

    Raises:
        UserError: a class without a training image, or parameters that the profile does not allow.
    """
    if profile not in PROFILES:
        raise UserError(f"profile is {profile!r}; allowed: {', '.join(PROFILES)}")
    num_classes = len(class_names)
    pool, validation = carve_validation(labels, num_classes, fraction=val_fraction, seed=seed)
    sizes = np.bincount(labels[pool], minlength=num_classes)
    if not sizes.all():
        k = int(np.argmin(sizes))
        raise UserError(
            f"class {k} ({class_names[k]!r}) has no image in the train split; allowed: 1 or more of every class"
        )
    arguments = dict(parameters)
    if "class_order" in arguments:
        arguments["class_order"] = rank_classes(arguments["class_order"], num_classes, seed=seed)
    counts, groups = PROFILES[profile](sizes, **arguments)
    return Manifest(
        profile=profile,
        parameters=dict(parameters),
        seed=seed,
        fingerprint=fingerprint,
        counts=counts.tolist(),
        groups=groups if grouping is None else groups_of(counts, grouping, bounds),
        indices=subsample(labels, pool, counts, seed=seed).tolist(),
        validation=validation.tolist(),
    )


def choose_images(config: TrainConfig, split: ImageSplit) -> Manifest:
    """Choose the images of a run: those of the manifest given, or those that an imbalance profile chooses.

    Raises:
        UserError: a manifest of another data set, parameters that the profile does not allow, or no validation images
            to select by.
    """
    if config.manifest is not None:
        path = Path(config.manifest)
        if is_hub_name(config.manifest):
            path = fetch(config.manifest, ("manifest.json",), (), setting="manifest") / "manifest.json"
        manifest = Manifest.load(path)
        manifest.check(fingerprint=split.fingerprint, labels=split.labels)
    else:
        manifest = build_manifest(
            split.labels,
            split.class_names,
            profile=config.profile,
            parameters=config.profile_parameters,
            fingerprint=split.fingerprint,
            bounds=None if config.bounds is None else (config.bounds[0], config.bounds[1]),
            **config.only("val_fraction", "seed", "grouping"),
        )
    if config.select == "best" and not manifest.validation:
        raise UserError("select is 'best' without a validation image; allowed: 'last'")
    return manifest
