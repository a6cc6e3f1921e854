"""What an epoch records besides accuracy and loss."""

import json

import psutil
import pytest
import torch
from few_digits import save_few_digits
from safetensors.torch import load_file

from recipes.train import main

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

# Plain gradient descent, so that the gradient is what the weights move by, over the learning rate.
LR = 0.01
FLAGS = f"--model test_resnet --img_size 16 --crop_pct 1 --epochs 1 --max_updates 3 --batch_size 6 --lr {LR}"
FLAGS += " --opt momentum --momentum 0 --weight_decay 0 --sched constant --warmup_epochs 0 --imbalance balanced"
FLAGS += " --log_every 1 --checkpoint_every 1 --keep_checkpoints 9 --gradient_accumulation_steps 2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run without clipping and of one with much of it."""
    root = tmp_path_factory.mktemp("runs")
    data = save_few_digits(root / "few", train=12, test=5)
    for name, flags in (("free", ""), ("clipped", "--clip_grad 1e-3")):
        assert main(["--output", str(root / name), "--dataset", str(data), *FLAGS.split(), *flags.split()]) == 0
    return root


def moved(folder, updates):
    """Norm of what an update has changed, over the learning rate."""
    before, after = (load_file(folder / f"states/{k:08d}/state.safetensors") for k in (updates - 1, updates))
    weights = [key for key in before if key.startswith(".model.") and "running" not in key and "num_batch" not in key]
    return torch.stack([(after[key].double() - before[key].double()).norm() for key in weights]).norm().item() / LR


def gradient_norm(folder, updates):
    progress = json.loads((folder / f"states/{updates:08d}/state.json").read_text())["progress"]
    return (progress["record"] or progress["records"][-1])["grad_norm"]


def test_the_gradients_norm_is_told_before_clipping(runs):
    norms = [gradient_norm(runs / "free", k) for k in (1, 2, 3)]
    assert norms == pytest.approx([moved(runs / "free", k) for k in (1, 2, 3)], rel=1e-4)
    assert len(set(norms)) == 3
    assert gradient_norm(runs / "clipped", 1) == pytest.approx(norms[0], rel=1e-6)
    assert moved(runs / "clipped", 1) == pytest.approx(1e-3, rel=1e-2)


def test_speed_and_memory_are_told_of_every_epoch(runs):
    start, epoch = map(json.loads, (runs / "free" / "metrics.jsonl").read_text().splitlines())
    assert "images_per_second" not in start and "grad_norm" not in start
    # 18 images of three updates, in less than the time of the epoch, which measures too.
    assert sum(epoch["draws"]) / epoch["images_per_second"] < epoch["seconds"]
    assert sum(epoch["draws"]) / epoch["images_per_second"] > 0.003  # six forward and backward passes
    for record in (start, epoch):
        assert 50 < record["peak_memory_mib"] < psutil.virtual_memory().total / 2**20
