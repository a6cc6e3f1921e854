"""Folders of images, and of files that hold images, as splits of rows.

A folder is split by its first level, whose names are those of `SPLIT_NAMES`, and by nothing else: a class may be called
`train` or `test-tube`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from recipes.images.columns import FOLDER_COLUMN
from recipes.images.files import METADATA, SPLIT_NAMES, LayoutError, is_metadata, is_picture, list_files
from recipes.images.labels import shorten
from recipes.images.tables import holds_images, is_table, names_pictures, open_tables


def open_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """The splits of a folder of images by class or beside a metadata file, or of files that hold images.

    Raises:
        LayoutError: no images, or two ways to read them.
    """
    files = list_files(folder)
    pictures = [file for file in files if is_picture(file)]
    metadata = [file for file in files if is_metadata(file)]
    tables = [file for file in files if is_table(file) and file not in metadata]
    tables = [file for file in tables if not file.endswith(("dataset_info.json", "dataset_infos.json"))]
    naming = [file for file in tables if holds_images(file) or names_pictures(folder / file)]
    splits = _open_pictures(folder, pictures, metadata, others=bool(naming)) if pictures else {}
    labelled = any(len(rows.column_names) > 1 for rows in splits.values())
    if labelled and naming:
        raise LayoutError(
            f"folder {str(folder)!r} has images with labels and {shorten(naming, 3)}; allowed: one of them, the other "
            "moved out of it"
        )
    if naming or (tables and not splits):
        return open_tables(folder, naming or tables)
    if not splits:
        raise LayoutError(
            f"folder {str(folder)!r} has no images; allowed: images by class, or files of images, unpacked"
        )
    return splits


def _by_first_level(folder: Path, files: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Files of each split, as (path, path within the split).

    Raises:
        LayoutError: a first level that has splits as well as other folders.
    """
    start = 0
    while True:  # a folder that holds nothing but one other folder is not a level
        first = {file[start:].partition("/")[0] for file in files}
        if len(first) > 1 or min(file[start:].count("/") for file in files) < 2 or first.pop().lower() in SPLIT_NAMES:
            break
        start = files[0].index("/", start) + 1
    inner = {file: file[start:].partition("/") for file in files}
    levels = {head for head, slash, _ in inner.values() if slash}
    named = sorted((x for x in levels if x.lower() in SPLIT_NAMES), key=lambda x: [*SPLIT_NAMES].index(x.lower()))
    deep = any("/" in rest for head, _, rest in inner.values() if head in named)
    if not named or (len(named) < len(levels) and not deep):  # classes, one of which may be called `train`
        return {"train": [(file, file[start:]) for file in files]}
    if len(named) < len(levels):
        others = sorted(levels - set(named))
        raise LayoutError(
            f"folder {str(folder)!r} has splits {shorten(named)} beside {shorten(others)}; allowed: nothing but splits "
            "(train, validation, test) or nothing but classes in its first level"
        )
    splits: dict[str, list[tuple[str, str]]] = {}
    for name in named:
        split = SPLIT_NAMES[name.lower()]
        if split in splits:
            raise LayoutError(
                f"folder {str(folder)!r} has two folders of split {split!r}: {shorten(named)}; allowed: one"
            )
        splits[split] = [(file, rest) for file, (head, slash, rest) in inner.items() if slash and head == name]
    return splits


def _open_pictures(
    folder: Path, pictures: list[str], metadata: list[str], *, others: bool
) -> dict[str, datasets.Dataset]:
    """Splits of images by class, or beside metadata files; `others` says that other files may have their labels.

    Raises:
        LayoutError: folders that are no classes, and no metadata.
    """
    splits = _by_first_level(folder, pictures)
    folders = {split: [inner.rpartition("/")[0] for _, inner in files] for split, files in splits.items()}
    names = sorted({path.rsplit("/", 1)[-1] for paths in folders.values() for path in paths if path})
    sorts = bool(names) and not ((metadata or others) and len(names) == 1)
    repeats = False
    for split, paths in folders.items():
        parents = {path.rsplit("/", 1)[-1]: path for path in paths}
        twice = [path for path in paths if parents[path.rsplit("/", 1)[-1]] != path]
        if metadata and twice:
            sorts = False
        repeats |= sorts and bool(twice)
        if sorts and not metadata and any(paths) and not all(paths):
            loose = splits[split][paths.index("")][0]
            raise LayoutError(f"image {str(folder / loose)!r} lies in no class folder; allowed: every image in one")
    if sorts and repeats and not metadata:
        return _with_levels(folder, splits)
    notes = _read_metadata(folder, metadata)
    opened = {}
    for split, files in splits.items():
        paths, rows = [str(folder / file) for file, _ in files], _image_rows(folder, files)
        labels = [path.rsplit("/", 1)[-1] or None for path in folders[split]] if sorts else None
        opened[split] = _with_labels(rows, paths, labels, names, notes)
    return opened


