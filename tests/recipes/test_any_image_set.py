"""Generated data sets, of any mode, layout, kind of labels and splits: each is read rightly, or refused in one line."""

import io

import datasets
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recipes.errors import UserError
from recipes.images.sources import load_splits, open_dataset

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"]
LAYOUTS = ["folders", "metadata", "csv", "parquet", "bytes", "saved", "numpy", "undecoded"]
LABELS = {
    "strings": ["ant", "bee", "train"],
    "bools": [False, True],
    "integers": [0, 1, 2],
    "from one": [1, 2, 3],
    "gaps": [3, 40, 10**12],
    "floats": [0.5, 1.0],
    "lists": [[0], [1]],
    "none": [None, "a"],
    "negative": [-1, 0],
}
FIT = ("strings", "bools", "integers", "from one", "gaps")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, no bars, and no cache but the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


def encoded(mode, grey, bad):
    """An image of one grey in a file that holds its mode, or something that is none."""
    value = {"1": 255 * (grey > 127), "I;16": 257 * grey, "F": grey / 255}.get(mode, grey)
    whole = {"LA": (grey, 255), "RGB": 3 * (grey,), "RGBA": (*3 * (grey,), 255), "CMYK": (*3 * (255 - grey,), 0)}
    whole |= {"YCbCr": (grey, 128, 128), "LAB": (grey, 128, 128)}
    image = Image.new("L", (3, 2), grey) if mode == "P" else Image.new(mode, (3, 2), whole.get(mode, value))
    if mode == "P":
        image = image.convert("P")
    format = "png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "tiff"
    image.save(buffer := io.BytesIO(), format)
    content = buffer.getvalue()
    return {"": content, "cut": content[:20], "text": b"no image"}[bad], format


def write(folder, layout, splits, mode, bad):
    """Write splits of (grey, label) in a layout."""
    tables = {}
    for split, items in splits.items():
        listed = []
        for i, (grey, label) in enumerate(items):
            content, suffix = encoded(mode, grey, bad)
            inner = f"{label}/" if layout == "folders" else "images/"
            path = folder / (f"{split}/{inner}{i}.{suffix}" if layout != "csv" else f"{inner}{split}{i}.{suffix}")
            if layout in ("folders", "metadata", "csv"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            place = str(path.relative_to(folder if layout == "csv" else folder / split)) if path.exists() else None
            listed.append((place, content, label))
        tables[split] = listed
    for split, listed in tables.items():
        paths, contents, labels = map(list, zip(*listed, strict=True))
        if layout == "metadata":
            pandas.DataFrame({"file_name": paths, "label": labels}).to_csv(folder / split / "metadata.csv", index=False)
        elif layout == "csv":
            pandas.DataFrame({"picture": paths, "label": labels}).to_csv(folder / f"{split}.csv", index=False)
        elif layout in ("parquet", "bytes"):
            images = contents if layout == "bytes" else [{"bytes": x, "path": None} for x in contents]
            datasets.Dataset.from_dict({"x": images, "label": labels}).to_parquet(folder / f"{split}.parquet")
    if layout in ("saved", "numpy", "undecoded"):
        made = {}
        for split, listed in tables.items():
            content = {
                "x": [{"bytes": x, "path": None} for _, x, _ in listed],
                "label": [label for *_, label in listed],
            }
            made[split] = datasets.Dataset.from_dict(content)
            made[split] = made[split].cast_column("x", datasets.Image(decode=layout != "undecoded"))
            if layout == "numpy":
                made[split].set_format("numpy")
        datasets.DatasetDict(made).save_to_disk(folder)


@st.composite
def cases(draw):
    kind = draw(st.sampled_from([*FIT, *LABELS]))
    grey = st.integers(0, 51).map(lambda k: 5 * k)  # further apart than rounding may move them
    items = st.lists(st.tuples(grey, st.sampled_from(LABELS[kind])), min_size=1, max_size=4)
    names = draw(st.sampled_from([("train", "test"), ("train", "test"), ("train",), ("train", "validation", "test")]))
    case = {"layout": draw(st.sampled_from(LAYOUTS)), "mode": draw(st.sampled_from(MODES)), "kind": kind}
    case["bad"] = draw(st.sampled_from(["", "", "", "cut", "text"]))
    splits = {name: draw(items) for name in names}
    if "test" in splits and draw(st.booleans()):  # its classes are among those of the train split
        known = st.sampled_from([label for _, label in splits["train"]])
        splits["test"] = [(grey, draw(known)) for grey, _ in splits["test"]]
    return case | {"splits": splits}


def is_class(label, kind, layout):
    """Whether a label tells classes apart in the form in which the layout has it."""
    if layout == "folders":  # its name does
        return True
    if kind == "lists" and layout in ("metadata", "csv"):  # where it is text
        return True
    return kind in FIT or (kind in ("none", "negative") and label not in (None, -1))


@given(cases())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_data_set_is_read_rightly_or_refused_in_one_line(tmp_path_factory, case):
    folder, splits = tmp_path_factory.mktemp("set"), case["splits"]
    layout, mode, kind = case["layout"], case["mode"], case["kind"]
    write(folder, layout, splits, mode, case["bad"])
    used = {name: {str(label) for _, label in items} for name, items in splits.items()}
    labels = [label for name in ("train", "test") for _, label in splits.get(name, ())]
    fits = not case["bad"] and all(is_class(label, kind, layout) for label in labels)
    fits = fits and "test" in splits and used["test"] <= used["train"]
    try:
        loaded = load_splits(open_dataset(str(folder)))
        greys = [[split.read(i, "L").getpixel((0, 0)) for i in range(len(split.labels))] for split in loaded]
    except UserError as error:
        assert not fits, error
        assert str(error) and "\n" not in str(error)
        return
    assert fits
    for split, seen in zip(loaded, greys, strict=True):
        assert set(split.class_names) == used["train"]
        names = [split.class_names[k] for k in split.labels]
        assert sorted(names) == sorted(str(label) for _, label in splits[split.name])
        if mode != "LAB":  # whose lightness is another scale of grey
            wanted = [(255 * (grey > 127) if mode == "1" else grey, str(label)) for grey, label in splits[split.name]]
            assert sorted(zip((5 * round(grey / 5) for grey in seen), names, strict=True)) == sorted(wanted)
