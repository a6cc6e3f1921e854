"""Reading data sets: the digits, folders of each kind, and data that is wrong."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from recipes.images.digits import digits
from recipes.images.sources import CorruptImageError, load_split, load_splits, open_dataset
from recipes.images.views import ImageView, eval_loader, eval_transform, train_loader, train_transform
from recipes.imbalance.sampling import EpochSampler

DATA_CONFIG = dict(
    input_size=(3, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bilinear", crop_pct=1.0
)
NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and no cache but the test's own."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True, scope="module")
def impatient():
    """Torch looks every 5 seconds whether a worker is alive, and waits as long for one that has met an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
        yield


def pictures(n, size=(16, 16)):
    pixels = np.random.default_rng(0).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    return [Image.fromarray(x) for x in pixels]


def rows(labels, *, image="image", label="label", feature=None):
    features = datasets.Features({image: datasets.Image(), label: feature or datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({image: pictures(len(labels)), label: labels}, features=features)


@pytest.fixture(scope="module")
def digit_splits():
    return load_splits(digits())


def test_digits_are_scikit_learns_with_a_third_for_testing(digit_splits):
    source, (train, test) = load_digits(), digit_splits
    assert len(train.labels) + len(test.labels) == 1797
    whole = np.bincount(source.target)
    assert np.bincount(test.labels).tolist() == (whole // 3).tolist()
    assert train.class_names == tuple("0123456789")
    # Every picture of the source is in one split, once, with its class.
    found = [
        (split.labels[i], np.asarray(split.read(i, "L")).tobytes())
        for split in (train, test)
        for i in range(len(split.labels))
    ]
    whole = np.round(source.images / 16 * 255).astype(np.uint8)
    wanted = [(k, x.tobytes()) for k, x in zip(source.target, whole, strict=True)]
    assert sorted(found) == sorted(wanted)


def save_parquet(folder):
    folder.mkdir()
    for name, labels in (("train", [0, 1, 1]), ("test", [1, 0])):
        rows(labels).to_parquet(folder / f"{name}-00000-of-00001.parquet")


def save_image_folders(folder):
    for name, labels in (("train", [0, 1, 1]), ("test", [0, 1])):
        for i, (k, picture) in enumerate(zip(labels, pictures(len(labels)), strict=True)):
            (folder / name / NAMES[k]).mkdir(parents=True, exist_ok=True)
            picture.save(folder / name / NAMES[k] / f"{i}.png")


def save_to_disk(folder):
    datasets.DatasetDict(train=rows([0, 1, 1]), test=rows([1, 0])).save_to_disk(folder)


@pytest.mark.parametrize("save", [save_parquet, save_image_folders, save_to_disk])
def test_folders_of_each_kind_are_read(tmp_path, save):
    save(tmp_path / "data")
    train, test = load_splits(open_dataset(str(tmp_path / "data")))
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 1] and sorted(test.labels) == [0, 1]
    assert np.array_equal(np.asarray(train.read(1, "RGB")), np.asarray(pictures(3)[1]))


@pytest.mark.parametrize(("split", "name"), [(None, "train"), ("validation", "validation")])
def test_a_data_set_saved_alone_is_one_split(tmp_path, split, name):
    alone = (
        rows([0, 1, 1])
        if split is None
        else datasets.Dataset.from_dict(
            {"image": pictures(3), "label": [0, 1, 1]}, features=rows([]).features, split=datasets.NamedSplit(split)
        )
    )
    alone.save_to_disk(tmp_path / "alone")
    opened = open_dataset(str(tmp_path / "alone"))
    assert list(opened) == [name] and opened[name]["label"][:] == [0, 1, 1]
    assert opened[name].features["label"].names == NAMES


def test_a_folder_may_have_configurations(tmp_path):
    for name, labels in (("few", [0, 1]), ("many", [1, 1, 0])):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            rows(labels).to_parquet(tmp_path / name / f"{split}-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("train", "test"))
        for name in ("few", "many")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, labels in (("few", [0, 1]), ("many", [1, 1, 0])):
        train, test = load_splits(open_dataset(str(tmp_path), name))
        assert train.labels.tolist() == test.labels.tolist() == labels
    with pytest.raises(ValueError, match="cannot be opened: .*few.*many"):
        open_dataset(str(tmp_path))


def test_a_configuration_or_revision_that_nothing_reads_is_named(tmp_path):
    save_to_disk(tmp_path / "saved")
    save_parquet(tmp_path / "files")
    for name, flags, message in (
        (
            "digits",
            dict(config="v2"),
            "dataset_config is 'v2'; allowed: none for dataset 'digits', which has no configs",
        ),
        ("digits", dict(revision="main"), "dataset_revision is 'main'; allowed: none for dataset 'digits'"),
        (str(tmp_path / "saved"), dict(config="v2"), "dataset_config is 'v2'; allowed: none for dataset"),
        (str(tmp_path / "files"), dict(revision="main"), "dataset_revision is 'main'; allowed: none for dataset"),
    ):
        with pytest.raises(ValueError) as raised:
            open_dataset(name, **flags)
        assert str(raised.value).startswith(message)


def test_a_hub_id_is_asked_for_with_its_configuration_and_revision(monkeypatch):
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return datasets.DatasetDict(train=rows([0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_dataset("org/images", "small", "v1.0")) == ["train"]
    assert asked == [(("org/images", "small"), {"revision": "v1.0"})]


def test_columns_that_are_given_go_before_those_that_are_found():
    train = rows([0, 1]).add_column("number", [3, 0])
    first, _ = load_splits({"train": train, "test": train}, label_column="number")
    assert first.labels.tolist() == [1, 0] and first.class_names == ("0", "3")
    two = datasets.Dataset.from_dict(
        {"front": pictures(2), "back": pictures(2)[::-1], "label": [0, 1]},
        features=datasets.Features(front=datasets.Image(), back=datasets.Image(), label=datasets.Value("int8")),
    )
    with pytest.raises(ValueError, match="image_column of split 'train' must be given: .* are 'front', 'back'"):
        load_splits({"train": two, "test": two})
    back, _ = load_splits({"train": two, "test": two}, image_column="back")
    assert np.array_equal(np.asarray(back.read(0, "RGB")), np.asarray(pictures(2)[1]))


def test_rows_in_any_format_are_read():
    plain = load_split({"train": rows([0, 1])}, "train")
    formatted = load_split({"train": rows([0, 1]).with_format("numpy", columns=["label"])}, "train")
    assert formatted.labels.tolist() == [0, 1]
    assert np.array_equal(np.asarray(formatted.read(1, "RGB")), np.asarray(plain.read(1, "RGB")))


def test_columns_are_found_by_type_and_plain_integers_are_classes():
    train, test = load_splits(
        {
            "train": rows([0, 2, 1], image="img", label="fine", feature=datasets.Value("uint8")),
            "test": rows([2], image="img", label="fine", feature=datasets.Value("uint8")),
        }
    )
    assert train.class_names == ("0", "1", "2") and test.labels.tolist() == [2]
    assert train.image_column == "img"


def test_a_class_label_goes_before_other_integers():
    train = rows([0, 1]).add_column("number", [7, 8])
    assert load_splits({"train": train, "test": train})[0].labels.tolist() == [0, 1]


def test_fingerprint_tells_data_sets_apart():
    first, other, renamed = (
        load_splits({"train": train, "test": train.select([0])})[0].fingerprint
        for train in (rows([0, 1]), rows([1, 0]), rows([0, 1], feature=datasets.ClassLabel(names=["cat", "cow"])))
    )
    assert first == load_splits({"train": rows([0, 1]), "test": rows([1])})[0].fingerprint
    assert len({first, other, renamed}) == 3


TWO_LABELS = rows([0, 1], label="fine").add_column("coarse", [0, 1])
TWO_LABELS = TWO_LABELS.cast_column("coarse", datasets.ClassLabel(names=NAMES))


@pytest.mark.parametrize(
    ("splits", "arguments", "message"),
    [
        (dict(train=rows([0])), {}, "test_split 'test' is not in the data set; allowed: 'train'"),
        (dict(test=rows([0])), {}, "train_split 'train' is not in the data set; allowed: 'test'"),
        (dict(train=rows([0])), dict(test_split="train"), "test_split 'train' is the train split"),
        (dict(train=rows([]), test=rows([0])), {}, "train_split 'train' is empty"),
        (dict(train=rows([0]), test=rows([])), {}, "test_split 'test' is empty"),
        (
            dict(train=rows([0]), test=rows([0])),
            dict(image_column="pixels"),
            "image_column 'pixels' is not in split 'train'; columns: 'image', 'label'",
        ),
        (
            dict(train=rows([0]), test=rows([0])),
            dict(label_column="image"),
            "label_column 'image' of split 'train' holds struct<",
        ),
        (dict(train=TWO_LABELS, test=TWO_LABELS), {}, "label_column of split 'train' must be given: columns that"),
        (dict(train=rows([0]), test=rows([0], label="y")), {}, "label_column 'label' is not in split 'test'"),
        (
            dict(train=rows([0]), test=rows([0], feature=datasets.ClassLabel(names=["dog", "cat"]))),
            {},
            "split 'test' has classes 'dog' in 1 of 1 images; allowed: those of split 'train', 'cat'",
        ),
        (
            dict(train=rows([0, 1]), test=rows([-1, -1])),
            {},
            "split 'test' has label -1 in 2 of 2 images (the split has no labels); allowed: 0 to 1",
        ),
        (dict(train=rows([0, 1, -1]), test=rows([0])), {}, "split 'train' has label -1 in 1 of 3 images; allowed"),
        (
            dict(train=rows([0, 1], feature=datasets.Value("int64")), test=rows([5], feature=datasets.Value("int64"))),
            {},
            "split 'test' has classes '5' in 1 of 1 images; allowed: those of split 'train', '0', '1'",
        ),
        (
            dict(train=rows([0, None], feature=datasets.Value("int64")), test=rows([0])),
            {},
            "split 'train' has no label in 1 of 2 images",
        ),
    ],
)
def test_wrong_splits_columns_and_labels_are_named(splits, arguments, message):
    with pytest.raises(ValueError) as raised:
        load_splits(splits, **arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["./nowhere", "no-such-set", "org/no-such-set"])
def test_an_unknown_dataset_is_named_in_one_line(name):
    with pytest.raises(ValueError) as raised:
        open_dataset(name)
    assert repr(name) in str(raised.value) and "\n" not in str(raised.value)


def damaged_rows():
    """Three rows: a good picture, half a picture, none."""
    buffer = io.BytesIO()
    pictures(1)[0].save(buffer, format="png")
    whole = buffer.getvalue()
    images = [{"bytes": whole, "path": None}, {"bytes": whole[: len(whole) // 2], "path": None}, None]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    return datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)


@pytest.mark.parametrize(("workers", "index"), [(0, 1), (0, 2), (1, 1)])
def test_a_corrupt_image_is_named_even_by_a_worker(workers, index):
    train, _ = load_splits({"train": damaged_rows(), "test": rows([0])})
    view = ImageView(train, [0, index], eval_transform(DATA_CONFIG))
    loader = eval_loader(view, batch_size=2, rank=0, world=1, workers=workers)
    with pytest.raises(CorruptImageError) as raised:
        list(loader)
    assert str(raised.value).startswith(f"image {index} of split 'train' cannot be decoded: ")
    assert "\n" not in str(raised.value)


@pytest.fixture
def view_of_digits(digit_splits):
    def view(transform, **arguments):
        return ImageView(digit_splits[0], np.arange(50, 10, -1), transform, **arguments)

    return view


def test_an_item_is_the_normalised_image(view_of_digits):
    view = view_of_digits(eval_transform(DATA_CONFIG | {"input_size": (3, 8, 8)}))
    image, label = view[3]
    pixels = np.asarray(view.split.read(47, "L"), dtype=np.float32) / 255
    assert label == view.split.labels[47]
    torch.testing.assert_close(image, torch.from_numpy((pixels - 0.5) / 0.25).expand(3, 8, 8))


def test_grey_models_get_grey_images(view_of_digits):
    config = DATA_CONFIG | {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.25,)}
    grey, colour = (
        view_of_digits(eval_transform(DATA_CONFIG | {"input_size": (3, 8, 8)})),
        view_of_digits(eval_transform(config), channels=1),
    )
    torch.testing.assert_close(grey[0][0][:1], colour[0][0])
    with pytest.raises(ValueError, match="images of 4 channels; allowed: 1 or 3"):
        view_of_digits(None, channels=4)


def test_without_augmentation_training_sees_what_evaluation_sees(view_of_digits):
    plain, augmented = (view_of_digits(t) for t in (eval_transform(DATA_CONFIG), train_transform(DATA_CONFIG)))
    for i in range(5):
        torch.testing.assert_close(plain[i][0], augmented[(i, i)][0], rtol=0, atol=0)


def test_padded_crops_are_shifts_of_the_image(view_of_digits):
    config = DATA_CONFIG | {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    plain, shifted = view_of_digits(eval_transform(config)), view_of_digits(train_transform(config, crop_pad=2))
    padded = torch.nn.functional.pad(plain[0][0], (2, 2, 2, 2))
    shifts = {padded[:, y : y + 8, x : x + 8].numpy().tobytes() for y in range(5) for x in range(5)}
    seen = {shifted[(0, draw)][0].numpy().tobytes() for draw in range(200)}
    assert seen <= shifts and len(seen) > 15


@pytest.mark.parametrize(
    "augmentation",
    [
        dict(hflip=0.5),
        dict(crop_scale=0.3),
        dict(color_jitter=0.4),
        dict(auto_augment="rand-m9-mstd0.5"),
        dict(re_prob=1.0),
        dict(cutout=5),
    ],
)
def test_augmentation_depends_on_seed_and_draw_alone(view_of_digits, augmentation):
    view = view_of_digits(train_transform(DATA_CONFIG, **augmentation), seed=1)
    first = torch.stack([view[(0, draw)][0] for draw in range(12)])
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = torch.stack([view[(0, draw)][0] for draw in reversed(range(12))]).flip(0)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it disturb training
    assert len({x.numpy().tobytes() for x in first}) > 1


def test_training_batches_are_the_same_from_any_number_of_workers(view_of_digits):
    view = view_of_digits(train_transform(DATA_CONFIG, crop_pad=2, hflip=0.5))
    (sampler := EpochSampler(view.labels, batch_size=16, seed=0)).set_epoch(1)
    here, there = (list(train_loader(view, sampler, workers=workers)) for workers in (0, 2))
    assert len(here) == len(there) == len(sampler)
    for (images, labels), (other_images, other_labels) in zip(here, there, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_deals_out_the_same_batches_to_any_number_of_ranks(view_of_digits, world):
    view = view_of_digits(eval_transform(DATA_CONFIG))
    whole = [labels.tolist() for _, labels in eval_loader(view, batch_size=9, rank=0, world=1, workers=0)]
    assert sum(whole, []) == view.labels.tolist()
    dealt = [
        [labels.tolist() for _, labels in eval_loader(view, batch_size=9, rank=rank, world=world, workers=0)]
        for rank in range(world)
    ]
    assert [dealt[i % world][i // world] for i in range(len(whole))] == whole
    assert sum(map(len, dealt)) == len(whole)
