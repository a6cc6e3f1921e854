"""The pages: their Python runs as it stands, their links lead somewhere, their tables tell the truth."""

import dataclasses
import re
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

import timm_deq  # noqa: F401 - registers its models
from nc_probe import CollapseReport

ROOT = Path(__file__).parent.parent
PAGES = {
    path: (ROOT / path).read_text()
    for path in ("README.md", *(f"{p}/README.md" for p in ("timm_deq", "nc_probe", "recipes")))
}
BLOCKS = {path: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for path, text in PAGES.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What README's first command leaves behind."""
    folder = tmp_path_factory.mktemp("saved")
    save_for_hf(timm.create_model("deq_resnet8_cifar"), str(folder), safe_serialization=True)
    return folder


def runs_elsewhere(block):
    """Whether it trains with a package that takes seconds to import: tests/nc_probe/test_integrations.py runs it."""
    return "integrations.transformers" in block or "integrations.lightning" in block


@pytest.mark.parametrize(
    ("path", "number"),
    [(path, i) for path, blocks in BLOCKS.items() for i, block in enumerate(blocks) if not runs_elsewhere(block)],
)
def test_every_block_runs(path, number, checkpoint):
    exec(BLOCKS[path][number].replace("runs/digits/checkpoint", str(checkpoint)), {})


def test_the_pages_have_their_examples():
    assert {path: len(blocks) for path, blocks in BLOCKS.items()} == {
        "README.md": 3,
        "timm_deq/README.md": 5,
        "nc_probe/README.md": 8,
        "recipes/README.md": 0,
    }


def test_the_front_page_is_one():
    assert len(PAGES["README.md"].splitlines()) <= 250


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path):
    links = re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', PAGES[path])
    links = [link or source for link, source in links if not (link or source).startswith("http")]
    assert links or path == "recipes/README.md"
    assert [link for link in links if not ((ROOT / path).parent / link).exists()] == []


def test_sizes_are_those_of_the_table():
    rows = re.findall(r"\| `(deq_\w+)` \| (\d+)x\d+ \| ([\d.]+) M \| ([\d.]+) M \|", PAGES["README.md"])
    assert [name for name, *_ in rows] == timm.list_models("deq_*")
    for name, size, *parameters in rows:
        for equilibrium, count in zip((True, False), parameters, strict=True):
            model = timm.create_model(name, equilibrium=equilibrium, device="meta")
            assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == count
            assert model.default_cfg["input_size"][1] == int(size)


def test_every_feature_names_a_test_that_exists():
    written = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    named = re.findall(r"\| `(test_\w+)` \|", PAGES["timm_deq/README.md"])
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in written] == []


def test_every_number_of_a_report_is_explained():
    page = PAGES["nc_probe/README.md"]
    explained = set(re.findall(r"`(\w+)`", page[page.index("## What is measured") :]))
    numbers = [
        f.name for f in dataclasses.fields(CollapseReport) if f.type in (float, int, int | None) or "class_" in f.name
    ]
    assert len(numbers) > 40
    assert set(numbers) - explained == {"samples"}
