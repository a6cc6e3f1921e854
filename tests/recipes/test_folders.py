"""Layouts of folders: which images are in which split, of which class."""

import io
import json
import tarfile

import datasets
import numpy as np
import pandas
import pyarrow.parquet
import pytest
from PIL import Image

from recipes.images.sources import load_split, load_splits, open_dataset


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No network, and no cache but the test's own."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(number):
    return Image.new("RGB", (2, 2), (number, 0, 0))


def encoded(number):
    picture(number).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def tree(folder, files):
    """Write images by path; image i is i in its first channel."""
    for i, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / file)


def numbers(split):
    return [split.read(i, "RGB").getpixel((0, 0))[0] for i in range(len(split.labels))]


def content(folder, **columns):
    """{split: {number of the image: name of its class}} of a folder."""
    splits = open_dataset(str(folder))
    loaded = {name: load_split(splits, name, **columns) for name in splits}
    return {
        name: {k: split.class_names[c] for k, c in zip(numbers(split), split.labels, strict=True)}
        for name, split in loaded.items()
    }


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (  # a class whose name is that of a split, or has one in it
            ["car/0.png", "train/1.png", "test-tube/2.png", "freight train/3.png"],
            {"train": {0: "car", 1: "train", 2: "test-tube", 3: "freight train"}},
        ),
        (
            ["train/train/0.png", "train/test/1.png", "test/test/2.png", "test/validation/3.png"],
            {"train": {0: "train", 1: "test"}, "test": {2: "test", 3: "validation"}},
        ),
        (
            ["Training/a/0.png", "val/a/1.png", "evaluation/b/2.png"],
            {"train": {0: "a"}, "validation": {1: "a"}, "test": {2: "b"}},
        ),
        (["set v2 (test)/train/a/0.png", "set v2 (test)/train/b/1.png"], {"train": {0: "a", 1: "b"}}),
        (["train/a/test_0.png", "train/b/val-1.png"], {"train": {0: "a", 1: "b"}}),
        (["a[1]*/0.png", "b?/1.png", ".hidden/2.png", "__MACOSX/3.png"], {"train": {0: "a[1]*", 1: "b?"}}),
        (["cat/0.png"], {"train": {0: "cat"}}),
        (["animals/cat/0.png", "plants/rose/1.png"], {"train": {0: "cat", 1: "rose"}}),
    ],
)
def test_folders_are_split_by_their_first_level_and_by_nothing_else(tmp_path, files, wanted):
    tree(tmp_path / "data [x]", files)
    assert content(tmp_path / "data [x]") == wanted


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a/0.png", "test/a/1.png", "extra/a/2.png"], "splits 'train', 'test' beside 'extra'; allowed: nothing"),
        (["val/a/0.png", "valid/a/1.png"], "two folders of split 'validation': 'valid', 'val'; allowed: one"),
        (
            ["cat/2020/0.png", "dog/2020/1.png", "dog/2021/2.png"],
            "label_column of split 'train' must be given: columns that may hold a label are 'folder_1', 'folder_2'; ",
        ),
        (["0.png", "cat/1.png", "dog/2.png"], "0.png' lies in no class folder; allowed: every image in one"),
        (
            ["train/0.png", "test/1.png"],
            "label_column of split 'train' must be given: columns that may hold a label are",
        ),
    ],
)
def test_layouts_that_may_be_read_in_two_ways_are_refused(tmp_path, files, message):
    tree(tmp_path, files)
    with pytest.raises(ValueError) as raised:
        content(tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("files", "level", "wanted"),
    [
        (["cat/2020/0.png", "dog/2020/1.png"], None, ["cat", "dog"]),  # the only level that tells images apart
        (["train/a/x/0.png", "train/b/x/1.png", "test/a/x/2.png"], None, ["a", "b", "a"]),
        (["part1/cat/0.png", "part1/dog/1.png", "part2/cat/2.png"], "folder_2", ["cat", "dog", "cat"]),
        (["part1/cat/0.png", "part1/dog/1.png", "part2/cat/2.png"], "folder_1", ["part1", "part1", "part2"]),
        (["cat/0.png", "more/cat/1.png", "more/dog/2.png"], "folder_last", ["cat", "cat", "dog"]),
    ],
)
def test_a_level_of_folders_within_folders_is_the_class(tmp_path, files, level, wanted):
    tree(tmp_path, files)
    found = content(tmp_path, label_column=level)
    assert {i: name for images in found.values() for i, name in images.items()} == dict(enumerate(wanted))


