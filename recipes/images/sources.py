"""Images and classes out of any Hugging Face image data set.

A data set is the embedded `digits`, a folder (images sorted into a folder per class, parquet and other files, or what
`save_to_disk` wrote), or a data set of the Hub. No code of a data set is ever run. Images stay encoded until a worker
decodes one; classes are read at once and checked.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from recipes.errors import UserError
from recipes.images.columns import find_image_column, find_label_column, leaves
from recipes.images.digits import digits
from recipes.images.files import SPLIT_NAMES, LayoutError, has_configurations
from recipes.images.folders import open_folder
from recipes.images.hub_pictures import download_pictures
from recipes.images.labels import declared_names, match_names, read_labels, shorten, used_names
from recipes.images.pixels import decode_image
from recipes.images.tables import with_pictures

_ALLOWED = "'digits', a folder, or a Hub data set id"


class CorruptImageError(UserError):
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
    label_column: str = "label"

    @cached_property
    def encoded(self) -> datasets.Dataset:
        """The images alone, not decoded, whatever format the rows were saved with."""
        plain = self.rows.with_format(None).select_columns([self.image_column])
        return plain.cast_column(self.image_column, datasets.Image(decode=False))

    def content(self, index: int) -> tuple[bytes | None, str | None]:
        """An encoded image and its path, as far as the data set has them."""
        item = self.encoded[index][self.image_column] or {}
        return item.get("bytes"), item.get("path")

    def read(self, index: int, mode: str) -> Image.Image:
        """Decode an image.

        Args:
            index: row number.
            mode: 'L' or 'RGB'.

        Raises:
            CorruptImageError: the image is missing or cannot be decoded.
        """
        content, path = self.content(index)
        try:
            if content is None and path is None:
                raise ValueError("missing")
            stored_mode = getattr(self.rows.features[self.image_column], "mode", None)
            return decode_image(path if content is None else content, mode, stored_mode=stored_mode)  # type: ignore
        except Exception as error:  # decoders raise whatever they please
            reason = " ".join(str(error).split()) or type(error).__name__
            where = f" ({path})" if path else ""
            raise CorruptImageError(
                f"image {index} of split {self.name!r}{where} cannot be decoded: {reason}"
            ) from None

    def renumbered(self, class_names: Sequence[str], whose: str) -> "ImageSplit":
        """The split with classes matched by name to others.

        Args:
            class_names: names of the classes 0, 1, ...
            whose: whom they belong to, for the error.

        Raises:
            UserError: a class that occurs is not among them.
        """
        labels = match_names(self.name, self.labels, self.class_names, class_names, whose)
        return replace(self, labels=labels, class_names=tuple(class_names))

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
        UserError: there is no such data set, it cannot be read without running its code, or it has no configurations
            or revisions and one is given.
    """
    folder = Path(name).expanduser()
    local = name == "digits" or (name != "" and folder.is_dir())
    configured = local and name != "digits" and (config is not None or has_configurations(folder))
    plain = name == "digits" or _is_saved(folder)
    for flag, value, pointless in (("config", config, plain), ("revision", revision, local)):
        if value is not None and pointless:
            raise UserError(f"dataset_{flag} is {value!r}; allowed: none for dataset {name!r}, which has no {flag}s")
    if name == "digits":
        return digits()
    if not local and (not name.strip() or _is_reader(name)):
        raise UserError(f"dataset is {name!r}, which names no data; allowed: {_ALLOWED}")
    if not local and (folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UserError(f"dataset {name!r} is not a folder; allowed: {_ALLOWED}")
    try:
        if local and _is_saved(folder):
            return _open_saved(folder)
        if local and not configured:
            return open_folder(folder)
        if not local and config is None and (downloaded := download_pictures(name, revision)):
            return open_folder(downloaded)
        opened = datasets.load_dataset(str(folder.resolve()) if local else name, config, revision=revision)
    except LayoutError:
        raise
    except Exception as error:  # the readers of the many formats share no base class
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"dataset {name!r} cannot be opened: {reason}; allowed: {_ALLOWED}") from error
    assert isinstance(opened, datasets.DatasetDict)
    return {str(split): with_pictures(rows, [folder] if local else []) for split, rows in opened.items()}


