"""Image data sets of the Hub, on the loopback: their splits, classes and images, and what is in the cache."""

import io

import datasets
import pandas
import pytest
from hub_server import status
from hub_store import File, Repo
from huggingface_hub import constants
from PIL import Image

from recipes.images.sources import load_split, open_dataset

ID = "lab/pets"


def encoded(number):
    Image.new("RGB", (2, 2), (number, 0, 0)).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


@pytest.fixture
def served(hub, tmp_path, monkeypatch):
    """A function that serves a data set: images by path, image i being i in its first channel, and other files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "rows")

    def serve(pictures, **others):
        repo = hub.repos[f"datasets/{ID}"] = Repo(False)
        files = {path: File(encoded(i)) for i, path in enumerate(pictures)}
        names = {name.replace("__", "/"): content for name, content in others.items()}
        repo.commit("main", "first", files | {name: File(content) for name, content in names.items()})
        return repo

    return serve


def content(revision=None):
    splits = open_dataset(ID, revision=revision)
    loaded = {name: load_split(splits, name) for name in splits}
    return {
        name: {split.read(i, "RGB").getpixel((0, 0))[0]: split.class_names[k] for i, k in enumerate(split.labels)}
        for name, split in loaded.items()
    }


PICTURES = ["train/cat/0.png", "train/train/1.png", "train/test-tube/2.png", "test/cat/3.png"]
WANTED = {"train": {0: "cat", 1: "train", 2: "test-tube"}, "test": {3: "cat"}}
README = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: x/**\n---\n"


@pytest.mark.parametrize(
    "others", [{}, {"README.md": b"# Pets\n"}, {"train/metadata.csv": b"file_name,size\ncat/0.png,7\n"}]
)
def test_image_files_are_split_by_their_first_level(served, others):
    served(PICTURES, **others)
    assert content() == WANTED


def test_a_readme_that_lists_files_says_what_the_splits_are(served):
    served(["x/a/0.png", "x/b/1.png", "test/a/2.png"], **{"README.md": README})
    assert content() == {"train": {0: "a", 1: "b"}}


def test_tables_of_images_are_read_by_datasets(served, hub, tmp_path):
    files = {}
    for split, numbers in (("train", [0, 1]), ("test", [2])):
        images = [{"bytes": encoded(i), "path": None} for i in numbers]
        pandas.DataFrame({"image": images, "label": ["ab"[i % 2] for i in numbers]}).to_parquet(tmp_path / "x.parquet")
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / "x.parquet").read_bytes()
    served(["picture of the page.png"], **files)
    assert content() == {"train": {0: "a", 1: "b"}, "test": {2: "a"}}
    assert not [request for request in hub.requests if "picture" in request]


def test_a_revision(served):
    repo = served(PICTURES)
    before = repo.branches["main"]
    repo.commit("main", "less", {path: File(encoded(9)) for path in ("train/cat/0.png", "test/cat/1.png")})
    assert content() == {"train": {9: "cat"}, "test": {9: "cat"}}
    assert content(before) == WANTED


def test_without_the_hub_the_cache_serves_what_is_whole(served, hub, monkeypatch):
    served(PICTURES)
    hub.fail("(GET|HEAD) .*/resolve/.*test-tube", *[status(403)] * 9)
    with pytest.raises(ValueError, match=f"dataset '{ID}' cannot be opened: .*403.*; allowed: 'digits', a folder"):
        content()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=f"dataset '{ID}' cannot be opened: .*; allowed: 'digits', a folder"):
            content()
    hub.faults.clear()
    assert content() == WANTED
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert content() == WANTED
