"""The Python of README.md runs as it stands."""

import dataclasses
import re
from pathlib import Path

import timm
import torch
from problems import conv_cell
from timm.models import save_for_hf

from nc_probe import CollapseReport

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_block_runs(tmp_path, capsys):
    save_for_hf(timm.create_model("deq_resnet8_cifar"), str(tmp_path), safe_serialization=True)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        names = {"cell": conv_cell(), "x": torch.randn(2, 4, 3, 3)}  # what README leaves to the reader
        exec(block.replace("runs/digits/checkpoint", str(tmp_path)), names)
    assert "NC1" in capsys.readouterr().out


def test_sizes_are_those_of_the_table():
    rows = re.findall(r"\| `(deq_\w+)` \| (\d+)x\d+ \| ([\d.]+) M \| ([\d.]+) M \|", README)
    assert [name for name, *_ in rows] == timm.list_models("deq_*")
    for name, size, *parameters in rows:
        for equilibrium, count in zip((True, False), parameters, strict=True):
            model = timm.create_model(name, equilibrium=equilibrium, device="meta")
            assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == count
            assert model.default_cfg["input_size"][1] == int(size)


def test_every_feature_names_a_test_that_exists():
    written = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    named = re.findall(r"\| `(test_\w+)` \|", README)
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in written] == []


def test_every_number_of_a_report_is_explained():
    explained = set(re.findall(r"`(\w+)`", README[README.index("### What is measured") :]))
    numbers = [
        f.name for f in dataclasses.fields(CollapseReport) if f.type in (float, int, int | None) or "class_" in f.name
    ]
    assert len(numbers) > 40
    assert set(numbers) - explained == {"samples"}