def _is_reader(name: str) -> bool:
    """Whether `datasets` knows a reader of files by this name, which would read the current directory."""
    return name.isidentifier() and find_spec(f"datasets.packaged_modules.{name}") is not None


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json")) or bool(_saved_splits(folder))


def _saved_splits(folder: Path) -> dict[str, Path]:
    """Folders of splits that were saved one by one."""
    inner = {SPLIT_NAMES.get(path.parent.name.lower()): path.parent for path in sorted(folder.glob("*/state.json"))}
    return {name: path for name, path in inner.items() if name is not None}


def _open_saved(folder: Path) -> dict[str, datasets.Dataset]:
    """What `save_to_disk` wrote, in the format in which rows are plain."""
    opened: Any
    if apart := _saved_splits(folder) if not (folder / "dataset_dict.json").exists() else {}:
        opened = {name: datasets.load_from_disk(path) for name, path in apart.items()}
    else:
        opened = datasets.load_from_disk(folder)
    if isinstance(opened, datasets.Dataset):  # saved alone
        opened = {str(opened.split or "train"): opened}
    return {str(split): with_pictures(rows.with_format(None), [folder]) for split, rows in opened.items()}


def load_splits(
    splits: Mapping[str, datasets.Dataset],
    *,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[ImageSplit, ImageSplit]:
    """Find images and classes in the train and the test split, and check the classes.

    Raises:
        UserError: as of `load_split`; or the test split is the train split, or has a class that the train split lacks.
    """
    _check_split(splits, "train_split", train_split)
    _check_split(splits, "test_split", test_split)
    if train_split == test_split:
        raise UserError(f"test_split {test_split!r} is the train split; allowed: another of {shorten([*splits])}")
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    train = load_split(splits, train_split, **columns, class_names=class_names)
    return train, load_like(splits, test_split, train)


def load_like(splits: Mapping[str, datasets.Dataset], name: str, train: ImageSplit) -> ImageSplit:
    """Another split of the data set, with the columns and the classes of the train split.

    Raises:
        UserError: as of `load_split`; or it has a class that the train split lacks.
    """
    columns: dict[str, Any] = {"image_column": train.image_column, "label_column": train.label_column}
    return load_split(splits, name, **columns, class_names=train.class_names, whose=f"split {train.name!r}")


def load_split(
    splits: Mapping[str, datasets.Dataset],
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    whose: str = "the model",
    declared: bool = False,
) -> ImageSplit:
    """Find images and classes in a split, and check the classes.

    Args:
        class_names: names of the classes 0, 1, ..., by which labels are matched; those that occur if not given.
        whose: whom these classes belong to, for the error.
        declared: without `class_names`, whether classes that do not occur are classes nevertheless: those of a
            ClassLabel, or the integers from 0 on.

    Raises:
        UserError: a split or column that is not there, an empty split, or labels that are no classes.
    """
    image_column, label_column = find_columns(splits, name, image_column=image_column, label_column=label_column)
    rows = splits[name]
    feature = {**dict(leaves(rows.features)), **rows.features}[label_column]
    codes, names = read_labels(name, rows, label_column, feature)
    if class_names is None:
        class_names = declared_names(names, feature) if declared else used_names(codes, names)
    labels = match_names(name, codes, names, class_names, whose)
    return ImageSplit(name, rows, image_column, labels, tuple(class_names), label_column)


def find_columns(
    splits: Mapping[str, datasets.Dataset], name: str, *, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Columns of the images and of the labels of a split: those given, or those that are found.

    Raises:
        UserError: a split or a column that is not there, or several that may be meant.
    """
    _check_split(splits, "split", name)
    image_column = find_image_column(splits[name].features, image_column, split=name)
    return image_column, find_label_column(splits[name].features, image_column, label_column, split=name)


def _check_split(splits: Mapping[str, datasets.Dataset], flag: str, name: str) -> None:
    if name not in splits:
        raise UserError(f"{flag} {name!r} is not in the data set; allowed: {shorten([*splits])}")
    if not len(splits[name]):
        raise UserError(f"{flag} {name!r} is empty; allowed: a split of 1 image or more")
