"""Images and classes out of any Hugging Face image data set.

A data set is the embedded `digits`, a folder (parquet files, images sorted into a folder per class, or what
`save_to_disk` wrote), or a data set of the Hub. No code of a data set is ever run. Images stay encoded until a worker
decodes one; classes are read at once and checked.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset, Sampler
from torchvision import transforms

from recipes.images.augment import Cutout, seeded
from recipes.images.digits import digits
from recipes.images.workers import ImageLoader


class CorruptImageError(ValueError):
    """An image that cannot be decoded.

    A DataLoader worker passes an exception on by calling its class with a traceback as the message; of this only the
    message proper is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().rsplit("CorruptImageError: ", 1)[-1])


@dataclass(frozen=True)
class ImageSplit:
    """One split of a data set: rows with an image column, and the class of each row, (N,) in 0..K-1."""

    name: str
    rows: datasets.Dataset
    image_column: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def read(self, index: int, mode: str) -> Image.Image:
        """Decode an image.

        Args:
            index: row number.
            mode: 'L' or 'RGB'.

        Raises:
            CorruptImageError: the image is missing or cannot be decoded.
        """
        try:
            return self.rows[index][self.image_column].convert(mode)
        except (OSError, ValueError, SyntaxError, AttributeError, Image.DecompressionBombError) as error:
            reason = "missing" if isinstance(error, AttributeError) else " ".join(str(error).split())
            raise CorruptImageError(f"image {index} of split {self.name!r} cannot be decoded: {reason}") from None

    @property
    def fingerprint(self) -> str:
        """Identity of the split: hash of its class names and of the classes in order."""
        names = "\0".join(self.class_names).encode()
        return hashlib.sha256(names + b"\0\0" + self.labels.astype("<i8").tobytes()).hexdigest()


def open_dataset(name: str, config: str | None = None, revision: str | None = None) -> Mapping[str, datasets.Dataset]:
    """The splits of a data set.

    Args:
        name: 'digits', a folder, or a Hub data set id.
        config: configuration name of a Hub data set, or of a folder whose README.md has some.
        revision: commit, tag or branch of a Hub data set.

    Raises:
        ValueError: there is no such data set, it cannot be read without running its code, or it has no configurations
            or revisions and one is given.
    """
    folder = Path(name)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    local = name == "digits" or folder.is_dir()
    for flag, value, pointless in (("config", config, name == "digits" or saved), ("revision", revision, local)):
        if value is not None and pointless:
            raise ValueError(f"dataset_{flag} is {value!r}; allowed: none for dataset {name!r}, which has no {flag}s")
    if name == "digits":
        return digits()
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"dataset {name!r} is not a folder; allowed: 'digits', a folder, or a Hub data set id")
    try:
        if saved:
            opened = datasets.load_from_disk(name)
        else:
            opened = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # the readers of the many formats share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"dataset {name!r} cannot be opened: {reason}; allowed: 'digits', a folder, or a Hub data set id"
        ) from error
    if isinstance(opened, datasets.Dataset):  # saved alone
        return {str(opened.split or "train"): opened}
    return {str(split): rows for split, rows in opened.items()}


