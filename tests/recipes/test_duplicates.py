"""The same images in two sets, against sets of bytes."""

import datasets
import numpy as np
import pytest

from recipes.images.duplicates import shared_images
from recipes.images.sources import ImageSplit

CONTENTS = [bytes([k]) * (9000 if k % 2 else 100) for k in range(8)]
CONTENTS.append(b"another start" + CONTENTS[1][13:])  # of the same size and end as image 1


def split(name, numbers, folder=None):
    records = []
    for i, k in enumerate(numbers):
        if folder is None:
            records.append({"bytes": CONTENTS[k], "path": None})
        else:
            path = folder / f"{name}-{i}.png"
            path.write_bytes(CONTENTS[k])
            records.append({"bytes": None, "path": str(path)})
    rows = datasets.Dataset.from_dict({"image": records}, features=datasets.Features(image=datasets.Image()))
    return ImageSplit(name, rows, "image", np.zeros(len(numbers), dtype=np.int64), ("a",))


@pytest.mark.parametrize("files", [(), ("train",), ("test",), ("train", "test")])
def test_images_in_two_sets_are_counted(tmp_path, files):
    numbers = {"train": [0, 1, 2, 3, 3, 8], "test": [5, 3, 1, 6, 1, 7]}
    train, test = (split(name, numbers[name], tmp_path if name in files else None) for name in numbers)
    path = f" ({tmp_path}/test-1.png)" if "test" in files else ""
    sets = {"train": (train, np.arange(6)), "test": (test, np.arange(6))}
    assert shared_images(sets) == [
        f"3 of 6 test images are among the train images too, such as image 1 of split 'test'{path}"
    ]
    assert shared_images({"train": (train, np.array([0, 2, 5])), "test": (test, np.arange(6))}) == []


def test_sets_of_one_split(tmp_path):
    whole = split("train", [4, 2, 4, 3, 2, 2])
    other = split("test", [9 - 9, 2])
    sets = {"train": (whole, np.array([0, 1])), "val": (whole, np.array([2, 3, 4, 5])), "test": (other, np.arange(2))}
    assert shared_images(sets) == [
        "3 of 4 val images are among the train images too, such as image 2 of split 'train'",
        "1 of 2 test images are among the train images too, such as image 1 of split 'test'",
        "1 of 2 test images are among the val images too, such as image 1 of split 'test'",
    ]


def test_images_that_cannot_be_read_are_left_to_the_decoder(tmp_path):
    here = split("train", [1, 2], tmp_path)
    (tmp_path / "train-0.png").unlink()
    rows = datasets.Dataset.from_dict({"image": [None]}, features=datasets.Features(image=datasets.Image()))
    none = ImageSplit("test", rows, "image", np.zeros(1, dtype=np.int64), ("a",))
    assert shared_images({"train": (here, np.arange(2)), "test": (none, np.arange(1))}) == []


def test_sets_are_compared_whatever_rows_were_chosen_before():
    rows = split("train", range(8)).rows.select([7, 3, 5])
    chosen = ImageSplit("train", rows, "image", np.zeros(3, dtype=np.int64), ("a",))
    assert len(shared_images({"train": (chosen, np.array([1])), "test": (split("test", [3]), np.arange(1))})) == 1
    assert shared_images({"train": (chosen, np.array([0, 2])), "test": (split("test", [3]), np.arange(1))}) == []
