"""What presets cost: counts of operations and images in closed form."""

import pytest
import torch
from torch import nn

from recipes.benchmarks import presets as benchmark_presets
from recipes.benchmarks.presets import DATA, PRESETS, count_images, grid_rows, operations, preset_rows
from recipes.settings.config import parse


def test_operations_of_products_there_and_back():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    images = torch.randn(4, 3, 6, 6)
    conv, linear = 2 * 4 * 36 * 8 * 27, 2 * 4 * 8 * 36 * 5
    with torch.no_grad():
        assert operations(lambda: net(images)) == conv + linear
    # Each product once more for the weights; for its input too, but for the pixels.
    assert operations(lambda: net(images).sum().backward()) == 2 * conv + 3 * linear


def test_count_images_a_run():
    config = parse(["--config", str(PRESETS[0].with_name("cifar10_two_group.yaml")), "--output", "-"])
    images = 3 * 4500 + 7 * 450
    assert count_images(config) == (10, 150 * images, 16 * images + 151 * 5000 + 10_000)  # measured at 0, 10, ..., 150
    config = parse(["--epochs", "7", "--probe_every", "0", "--imbalance", "balanced", "--output", "-"])
    assert count_images(config) == (10, 7 * 1080, 1080 + 8 * 120 + 596)
    assert all(parse(["--config", str(path), "--output", "-"]).dataset in DATA for path in PRESETS)


def test_the_sum_of_a_run(tmp_path, monkeypatch):
    preset = tmp_path / "small.yaml"
    preset.write_text("model: test_resnet\nimg_size: 32\nepochs: 2\nprobe_every: 1\n")
    work = iter((12e9, 4e9))
    monkeypatch.setattr(benchmark_presets, "operations", lambda run: next(work))
    monkeypatch.setattr(benchmark_presets, "seconds_of", lambda *_: 0.5)
    (row,) = preset_rows(torch.device("cpu"), 1, presets=[preset], batch_size=4)
    trained = 3 * 108 + 7 * 10
    evaluated = 3 * trained + 3 * 120 + 596
    assert row == {
        "preset": "small",
        "images": trained,
        "epochs": 2,
        "GFLOP / image": 3.0,
        "PFLOP": pytest.approx((2 * trained * 3 + evaluated) * 1e-6),
        "images/s": 8.0,
        "hours": pytest.approx((2 * trained + evaluated) / 8 / 3600),
    }


def test_every_solve_takes_all_its_steps(tmp_path):
    work = []
    for steps in (6, 12, 18):
        preset = tmp_path / f"{steps}.yaml"
        preset.write_text(f"model_args: {{max_steps: {steps}, tol: 0.5}}\n")
        (row,) = preset_rows(torch.device("cpu"), 1, presets=[preset], batch_size=2)
        assert row["images/s"] > 0 and row["hours"] > 0
        work.append(row["GFLOP / image"])
    evaluation = 2 * (2 * 64 * 64 * 9) * 4 * 4 / 1e9  # two convolutions of 64 channels of 4 x 4
    for more in (work[1] - work[0], work[2] - work[1]):
        assert more == pytest.approx(6 * 2 * evaluation, rel=0.02)  # there and back; those of the solver are small


def test_the_sum_of_a_grid(tmp_path, monkeypatch):
    grid = tmp_path / "small.yaml"
    grid.write_text(
        "base: {model: test_resnet, img_size: 32, epochs: 2, probe_every: 1}\n"
        "arms: {a: {}, b: {epochs: 1}}\naxes: {ratio: [10]}\nalso: [{imbalance: balanced}]\nseeds: [0, 1]\n"
        "tune: {lr: [0.1, 0.2, 0.3]}\ntune_seeds: [2]\n"
    )
    monkeypatch.setattr(benchmark_presets, "operations", lambda run: 4e9)
    monkeypatch.setattr(benchmark_presets, "seconds_of", lambda *_: 0.5)
    a, b = grid_rows(torch.device("cpu"), 1, grids=[grid], batch_size=4)
    assert (a["grid"], a["arm"], a["runs"], b["arm"], b["runs"]) == ("small", "a", 10, "b", 10)
    few, all_of_them = 3 * 108 + 7 * 10, 1080
    for row, epochs in ((a, 2), (b, 1)):
        images = [epochs * n + (epochs + 1) * (n + 120) + 596 for n in (few, all_of_them)]
        assert row["hours"] == pytest.approx(5 * sum(images) / 8 / 3600) and row["images/s"] == 8
        assert row["PFLOP"] == pytest.approx(5 * sum(images) * 1e-6)
