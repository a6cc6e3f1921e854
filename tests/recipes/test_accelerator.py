"""How recipes set up the device of a run, on a stand-in for one with a GPU."""

import os
from types import SimpleNamespace

import pytest
import torch

from recipes.settings.config import parse
from recipes.training import sharding


@pytest.fixture
def settings_of_torch(monkeypatch):
    """Leaves what is set for the whole process as it was."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("words", [[], ["--deterministic", "false"]], ids=["by default", "not"])
def test_a_gpu_sums_in_one_order_unless_told_otherwise(device, words, settings_of_torch, monkeypatch):
    config = parse(["--output", "-", *words])
    given = {"mixed_precision": "no", "gradient_accumulation_steps": 1, "num_processes": 1}
    monkeypatch.setattr(sharding, "Accelerator", lambda: SimpleNamespace(device=torch.device(device), **given))
    sharding.start_accelerator(deterministic=config.deterministic)
    wanted = device == "cuda" and not words  # a CPU does so in any case
    assert torch.are_deterministic_algorithms_enabled() == wanted
    assert torch.is_deterministic_algorithms_warn_only_enabled() == wanted  # what has no such form is no error
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == wanted
    assert torch.utils.deterministic.fill_uninitialized_memory == (not wanted)