def test_rows_are_in_the_order_of_datasets(tmp_path):
    """So that a manifest made by an earlier version is still about the same images."""
    files = [f"train/{k}/{i}.png" for k in ("a b", "a", "a-b", "B") for i in (10, 9, "x y")]
    tree(tmp_path, [*files, "test/a/0.png", "test/C/0.png"])
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path))
    ours = open_dataset(str(tmp_path))
    for name in ("train", "test"):
        paths, labels = ours[name].cast_column("image", datasets.Image(decode=False)), ours[name]["label"][:]
        wanted = theirs[name].cast_column("image", datasets.Image(decode=False))
        assert [row["image"]["path"] for row in paths] == [row["image"]["path"] for row in wanted]
        assert labels == wanted["label"][:]
    assert ours["train"].features["label"] == theirs["train"].features["label"]


def metadata(folder, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(columns).to_csv(folder / "metadata.csv", index=False)


def test_class_folders_win_over_integers_of_a_metadata_file(tmp_path):
    tree(tmp_path, ["train/a/0.png", "train/b/1.png"])
    metadata(tmp_path / "train", file_name=["b/1.png", "a/0.png"], width=[7, 8])
    assert content(tmp_path) == {"train": {0: "a", 1: "b"}}
    assert content(tmp_path, label_column="width") == {"train": {0: "8", 1: "7"}}


def test_labels_of_a_metadata_file(tmp_path):
    tree(tmp_path, ["images/0.png", "images/1.png", "images/2.png"])
    metadata(tmp_path, file_name=[f"images/{i}.png" for i in (2, 0, 1)], label=["x", "y", "x"])
    assert content(tmp_path) == {"train": {2: "x", 0: "y", 1: "x"}}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_other_metadata_files(tmp_path, suffix):
    tree(tmp_path, ["train/0.png", "train/1.png", "test/2.png"])
    for split, table in (
        ("train", {"file_name": ["0.png", "1.png"], "label": [4, 6]}),
        ("test", {"file_name": ["2.png"], "label": [4]}),
    ):
        path, frame = tmp_path / split / f"metadata.{suffix}", pandas.DataFrame(table)
        frame.to_parquet(path) if suffix == "parquet" else frame.to_json(path, orient="records", lines=True)
    assert content(tmp_path) == {"train": {0: "4", 1: "6"}, "test": {2: "4"}}


def test_labels_by_folder_and_by_metadata_that_differ(tmp_path):
    tree(tmp_path, ["000/0.png", "001/1.png"])
    metadata(tmp_path, file_name=["000/0.png", "001/1.png"], label=["x", "y"])
    with pytest.raises(ValueError, match="label_column of split 'train' must be given: .* are 'label', 'class_folder'"):
        content(tmp_path)
    assert content(tmp_path, label_column="label") == {"train": {0: "x", 1: "y"}}
    assert content(tmp_path, label_column="class_folder") == {"train": {0: "000", 1: "001"}}
    metadata(tmp_path, file_name=["000/0.png", "001/1.png"], label=["000", "001"])
    (tmp_path / "metadata.csv").write_text("file_name,label\n000/0.png,a 000\n001/1.png,a 001\n".replace("a 0", "0"))
    assert content(tmp_path, label_column="class_folder") == {"train": {0: "000", 1: "001"}}


def test_an_image_that_the_metadata_leave_out(tmp_path):
    tree(tmp_path, ["0.png", "1.png"])
    metadata(tmp_path, file_name=["1.png"], label=["x"])
    with pytest.raises(ValueError, match="split 'train' has no label in 1 of 2 images"):
        content(tmp_path)
    (tmp_path / "metadata.csv").write_text("name,label\n1.png,x\n")
    with pytest.raises(ValueError, match="metadata.csv' has columns 'name', 'label'; allowed: one is file_name"):
        content(tmp_path)


def table(first, labels):
    return {"image": [{"bytes": encoded(first + i), "path": None} for i in range(len(labels))], "label": labels}


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train.parquet", "test.parquet"], ["train", "test"]),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], ["train", "train"]),
        (["train/a.parquet", "test/train.parquet", "validation/b.parquet"], ["train", "test", "validation"]),
        (["x/a.parquet", "x/b.parquet"], ["train", "train"]),
        (["train_0.parquet", "train_1.parquet", "val.parquet"], ["train", "train", "validation"]),
        (["wds-train-0001.parquet", "wds-train-0002.parquet", "wds_val.parquet"], ["train", "train", "validation"]),
        (["wds-test-0.parquet"], ["test"]),
        (["test_a-00000-of-00001.parquet", "train-00000-of-00001.parquet"], ["test_a", "train"]),
    ],
)
def test_files_of_many_images_are_split_by_their_folder_or_name(tmp_path, files, splits):
    for i, file in enumerate(files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(table(2 * i, ["a", "b"])).to_parquet(tmp_path / file)
    found = content(tmp_path)
    assert set(found) == set(splits)
    for name, images in found.items():
        mine = [i for i, split in enumerate(splits) if split == name]
        assert sorted(images) == [2 * i + j for i in mine for j in (0, 1)]


@pytest.mark.parametrize(
    "files",
    [["train.parquet", "other.parquet"], ["freight train.parquet", "car.parquet"], ["train-on-test.parquet"]],
)
def test_files_of_no_split_are_named(tmp_path, files):
    for file in files:
        pandas.DataFrame(table(0, ["a", "b"])).to_parquet(tmp_path / file)
    with pytest.raises(ValueError, match="of no one split; allowed: files such as train.parquet"):
        content(tmp_path)


def test_bytes_in_a_column(tmp_path):
    pandas.DataFrame({"content": [encoded(0), encoded(1)], "label": ["b", "a"]}).to_parquet(tmp_path / "train.parquet")
    pandas.DataFrame({"content": [encoded(2)], "label": ["a"]}).to_parquet(tmp_path / "test.parquet")
    assert content(tmp_path) == {"train": {0: "b", 1: "a"}, "test": {2: "a"}}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_paths_in_a_column(tmp_path, suffix):
    tree(tmp_path, ["images/0.png", "images/1.png"])
    frame = pandas.DataFrame({"file": ["images/1.png", str(tmp_path / "images/0.png")], "label": [5, 3], "id": [1, 2]})
    path = tmp_path / f"train.{suffix}"
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    assert content(tmp_path) == {"train": {1: "5", 0: "3"}}


def test_a_table_of_paths_beside_class_folders(tmp_path):
    tree(tmp_path, ["000/0.png", "001/1.png"])
    (tmp_path / "labels.csv").write_text("file,label\n000/0.png,x\n001/1.png,y\n")
    with pytest.raises(ValueError, match="has images with labels and 'labels.csv'; allowed: one of them"):
        content(tmp_path)
    (tmp_path / "labels.csv").write_text("number,name\n000,x\n001,y\n")  # of classes, not images
    assert content(tmp_path) == {"train": {0: "000", 1: "001"}}


def test_a_split_without_labels_beside_one_that_has_some(tmp_path):
    tree(tmp_path, ["images/0.png", "images/1.png"])
    (tmp_path / "train.csv").write_text("file,label\nimages/0.png,x\nimages/1.png,y\n")
    (tmp_path / "test.csv").write_text("file\nimages/0.png\n")
    splits = open_dataset(str(tmp_path))
    assert load_split(splits, "train").class_names == ("x", "y")
    with pytest.raises(ValueError, match="label_column 'label' is not in split 'test'"):
        load_splits(splits)


def webdataset(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["json", "cls"])
def test_a_webdataset(tmp_path, kind):
    label = {"json": lambda k: json.dumps({"width": 2, "label": "ab"[k]}).encode(), "cls": lambda k: b"57"[k : k + 1]}
    for split, keys in (("train", (0, 1)), ("test", (2, 3))):
        samples = {f"{i:04}": {"png": encoded(i), kind: label[kind](i % 2)} for i in keys}
        webdataset(tmp_path / split / "0000.tar", samples)
    names = {"json": "ab", "cls": "57"}[kind]
    assert content(tmp_path) == {"train": dict(enumerate(names)), "test": {2: names[0], 3: names[1]}}


@pytest.mark.parametrize("form", ["numpy", "torch", "undecoded", "columns", "chosen"])
def test_saved_with_a_format(tmp_path, form):
    data = datasets.Dataset.from_dict(table(0, [1, 0, 1])).cast_column("image", datasets.Image())
    if form == "undecoded":
        data = data.cast_column("image", datasets.Image(decode=False))
    elif form == "columns":
        data.set_format("numpy", columns=["label"])
    elif form == "chosen":
        data = data.select([0, 1, 2, 0]).shuffle(seed=0).select([0, 1, 2])
    else:
        data.set_format(form)
    numbered = {0: "1", 1: "0", 2: "1"}
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "saved")
    found = content(tmp_path / "saved")["train"]
    assert found == (numbered if form != "chosen" else {k: numbered[k] for k in found})


