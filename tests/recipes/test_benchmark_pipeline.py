"""Rates of pipelines: the arithmetic on a clock that is known, and rows for a few images."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.benchmarks.pipeline import images_of, images_per_second, noise, pipeline_rows


def test_a_rate_leaves_out_the_first_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    used = []

    def use(images, labels):
        now[0] += 60.0 if not used else 0.5
        used.append(len(labels))

    loader = [(torch.zeros(n, 1), torch.zeros(n)) for n in (4, 6, 5)]
    rate = images_per_second(loader, use, device="cpu", seconds=2.1)
    # 2.5 seconds: the rest of the first pass, and the second one.
    assert used == [4, 6, 5, 4, 6, 5] and rate == (6 + 5 + 4 + 6 + 5) / 2.5


def test_noise_is_images_in_ten_classes():
    split = noise(21)
    assert np.bincount(split.labels).tolist() == [3] + [2] * 9
    pixels = np.stack([np.asarray(split.read(i, "RGB")) for i in range(21)])
    assert pixels.shape == (21, 32, 32, 3) and pixels.std() == pytest.approx(256 / 12**0.5, rel=0.02)


def test_images_are_noise_or_those_of_a_data_set():
    assert len(images_of(None).labels) == 10_000
    assert len(images_of("digits").labels) == 1201


def test_every_pipeline_has_a_row():
    rows = pipeline_rows(noise(16), batch_size=8, workers=1, seconds=0.01)
    assert [row["pipeline"] for row in rows] == ["decode once", "resident", "train", "workers"]
    for row in rows:
        assert row["images/s"] > 0 and row["MiB"] > 50
        assert row["times training"] == pytest.approx(row["images/s"] / rows[2]["images/s"])


MEMORY = """
import json, subprocess, sys, time
import torch
from recipes.benchmarks.pipeline import measured_memory

peaks, size = {}, int(sys.argv[1])
with measured_memory(peaks, "before"):
    pass
with measured_memory(peaks, "own", every=0.01):
    held = torch.ones(size << 18)  # of 4 bytes
    time.sleep(1)  # a look takes a tenth of that on a busy machine
    del held
hold = f"x = b'1' * ({size} << 20); print(flush=True); input()"
with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
    other.stdout.readline()
    with measured_memory(peaks, "other"):
        pass
    other.communicate(b"\\n")
print(json.dumps(peaks))
"""


def test_memory_is_that_of_all_processes_at_its_peak():
    """In a process of its own, as one that has run other tests may have memory left that it uses again."""
    size, root = 256, Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", MEMORY, str(size)], cwd=root, capture_output=True, text=True)
    peaks = json.loads(ended.stdout.splitlines()[-1])
    assert peaks["own"] - peaks["before"] == pytest.approx(size, abs=30)
    assert peaks["other"] - peaks["before"] == pytest.approx(size, abs=30)