def _with_levels(folder: Path, splits: Mapping[str, list[tuple[str, str]]]) -> dict[str, datasets.Dataset]:
    """Splits of images in folders within folders, of which either may be the class: a column for each level.

    A level that is the same for all images tells nothing, and has none.
    """
    levels = {split: [inner.split("/")[:-1] for _, inner in files] for split, files in splits.items()}
    every = [parts for rows in levels.values() for parts in rows]
    depths = {len(parts) for parts in every}
    of: dict[str, int] = {f"folder_{level + 1}": level for level in range(min(depths))}
    of |= {"folder_last": -1} if len(depths) > 1 else {}
    opened = {}
    for split, files in splits.items():
        rows = _image_rows(folder, files)
        for column, level in of.items():
            names = sorted({parts[level] for parts in every})
            if len(names) > 1:
                labels = [parts[level] for parts in levels[split]]
                rows = _with_classes(rows, column, labels, names)
        opened[split] = rows
    return opened


def _image_rows(folder: Path, files: Sequence[tuple[str, str]]) -> datasets.Dataset:
    paths = [str(folder / file) for file, _ in files]
    return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())


def _with_classes(
    rows: datasets.Dataset, column: str, labels: Sequence[str | None], names: list[str]
) -> datasets.Dataset:
    number: dict[str | None, int] = {name: k for k, name in enumerate(names)}
    numbers = [number.get(label) for label in labels]
    return rows.add_column(column, numbers).cast_column(column, datasets.ClassLabel(names=names))  # type: ignore


def _with_labels(
    rows: datasets.Dataset,
    paths: Sequence[str],
    labels: Sequence[str | None] | None,
    names: list[str],
    notes: tuple[pa.Table, dict[str, int]] | None,
) -> datasets.Dataset:
    """Add the columns of the metadata, and the label by folder unless the metadata have the same."""
    taken = None
    if notes is not None:
        table, row_of = notes
        table = table.take(pa.array([row_of.get(path) for path in paths], type=pa.int64()))
        for name in table.column_names:
            if name != "image":
                rows = rows.add_column(name, table[name].to_pylist(), feature=_feature(table, name))  # type: ignore
                taken = table[name] if name == "label" else taken
    if labels is None or (taken is not None and list(map(str, taken.to_pylist())) == labels):
        return rows
    return _with_classes(rows, "label" if taken is None else FOLDER_COLUMN, labels, names)


def _feature(table: pa.Table, name: str) -> datasets.Value:
    return datasets.Features.from_arrow_schema(pa.schema([table.schema.field(name)]))[name]


def _read_metadata(folder: Path, files: Sequence[str]) -> tuple[pa.Table, dict[str, int]] | None:
    """What metadata files say, and in which row they say it of the image at a path.

    Raises:
        LayoutError: they cannot be read, or name no images.
    """
    tables, paths = [], []
    for file in files:
        where = folder / file
        try:
            table = METADATA[where.name](str(where))
        except (OSError, pa.ArrowException) as error:
            raise LayoutError(f"{str(where)!r} cannot be read: {error}; allowed: a table of images") from error
        if "file_name" not in table.column_names:
            raise LayoutError(f"{str(where)!r} has columns {shorten(table.column_names)}; allowed: one is file_name")
        paths += [str(where.parent / str(name)) for name in table["file_name"].to_pylist()]
        tables.append(table.drop_columns("file_name"))
    if not tables:
        return None
    return pa.concat_tables(tables, promote_options="permissive"), {path: i for i, path in enumerate(paths)}