def load_splits(
    splits: Mapping[str, datasets.Dataset],
    *,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[ImageSplit, ImageSplit]:
    """Find images and classes in the train and the test split, and check the classes.

    Class names come from the label column's features; plain integers are named by themselves, their number K being
    one more than the largest in the train split.

    Raises:
        ValueError: a split or column that is not there, an empty split, or a class outside 0..K-1.
    """
    for flag, split in (("train_split", train_split), ("test_split", test_split)):
        if split not in splits:
            raise ValueError(f"{flag} {split!r} is not in the data set; allowed: {_listed(splits)}")
        if not len(splits[split]):
            raise ValueError(f"{flag} {split!r} is empty; allowed: a split of 1 image or more")
    if train_split == test_split:
        raise ValueError(f"test_split {test_split!r} is the train split; allowed: another of {_listed(splits)}")
    features = splits[train_split].features
    image_column = _find_column(features, image_column, "image_column", "an image", _is_image)
    label_column = _find_column(features, label_column, "label_column", "a class label or an integer", _is_label)
    for flag, column, fits in (("image", image_column, _is_image), ("label", label_column, _is_label)):
        there = splits[test_split].features
        if column not in there or not fits(there[column]):
            raise ValueError(f"{flag}_column {column!r} is not in split {test_split!r}; columns: {_listed(there)}")
    names, test_names = (getattr(splits[s].features[label_column], "names", None) for s in (train_split, test_split))
    if names and test_names and names != test_names:
        raise ValueError(f"label_column {label_column!r} names its classes differently in split {test_split!r}")
    train_labels = _read_labels(train_split, splits[train_split], label_column, len(names) if names else None)
    names = tuple(names or map(str, range(train_labels.max() + 1)))
    test_labels = _read_labels(test_split, splits[test_split], label_column, len(names))
    return (
        ImageSplit(train_split, splits[train_split], image_column, train_labels, names),
        ImageSplit(test_split, splits[test_split], image_column, test_labels, names),
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _is_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image)


def _is_label(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    )


def _find_column(
    features: datasets.Features, given: str | None, flag: str, kind: str, fits: Callable[[Any], bool]
) -> str:
    """The column given, or the only one of its kind; class labels go before plain integers."""
    fitting = [column for column, feature in features.items() if fits(feature)]
    class_labels = [column for column in fitting if isinstance(features[column], datasets.ClassLabel)]
    if given is not None:
        if given not in fitting:
            problem = f"does not hold {kind}" if given in features else "is not in the data set"
            raise ValueError(f"{flag} {given!r} {problem}; columns: {_listed(features)}")
        return given
    candidates = class_labels or fitting
    if len(candidates) != 1:
        raise ValueError(
            f"{flag} must be given: columns that hold {kind} are {_listed(candidates)}; columns: {_listed(features)}"
        )
    return candidates[0]


def _read_labels(split: str, rows: datasets.Dataset, column: str, num_classes: int | None = None) -> np.ndarray:
    """Classes of all rows, (N,), checked to lie in 0..K-1."""
    labels = rows.select_columns([column]).with_format("arrow")[:][column].cast("int64").fill_null(-1).to_numpy()
    limit = num_classes or int(labels.max()) + 1
    wrong = (labels < 0) | (labels >= limit)
    if wrong.any():
        value = labels[wrong][0]
        hint = " (the split has no labels)" if value == -1 and wrong.all() else ""
        raise ValueError(
            f"split {split!r} has label {value} in {(labels == value).sum()} of {len(labels)} images{hint}; "
            f"allowed: 0 to {limit - 1}"
        )
    return labels


def eval_transform(data_config: dict[str, Any]) -> Any:
    """PIL image to normalised tensor (C, H, W), as timm evaluates."""
    return create_transform(**data_config, is_training=False)


def train_transform(
    data_config: dict[str, Any],
    *,
    crop_pad: int = 0,
    crop_scale: float | None = None,
    hflip: float = 0.0,
    color_jitter: float = 0.0,
    auto_augment: str | None = None,
    re_prob: float = 0.0,
    cutout: int = 0,
) -> Any:
    """PIL image to randomly augmented, normalised tensor (C, H, W), by timm's transforms.

    Without `crop_scale` the image is framed as in evaluation, then cropped at random out of `crop_pad` pixels of
    padding.
    """
    jitter: Any = color_jitter or None
    parts: Any = create_transform(
        **data_config,
        is_training=True,
        separate=True,
        scale=(crop_scale or 1.0, 1.0),
        hflip=hflip,
        color_jitter=jitter,
        auto_augment=auto_augment,
        re_prob=re_prob,
    )
    primary, secondary, final = (part.transforms for part in parts)
    frame = primary[:1]  # the random resized crop
    if crop_scale is None:
        frame = eval_transform(data_config).transforms[:-2]  # all but the conversion to a tensor and its normalisation
        if crop_pad:
            frame.append(transforms.RandomCrop(data_config["input_size"][-2:], padding=crop_pad))
    return transforms.Compose([*frame, *primary[1:], *secondary, *final, *([Cutout(cutout)] if cutout else [])])


def image_mode(channels: int) -> str:
    """PIL's mode of images of that many channels.

    Raises:
        ValueError: it has none for them.
    """
    if channels not in (1, 3):
        raise ValueError(f"the model takes images of {channels} channels; allowed: 1 or 3")
    return {1: "L", 3: "RGB"}[channels]


class ImageView(Dataset[tuple[torch.Tensor, int]]):
    """Some rows of a split, decoded and transformed: item i is (image (C, H, W), class).

    An item asked for as (i, draw) is augmented by random numbers that depend on `seed` and `draw` alone, so that
    training sees the same pixels on any number of ranks and workers.

    Args:
        split: the images.
        indices: rows of the split, (N,).
        transform: from `train_transform` or `eval_transform`.
        channels: of the model's input, 1 (grey) or 3 (colour); images are converted.
    """

    def __init__(self, split: ImageSplit, indices: Any, transform, *, channels: int = 3, seed: int = 0):
        self.split, self.indices = split, np.asarray(indices, dtype=np.int64)
        self.labels = split.labels[self.indices]
        self.transform, self.mode, self.seed = transform, image_mode(channels), seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        position, draw = item if isinstance(item, tuple) else (item, None)
        image = self.split.read(int(self.indices[position]), self.mode)
        if draw is None:
            return self.transform(image), int(self.labels[position])
        with seeded(self.seed, draw):
            return self.transform(image), int(self.labels[position])


def train_loader(view: ImageView, sampler: Sampler, *, workers: int | None, pin_memory: bool = False) -> ImageLoader:
    """Batches (images (B, C, H, W), labels (B,)) of one rank in the order of its sampler."""
    return ImageLoader(view, sampler, workers=workers, pin_memory=pin_memory, persistent=True)


def eval_batches(images: int, *, batch_size: int, rank: int, world: int) -> list[range]:
    """Positions of every image once over all ranks: rank r takes batches r, r + world, ... of batches that do not
    depend on `world`.

    So an image has the same batch mates, hence bit-equal features, on any number of ranks, and none is repeated to
    fill up a batch.
    """
    return [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)][rank::world]


def eval_loader(
    view: ImageView, *, batch_size: int, rank: int, world: int, workers: int | None, pin_memory: bool = False
) -> ImageLoader:
    """Batches (images (B, C, H, W), labels (B,)) of one rank, as `eval_batches` deals them out."""
    batches = eval_batches(len(view), batch_size=batch_size, rank=rank, world=world)
    return ImageLoader(view, batches, workers=workers, pin_memory=pin_memory, persistent=False)
