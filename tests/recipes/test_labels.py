"""Labels and columns as people have them, against lists in plain Python."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from recipes.images.columns import find_label_column
from recipes.images.sources import load_like, load_split, load_splits

PICTURE = Image.new("RGB", (2, 2))


def rows(labels, feature=None, column="label", **others):
    table = datasets.Dataset.from_dict({"image": [PICTURE] * len(labels), **others})
    return table.cast_column("image", datasets.Image()).add_column(column, labels, feature=feature)


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        (["dog", "cat", "dog"], None, ["cat", "dog"]),
        (["dog", "cat", "dog"], datasets.Value("large_string"), ["cat", "dog"]),
        ([True, False, True], None, ["False", "True"]),
        ([2, 1, 2], datasets.Value("uint8"), ["1", "2"]),
        ([30, 7, 30, 11], datasets.Value("int16"), ["7", "11", "30"]),
        ([10**12, 5, 10**12], None, ["5", str(10**12)]),
        ([2**64 - 1, 5], datasets.Value("uint64"), ["5", str(2**64 - 1)]),
        ([2, 0, 2], datasets.ClassLabel(names=["a", "unused", "b"]), ["a", "b"]),
        ([0, 1], datasets.ClassLabel(num_classes=2), ["0", "1"]),
    ],
)
def test_labels_are_numbered_by_their_names(labels, feature, names):
    split = load_split({"train": rows(labels, feature)}, "train")
    spelled = [feature.int2str(k) for k in labels] if isinstance(feature, datasets.ClassLabel) else map(str, labels)
    assert split.class_names == tuple(names)
    assert [split.class_names[k] for k in split.labels] == list(spelled)
    assert split.labels.dtype == np.int64


def test_categories_of_pandas_are_strings():
    table = pa.table({"label": pa.array(["b", "a", "b"]).dictionary_encode()})
    data = datasets.Dataset(datasets.table.InMemoryTable(table)).add_column("image", [b""] * 3)
    assert load_split({"train": data}, "train").labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0.5, 1.0], None, "label_column 'label' of split 'train' holds double; allowed: class labels"),
        ([[0], [1]], None, "label_column 'label' of split 'train' holds list<"),
        ([0, None, 1], None, "split 'train' has no label in 1 of 3 images"),
        (["a", None, " "], None, "split 'train' has no label in 2 of 3 images"),
        ([None, None], None, "split 'train' has no label in 2 of 2 images (the split has no labels)"),
        ([3, -1, 2, -1], None, "split 'train' has label -1 in 2 of 4 images; allowed: 0 or more"),
        ([-1, -1], datasets.ClassLabel(names=["a", "b"]), "has label -1 in 2 of 2 images (the split has no labels)"),
    ],
)
def test_labels_that_are_no_classes_are_named(labels, feature, message):
    with pytest.raises(ValueError) as raised:
        load_split({"train": rows(labels, feature)}, "train")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_splits_are_matched_by_name_whatever_their_numbers():
    names = datasets.ClassLabel(names=["cat", "cow", "dog"])
    turned = datasets.ClassLabel(names=["dog", "cow", "cat"])
    train, test = load_splits({"train": rows([0, 1, 2], names), "test": rows([0, 2, 2, 1], turned)})
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [2, 0, 0, 1]
    strings = load_like({"more": rows(["dog", "cat"])}, "more", train)
    assert strings.labels.tolist() == [2, 0] and strings.class_names == train.class_names
    numbers = load_split({"some": rows([7, 3])}, "some", class_names=["9", "7", "3"])
    assert numbers.labels.tolist() == [1, 2]


def test_an_unknown_class_is_named():
    with pytest.raises(ValueError) as raised:
        load_splits({"train": rows(["a", "b"]), "test": rows(["a", "c", "c", "d"])})
    assert str(raised.value) == (
        "split 'test' has classes 'c', 'd' in 3 of 4 images; allowed: those of split 'train', 'a', 'b'"
    )
    many = [f"class {k}" for k in range(1000)]
    with pytest.raises(ValueError, match=r"'class 9', \.\.\. \(1000 in all\)$"):
        load_split({"all": rows(["other"])}, "all", class_names=many)


def test_declared_classes_stay_where_nothing_was_trained():
    feature = datasets.ClassLabel(names=["a", "unused", "b"])
    split = load_split({"test": rows([2, 0], feature)}, "test", declared=True)
    assert split.class_names == ("a", "unused", "b") and split.labels.tolist() == [2, 0]


IMAGE, INT, STRING = datasets.Image(), datasets.Value("int64"), datasets.Value("string")
NAMED = datasets.ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    ("features", "column"),
    [
        ({"label": STRING, "id": INT}, "label"),
        ({"id": INT, "label": NAMED, "coarse": NAMED}, "label"),
        ({"id": INT, "fine": NAMED, "caption": STRING}, "fine"),
        ({"id": INT, "class": STRING, "width": INT}, "class"),
        ({"species": STRING}, "species"),
        ({"anything": datasets.Value("bool")}, "anything"),
        ({"cls": INT, "json": {"width": INT, "label": INT}, "__key__": STRING, "__url__": STRING}, "cls"),
        ({"json": {"width": INT, "label": STRING}, "__key__": STRING}, "json.label"),
        ({"json": {"meta": {"class": STRING, "id": INT}}, "__key__": STRING}, "json.meta.class"),
        ({"label": datasets.Value("float32"), "id": INT}, "label"),  # refused when it is read
        ({"label": datasets.List(INT), "id": INT}, "label"),
        ({"label": {"name": STRING}, "id": INT}, "label.name"),
    ],
)
def test_the_column_of_labels_is_found(features, column):
    assert find_label_column({"image": IMAGE, **features}, "image", split="train") == column


@pytest.mark.parametrize(
    "features",
    [
        {"species": STRING, "id": INT},
        {"fine": NAMED, "coarse": NAMED},
        {"class": INT, "target": INT},
        {"label": NAMED, "class_folder": NAMED},
        {"json": {"a": INT, "b": INT}},
        {"label": {"number": INT, "name": STRING}, "id": INT},
        {"score": datasets.Value("float32")},
        {},
    ],
)
def test_where_two_columns_may_be_labels_or_none_the_user_is_asked(features):
    with pytest.raises(ValueError) as raised:
        find_label_column({"image": IMAGE, **features}, "image", split="train")
    assert str(raised.value).startswith(
        "label_column of split 'train' must be given: columns that may hold a label are "
    )


def test_labels_in_records_are_read():
    data = rows([{"label": "b", "w": 3}, {"label": "a", "w": 4}], column="json")
    split = load_split({"train": data}, "train")
    assert split.label_column == "json.label" and split.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="label_column 'json.lable' is not in split 'train'; columns: .*'json.label'"):
        load_split({"train": data}, "train", label_column="json.lable")


def test_a_column_given_is_taken():
    data = rows([3, 5], id=[1, 2])
    assert load_split({"train": data}, "train", label_column="id").class_names == ("1", "2")


def test_two_columns_of_images():
    both = datasets.Dataset.from_dict(
        {"mask": [PICTURE], "image": [PICTURE], "label": [0]},
        features=datasets.Features(mask=IMAGE, image=IMAGE, label=INT),
    )
    assert load_split({"train": both}, "train").image_column == "image"
