"""Files of a data set, told apart by their names."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import yaml
from PIL import Image
from pyarrow import csv, json, parquet

from recipes.errors import UserError

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The first level of a folder, in lower case, and the split that it is."""

METADATA: dict[str, Callable[[str], pa.Table]] = {
    "metadata.csv": csv.read_csv,
    "metadata.jsonl": json.read_json,
    "metadata.parquet": parquet.read_table,
}
"""Files that say something of the images beside them, and their readers."""


class LayoutError(UserError):
    """A folder that holds no images, or may be read in two ways."""


def list_files(folder: Path) -> list[str]:
    """Paths of all files below a folder, sorted, but for hidden ones; links are followed, circles are not."""
    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        inner = os.path.relpath(root, folder).replace(os.sep, "/")
        if (identity := os.path.realpath(root)) in visited:
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        prefix = "" if inner == "." else f"{inner}/"
        found += [prefix + name for name in names if not name.startswith((".", "__"))]
    return sorted(found)


def is_picture(path: str) -> bool:
    """Whether the name of a file is that of an image that Pillow may open."""
    Image.init()
    format = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    return format in Image.OPEN and format not in ("HDF5", "BUFR", "GRIB")  # which no decoder is there for


def is_metadata(path: str) -> bool:
    """Whether a file says something of the images beside it."""
    return path.rsplit("/", 1)[-1] in METADATA


def has_configurations(folder: Path) -> bool:
    """Whether the README.md of a folder lists the files of each split."""
    try:
        _, matter, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        configurations = yaml.safe_load(matter)["configs"]
        return all("data_files" in each for each in configurations)
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return False
