"""Imbalanced training sets, cut from a data set by index.

Validation images are carved out first; of what is left, a profile of recipes/imbalance/profiles.py says how many
images of each class to keep. A `Manifest` records the images chosen, so that a run can be repeated, checked and
compared.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from recipes.errors import UserError, check
from recipes.images.sources import ImageSplit
from recipes.imbalance.profiles import PROFILES, Groups, groups_of, rank_classes
from recipes.settings.config import TrainConfig
from recipes.settings.hub_name import is_hub_name
from recipes.training.download import fetch

# One random stream per purpose and class, so that one choice never moves another. The third orders classes by size.
_VALIDATION, _SUBSET, _TEST = 1, 2, 4


@dataclass(frozen=True)
class Manifest:
    """Which images of a split are trained on and validated on, and why.

    `indices` and `validation` are sorted row numbers of the train split, `counts` the number of training images per
    class, `groups` the classes of each group (none for a balanced set), `fingerprint` the identity of the data set.
    `class_names` is the label map: class k is what the data set calls by the k-th name. `test` are the rows of the
    train split that form the test split, where the data set has none; `skipped` says which images could not be decoded.
    What is None is left out of the file, as in those of earlier versions.
    """

    profile: str
    parameters: dict[str, Any]
    seed: int
    fingerprint: str
    counts: list[int]
    groups: Groups
    indices: list[int]
    validation: list[int]
    class_names: list[str] | None = None
    test: list[int] | None = None
    skipped: list[str] | None = None

    @property
    def _content(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def sha256(self) -> str:
        """Hash of everything the manifest says, independent of the spelling of the file."""
        text = json.dumps(self._content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({**self._content, "sha256": self.sha256})

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """Read a manifest back.

        Args:
            path: of the file, or the `hf-hub:` name of a run that has been pushed.

        Raises:
            UserError: there is no such file, it is not a manifest, or it was changed since it was written.
            HubError: it cannot be downloaded.
        """
        name = f"manifest {str(path)!r}"
        if is_hub_name(str(path)):
            path = fetch(str(path), ("manifest.json",), (), setting="manifest") / "manifest.json"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}; allowed: a manifest.json of a run") from None
        except ValueError as error:  # not JSON, or not even text
            raise UserError(f"{name} is not JSON: {error}; allowed: a manifest.json of a run") from None
        keys = [*(field.name for field in fields(cls)), "sha256"]
        needed = {field.name for field in fields(cls) if field.default is MISSING} | {"sha256"}
        if not isinstance(content, dict) or not needed <= content.keys() <= set(keys):
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
        listed = np.sort(np.array([*self.indices, *self.validation, *(self.test or ())], dtype=np.int64))
        if (twice := listed[1:][listed[1:] == listed[:-1]]).size:
            raise UserError(
                f"the manifest lists image {twice[0]} twice; allowed: once, to train, to validate or to test on"
            )
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

    def without(
        self, skipped: Mapping[str, Mapping[int, str]], rows: Mapping[str, tuple[ImageSplit, np.ndarray]]
    ) -> "Manifest":
        """The manifest less images that cannot be decoded, with the reasons.

        Args:
            skipped: of 'train', 'val' and 'test', what is wrong with an image, by its row.
            rows: of the same, the split of the data set and its rows that are left.

        Raises:
            UserError: a class is left without a training image.
        """
        split, indices = rows["train"]
        counts = np.bincount(split.labels[indices], minlength=len(self.counts)).tolist()
        for name, count in zip(split.class_names, counts, strict=True):
            check(
                count > 0, "skip_corrupt", sum(map(len, skipped.values())), f"1 or more images left of class {name!r}"
            )
        lost = [row for name, found in skipped.items() if rows[name][0] is split for row in found]
        validation = [i for i in self.validation if i not in lost]
        test = None if self.test is None else [i for i in self.test if i not in lost]
        messages = [message for found in skipped.values() for message in found.values()]
        chosen = {"indices": indices.tolist(), "validation": validation, "test": test}
        return replace(self, **chosen, counts=counts, skipped=messages or None)


def carve_validation(
    labels: np.ndarray,
    num_classes: int,
    *,
    fraction: float,
    seed: int,
    indices: np.ndarray | None = None,
    stream: int = _VALIDATION,
) -> tuple[np.ndarray, np.ndarray]:
    """Split the images into training and validation, class by class.

    Every class gives `fraction` of its images, rounded, but at least one and never its last.

    Args:
        labels: classes, (N,).
        fraction: part taken for validation, 0 <= fraction < 1; 0 takes none.
        indices: the images to split, sorted; all if not given.
        stream: of random numbers.

    Returns:
        Sorted indices of the training and of the validation images.
    """
    indices = np.arange(len(labels)) if indices is None else indices
    if fraction == 0:
        return indices, indices[:0]
    taken = []
    for k in range(num_classes):
        members = indices[labels[indices] == k]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        taken.append(np.random.default_rng((seed, stream, k)).permutation(members)[: max(count, 0)])
    validation = np.sort(np.concatenate(taken))
    return np.setdiff1d(indices, validation), validation


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
    test_fraction: float | None = None,
) -> Manifest:
    """Carve the test images if asked to, then those of validation, then apply an imbalance profile to what is left.

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
    kept, test = carve_validation(labels, num_classes, fraction=test_fraction or 0, seed=seed, stream=_TEST)
    pool, validation = carve_validation(labels, num_classes, fraction=val_fraction, seed=seed, indices=kept)
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
        class_names=list(class_names),
        test=test.tolist() if test_fraction else None,
    )


def choose_images(config: TrainConfig, split: ImageSplit) -> Manifest:
    """Choose the images of a run: those of the manifest given, or those that an imbalance profile chooses.

    Raises:
        UserError: a manifest of another data set, parameters that the profile does not allow, or no validation images
            to select by.
    """
    if config.manifest is not None:
        manifest = Manifest.load(config.manifest)
        manifest.check(fingerprint=split.fingerprint, labels=split.labels)
        fraction, carved = config.test_fraction, len(manifest.test or ())
        allowed = f"given or not as in the manifest, which has {carved} test images of the train split"
        check((fraction is None) == (carved == 0), "test_fraction", fraction, allowed)
        own = f"not given with a manifest that has {len(manifest.validation)} validation images"
        check(config.val_split is None or not manifest.validation, "val_split", config.val_split, own)
    else:
        manifest = build_manifest(
            split.labels,
            split.class_names,
            profile=config.profile,
            parameters=config.profile_parameters,
            fingerprint=split.fingerprint,
            bounds=None if config.bounds is None else (config.bounds[0], config.bounds[1]),
            val_fraction=0.0 if config.val_split else config.val_fraction,
            **config.only("seed", "grouping", "test_fraction"),
        )
    if config.select == "best" and not manifest.validation and config.val_split is None:
        raise UserError("select is 'best' without a validation image; allowed: 'last'")
    return manifest
