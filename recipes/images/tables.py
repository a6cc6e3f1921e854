"""Files that hold many images, or name them: parquet and the like.

They are split by their folder, or by their own names where each has that of one split as a word.
"""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets

from recipes.images.files import SPLIT_NAMES, LayoutError, is_picture
from recipes.images.labels import column_values, shorten

# Files that hold many images or name them, by extension: the reader of `datasets`, its arguments, and whether they can
# hold the images themselves.
_READERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    ".parquet": ("parquet", {}, True),
    ".arrow": ("arrow", {}, True),
    ".tar": ("webdataset", {}, True),
    ".csv": ("csv", {}, False),
    ".tsv": ("csv", {"sep": "\t"}, False),
    ".jsonl": ("json", {}, False),
    ".json": ("json", {}, False),
}

_SHARD = re.compile(r"(?P<name>.+?)-\d{5}-of-\d{5}")
_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_NAMES)})(?![a-z])", re.IGNORECASE)


def is_table(path: str) -> bool:
    """Whether a file may hold many images or name them."""
    return Path(path).suffix.lower() in _READERS


def holds_images(file: str) -> bool:
    return _READERS[Path(file).suffix.lower()][2]


def names_pictures(path: Path) -> bool:
    """Whether the beginning of a text has the path of an image."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return any(map(is_picture, re.split(r"[,;\t\n\"']", file.read(1 << 16))))
    except OSError:
        return False


def open_tables(folder: Path, tables: Sequence[str]) -> dict[str, datasets.Dataset]:
    """Splits of files that hold many images, all of one kind.

    Raises:
        LayoutError: files of two kinds, or of which some belong to no split.
    """
    kinds = {Path(file).suffix.lower() for file in tables}
    holding = sorted(kind for kind in kinds if _READERS[kind][2])
    if len(holding) > 1:
        raise LayoutError(f"folder {str(folder)!r} has files of kinds {shorten(holding)}; allowed: one kind")
    kind = (holding or [kind for kind in _READERS if kind in kinds])[0]
    files = [file for file in tables if file.lower().endswith(kind)]
    reader, arguments, _ = _READERS[kind]
    opened = {}
    for split, members in _split_files(folder, files).items():
        found = {"train": [glob.escape(str((folder / file).resolve())) for file in members]}
        rows = datasets.load_dataset(reader, data_files=found, split="train", **arguments)
        assert isinstance(rows, datasets.Dataset)
        opened[split] = with_pictures(rows, [folder, (folder / members[0]).parent])
    return opened


def with_pictures(rows: datasets.Dataset, bases: Iterable[Path]) -> datasets.Dataset:
    """Columns of paths of images become columns of images.

    Args:
        bases: folders that relative paths may start from; the first in which the first image lies is taken.
    """
    for name, feature in rows.features.items():
        if not (isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")):
            continue
        first = next((path for path in (rows[i][name] for i in range(min(len(rows), 5))) if path), "")
        if not is_picture(first):
            continue
        base = next((base for base in bases if (base / first).exists()), None)
        if base is None:
            continue
        paths = [path and str(base / path) for path in column_values(rows, name).to_pylist()]
        rows = rows.add_column(f"{name} in full", paths).remove_columns(name).rename_column(f"{name} in full", name)  # type: ignore
        rows = rows.cast_column(name, datasets.Image())
    return rows


def _split_files(folder: Path, files: Sequence[str]) -> dict[str, list[str]]:
    levels = {file.partition("/")[0] for file in files if "/" in file}
    if levels and len(levels) > sum(name.lower() in SPLIT_NAMES for name in levels):
        inside = files  # of folders such as data/, whose files are split by their own names
    else:
        inside = [file for file in files if "/" not in file]
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file, by_name=file in inside), []).append(file)
    if "" in splits and (len(splits) > 1 or any(_words(Path(file).stem) for file in splits[""])):
        raise LayoutError(
            f"folder {str(folder)!r} has {shorten(splits[''], 3)}, of no one split; allowed: files such as "
            "train.parquet, train-00000-of-00001.parquet or files in folders train, validation, test"
        )
    return {split or "train": members for split, members in splits.items()}


def _split_of(file: str, *, by_name: bool) -> str:
    """The split of a file, or nothing."""
    first, _, rest = file.partition("/")
    if rest and not by_name:
        return SPLIT_NAMES[first.lower()]
    stem = Path(file).stem
    if shard := _SHARD.fullmatch(stem):
        return SPLIT_NAMES.get(shard["name"].lower(), shard["name"])
    found = _words(stem)
    return found.pop() if len(found) == 1 else ""


def _words(stem: str) -> set[str]:
    """Splits whose names are words of a name."""
    return {SPLIT_NAMES[word.lower()] for word in _WORD.findall(stem)}