def test_saved_split_by_split(tmp_path):
    for split, first in (("train", 0), ("test", 2)):
        data = datasets.Dataset.from_dict(table(first, ["a", "b"])).cast_column("image", datasets.Image())
        data.save_to_disk(tmp_path / split)
    assert content(tmp_path) == {"train": {0: "a", 1: "b"}, "test": {2: "a", 3: "b"}}


@pytest.mark.parametrize("name", ["imagefolder", "parquet", "csv", "webdataset", "text", "", " "])
def test_names_that_would_read_the_current_directory_are_refused(tmp_path, monkeypatch, name):
    tree(tmp_path, ["train/a/0.png", "test/a/1.png"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"dataset is {name!r}, which names no data; allowed: 'digits', a folder"):
        open_dataset(name)
    assert content(".") == {"train": {0: "a"}, "test": {1: "a"}}
    if name == "parquet":
        tree(tmp_path, ["parquet/cat/0.png"])
        assert content(name) == {"train": {0: "cat"}}


def test_a_folder_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path, ["set/a/0.png", "set/b/1.png"])
    assert content("~/set") == {"train": {0: "a", 1: "b"}}


def test_links_are_followed_and_circles_are_not(tmp_path):
    tree(tmp_path, ["elsewhere/0.png", "data/b/1.png"])
    (tmp_path / "data/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/b/up").symlink_to(tmp_path / "data")
    assert content(tmp_path / "data") == {"train": {0: "a", 1: "b"}}


def test_splits_that_a_page_lists_are_taken_as_listed(tmp_path):
    for name in ("one", "two"):
        pandas.DataFrame(table(0, ["a", "b"])).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: one.parquet\n"
        "  - split: held_out\n    path: two.parquet\n---\nText\n"
    )
    assert content(tmp_path) == {split: {0: "a", 1: "b"} for split in ("train", "held_out")}


def test_a_folder_of_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="^folder .* has no images; allowed: "):
        open_dataset(str(tmp_path))


def test_a_table_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError) as raised:
        open_dataset(str(tmp_path))
    assert "cannot be opened" in str(raised.value) and "\n" not in str(raised.value)


def test_numbers_in_parquet_without_images(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"x": np.arange(3), "label": [0, 1, 0]}), tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match="image_column of split 'train' must be given: columns that may hold an image are"
    ):
        content(tmp_path)
