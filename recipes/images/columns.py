"""Columns of a data set that hold images and labels."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets

from recipes.errors import UserError
from recipes.images.labels import shorten

FOLDER_COLUMN = "class_folder"
"""Label by folder, where a metadata file has a column `label` of its own."""

# Names of label columns, where there is no column `label`.
_USUAL = ("labels", "class", "cls", "target", "category", "y")


def leaves(features: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Columns, and the fields of columns of records, as `column.field`."""
    for name, feature in features.items():
        if isinstance(feature, dict) and not is_image(feature):
            yield from leaves(feature, f"{prefix}{name}.")
        else:
            yield prefix + name, feature


def is_image(feature: Any) -> bool:
    """Whether a column holds encoded images: as such, as bytes, or as records of bytes and path."""
    if isinstance(feature, dict):
        return "bytes" in feature and feature.keys() <= {"bytes", "path"} and is_image(feature["bytes"])
    return isinstance(feature, datasets.Image) or is_value(feature, ("binary", "large_binary"))


def is_label(feature: Any) -> bool:
    """Whether values of this type tell classes apart."""
    return isinstance(feature, datasets.ClassLabel) or is_value(feature, ("int", "uint", "bool", "string", "large_str"))


def is_value(feature: Any, kinds: tuple[str, ...]) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)


def find_image_column(features: Mapping[str, Any], given: str | None = None, *, split: str) -> str:
    """The column given, or the only one of images, or that of several which is called `image`.

    Raises:
        UserError: there is no such column, or it is not clear which.
    """
    fitting = [name for name, feature in features.items() if is_image(feature)]
    declared = [name for name in fitting if isinstance(features[name], datasets.Image)]
    if given is not None:
        if given not in fitting:
            problem = "does not hold images" if given in features else f"is not in split {split!r}"
            raise UserError(f"image_column {given!r} {problem}; columns: {shorten([*features])}")
        return given
    candidates = declared or fitting
    if len(candidates) > 1 and "image" in candidates:
        return "image"
    return _only(candidates, features, f"image_column of split {split!r}", "an image")


def find_label_column(features: Mapping[str, Any], image_column: str, given: str | None = None, *, split: str) -> str:
    """The column given, or `label`, or the only one that can be it: first of class labels, then of the usual names,
    then of integers, truth values or strings, then of fields of records.

    Raises:
        UserError: there is no such column, or it is not clear which.
    """
    where = f"label_column of split {split!r}"
    every = {name: feature for name, feature in leaves(features) if name != image_column}
    if given is not None:
        if given not in every and given not in features:
            columns = shorten([name for name, _ in leaves(features)])
            raise UserError(f"label_column {given!r} is not in split {split!r}; columns: {columns}")
        return given
    named = [name for name in every if name in ("label", FOLDER_COLUMN) or name.startswith("label.")]
    if named:
        return _only(named, every, where, "a label")
    fitting = {name: feature for name, feature in every.items() if is_label(feature) and not name.startswith("__")}
    top, nested = ([name for name in fitting if (name in features) == whether] for whether in (True, False))
    kinds = (
        [name for name in top if isinstance(fitting[name], datasets.ClassLabel)],
        [name for name in top if name in _USUAL],
        top,
        [name for name in nested if name.split(".")[-1] == "label"],
        [name for name in nested if name.split(".")[-1] in _USUAL],
        nested,
    )
    return _only(next(filter(None, kinds), []), every, where, "a label")


def _only(candidates: list[str], columns: Iterable[str], flag: str, kind: str) -> str:
    if len(candidates) != 1:
        raise UserError(
            f"{flag} must be given: columns that may hold {kind} are {shorten(candidates)}; "
            f"columns: {shorten([*columns])}"
        )
    return candidates[0]
