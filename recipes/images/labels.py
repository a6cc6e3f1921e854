"""Classes of rows, from labels as people store them: names, integers with or without gaps, truth values or strings.

A class is known by its name: that of a ClassLabel, or the label itself, written out. So the names of the classes in
order, which a run stores, are the map from the labels of any data set to the numbers of the run.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from recipes.errors import UserError

_ALLOWED = "class labels, integers of 0 or more, truth values or strings, one for each image"

pc: Any = pyarrow.compute  # whose functions are made at import
_MOST = 1 << 20  # classes that are counted from 0 on without looking whether they occur


def shorten(names: Sequence[str], most: int = 10) -> str:
    """Names in quotation marks, of which the last are left out where there are many."""
    listed = ", ".join(map(repr, names[:most])) or "none"
    return listed if len(names) <= most else f"{listed}, ... ({len(names)} in all)"


def column_values(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """A column in Arrow's own type; `a.b` is field b of a column of records a."""
    top, *fields = [column] if column in rows.column_names else column.split(".")
    values = rows.select_columns([top]).with_format("arrow")[:][top]
    for field in fields:
        values = pc.struct_field(values, field)
    return values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])


def read_labels(split: str, rows: datasets.Dataset, column: str, feature: Any) -> tuple[np.ndarray, list[str]]:
    """Labels of all rows, (N,), as positions in a list of names in ascending order, or that of a ClassLabel.

    Raises:
        UserError: missing or negative labels, or labels of a type that does not tell classes apart.
    """
    values = column_values(rows, column)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (strings or pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise UserError(f"label_column {column!r} of split {split!r} holds {kind}; allowed: {_ALLOWED}")
    absent = values.null_count
    if strings:
        absent += int(pc.sum(pc.equal(pc.utf8_trim_whitespace(values), "")).as_py() or 0)
    if absent:
        hint = " (the split has no labels)" if absent == len(values) else ""
        raise UserError(f"split {split!r} has no label in {absent} of {len(values)} images{hint}; allowed: {_ALLOWED}")
    labels = np.asarray(values.to_pylist(), dtype=object) if strings else values.to_numpy()
    if not strings:
        _check_range(split, labels, feature)
    if isinstance(feature, datasets.ClassLabel) and feature.names:
        return labels.astype(np.int64), list(feature.names)
    found, codes = np.unique(labels, return_inverse=True)
    return codes.astype(np.int64), [str(value) for value in found.tolist()]


def _check_range(split: str, labels: np.ndarray, feature: Any) -> None:
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    wrong = labels < 0 if labels.dtype != bool else np.zeros(len(labels), dtype=bool)
    allowed = "0 or more"
    if names:
        wrong |= labels >= len(names)
        allowed = f"0 to {len(names) - 1}"
    if wrong.any():
        value = labels[wrong][0]
        hint = " (the split has no labels)" if value == -1 and wrong.all() else ""
        raise UserError(
            f"split {split!r} has label {value} in {(labels == value).sum()} of {len(labels)} images{hint}; "
            f"allowed: {allowed}"
        )


def used_names(codes: np.ndarray, names: Sequence[str]) -> list[str]:
    """The names that occur, in their order."""
    return [names[int(k)] for k in np.unique(codes)]


def declared_names(names: list[str], feature: Any) -> list[str]:
    """The names of a ClassLabel; all integers from 0 on, where there are few missing; else the names that occur."""
    integers = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    if integers and int(names[-1]) < _MOST:
        return [str(number) for number in range(int(names[-1]) + 1)]
    return names


def match_names(split: str, codes: np.ndarray, names: Sequence[str], class_names: Sequence[str], whose: str) -> Any:
    """Numbers of classes, (N,), of labels that are positions in another list of names.

    Args:
        codes: positions in `names`, (N,).
        class_names: names of the classes 0, 1, ...
        whose: whom the classes belong to, for the error.

    Raises:
        UserError: a name that occurs is not that of a class.
    """
    number = {name: k for k, name in enumerate(class_names)}
    unknown = [name for name in used_names(codes, names) if name not in number]
    if unknown:
        images = int(np.isin(codes, [k for k, name in enumerate(names) if name not in number]).sum())
        raise UserError(
            f"split {split!r} has classes {shorten(unknown)} in {images} of {len(codes)} images; "
            f"allowed: those of {whose}, {shorten(class_names)}"
        )
    return np.array([number.get(name, -1) for name in names], dtype=np.int64)[codes]
