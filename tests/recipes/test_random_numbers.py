"""Random numbers of training: whatever else a run does, it learns the same weights, bit by bit."""

import os
import random
import signal
from hashlib import sha256
from itertools import count

import numpy as np
import pytest
import torch
from few_digits import save_few_digits
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from recipes.train import main

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

PIPELINES = {"resident": "resident", **{f"{n} workers": f"workers --workers {n}" for n in range(3)}}
SOURCES = {
    "drop_rate": "--model_args.drop_rate 0.3",
    "cell_drop_rate": "--model_args.cell_drop_rate 0.3",
    "min_steps": "--model_args.min_steps 2",
    "jacobian_weight": "--jacobian_weight 1",
    "correction_at": "--model_args.drop_rate 0.3 --correction_at 2",
    "mixup": "--mixup_alpha 0.4 --cutmix_alpha 1 --model_args.drop_path_rate 0.2",
}
ALL = "--model_args.drop_rate 0.3 --model_args.cell_drop_rate 0.3 --model_args.min_steps 2 --jacobian_weight 1"


FILES = ("state.safetensors", "rank-0.safetensors", "rank-0.json")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags of a run of two epochs of 3 updates, whose images no augmentation changes, so that pipelines agree."""
    folder = save_few_digits(tmp_path_factory.mktemp("data") / "few", train=8, test=2)
    data = f"--dataset {folder} --imbalance balanced --val_fraction 0.25 --img_size 16 --crop_pct 1 --crop_pad 0"
    model = "--model deq_resnet8_cifar --model_args.channels [4,4,8,8] --model_args.stem_width 4"
    model += " --model_args.num_groups 2 --model_args.max_steps 6"
    return [*data.split(), *model.split(), *"--epochs 2 --batch_size 8 --lr 0.05 --warmup_epochs 0".split()]


def learnt(folder):
    """Digests of weights, moments, generators and loss after the last update."""
    last = max((folder / "states").iterdir(), key=lambda path: path.name)
    return [sha256((last / name).read_bytes()).hexdigest() for name in FILES]


def stopped_and_resumed(folder, words):
    """A run that a signal ends after the second update of its second epoch, and that goes on."""
    updates = count(1)

    def stop(*_):
        if next(updates) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(stop)
    assert main(["--output", str(folder), *words]) == 143
    handle.remove()
    assert main(["--output", str(folder), "--resume", "auto", *words]) == 0


def assert_equally_learnt(folder, words, source, pipelines):
    """Pipelines, measured in every epoch or not, and over an interruption, against one resident run."""
    words = [*words, *source.split(), "--pipeline"]
    assert main(["--output", str(folder / "reference"), *words, "resident", "--probe_every", "0"]) == 0
    reference = learnt(folder / "reference")
    for name, pipeline in pipelines.items():
        run = folder / name.replace(" ", "-")
        assert main(["--output", str(run), *words, *pipeline.split(), "--probe_every", "1"]) == 0
        assert learnt(run) == reference, name
        stopped_and_resumed(run.with_suffix(".stopped"), [*words, *pipeline.split(), "--probe_every", "0"])
        assert learnt(run.with_suffix(".stopped")) == reference, f"{name}, stopped"


@pytest.mark.parametrize("pipeline", ["0 workers", pytest.param("2 workers", marks=pytest.mark.slow)])
def test_measuring_and_stopping_leave_what_is_learnt(words, tmp_path, pipeline):
    assert_equally_learnt(tmp_path, words, ALL, {pipeline: PIPELINES[pipeline]})


@pytest.mark.slow
def test_a_model_that_draws_in_evaluation_does_not_move_training(words, tmp_path):
    def draw(module, inputs):
        if hasattr(module, "pretrained_cfg") and not module.training:
            drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))

    drawn, counts = [], []
    handle = register_module_forward_pre_hook(draw)
    for every in ("0", "1"):
        folder, flags = tmp_path / every, [*words, *SOURCES["drop_rate"].split(), "--probe_every", every]
        assert main(["--output", str(folder), *flags]) == 0
        counts.append(len(drawn))
    handle.remove()
    assert counts[1] - counts[0] == counts[0] + 2  # the training images after the first two epochs
    assert learnt(tmp_path / "0") == learnt(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_so_they_do_for_every_pipeline_and_source(words, tmp_path, source):
    assert_equally_learnt(tmp_path, words, source, PIPELINES)
