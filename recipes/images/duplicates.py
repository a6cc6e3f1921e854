"""The same encoded image in two sets, such as training and test."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import combinations
from typing import Any

import numpy as np

from recipes.images.labels import pc
from recipes.images.sources import ImageSplit

_TAIL = 4096  # bytes at the end of an image, which nearly always tell it apart from others of its size


def shared_images(sets: Mapping[str, tuple[ImageSplit, np.ndarray]]) -> list[str]:
    """Say which sets have images of other sets that come before them, by their bytes.

    An image is read whole only where another set has one of its size and end.

    Args:
        sets: by name, a split and the rows of it that form the set.

    Returns:
        A sentence for each pair of sets with such images; nothing if there are none.
    """
    ends: dict[bytes, list[tuple[str, int]]] = defaultdict(list)  # set and row of the images of that size and end
    for name, (split, indices) in sets.items():
        for index, size, tail in _ends(split, indices):
            ends[size.to_bytes(8, "little") + tail].append((name, index))
    whole: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for group in ends.values():
        if len({name for name, _ in group}) > 1:
            for name, index in group:
                whole[_digest(sets[name][0], index)].append((name, index))
    found: dict[tuple[str, str], list[int]] = {pair: [] for pair in combinations(sets, 2)}
    for group in whole.values():
        members = {name: [index for other, index in group if other == name] for name in sets}
        for first, second in found:
            if members[first]:
                found[first, second] += members[second]
    return [_sentence(sets, *pair, sorted(rows)) for pair, rows in found.items() if rows]


def _sentence(sets: Mapping[str, tuple[ImageSplit, np.ndarray]], first: str, second: str, rows: list[int]) -> str:
    split, indices = sets[second]
    path = split.content(rows[0])[1]
    example = f"image {rows[0]} of split {split.name!r}" + (f" ({path})" if path else "")
    return f"{len(rows)} of {len(indices)} {second} images are among the {first} images too, such as {example}"


def _ends(split: ImageSplit, indices: np.ndarray) -> Iterator[tuple[int, int, bytes]]:
    """Row, size and hash of the end of each image of a set that can be read."""
    chosen = np.zeros(len(split.labels), dtype=bool)
    chosen[indices] = True
    start = 0
    tables: Any = split.encoded.with_format("arrow").iter(batch_size=1000)
    for table in tables:
        column = table[split.image_column].combine_chunks()
        contents, paths = pc.struct_field(column, "bytes"), pc.struct_field(column, "path").to_pylist()
        for i in np.flatnonzero(chosen[start : start + len(column)]):
            content = contents[int(i)].as_buffer()
            if content is not None:
                yield start + int(i), content.size, _hash(memoryview(content)[-_TAIL:])
            elif (end := _end_of_file(paths[i])) is not None:
                yield start + int(i), *end
        start += len(column)


def _end_of_file(path: str | None) -> tuple[int, bytes] | None:
    try:
        with open(path or "", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            return size, _hash(file.read())
    except OSError:  # told when it is decoded
        return None


def _digest(split: ImageSplit, index: int) -> bytes:
    content, path = split.content(index)
    if content is None:
        with open(path or "", "rb") as file:
            content = file.read()
    return _hash(content)


def _hash(content: bytes | memoryview) -> bytes:
    return blake2b(content, digest_size=16).digest()
