"""Two launched ranks: every sampler over an interruption, and what else has to come out as in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import load_from_disk
from few_digits import save_few_digits
from safetensors.torch import load_file

from recipes.train import main
from recipes.training.manifest import Manifest
from recipes.training.state import read_tree

pytestmark = [pytest.mark.usefixtures("one_cpu_and_no_network"), pytest.mark.ddp, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SETTINGS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
SIZES = np.array([30, 16, 9, 5])
LABELS = np.repeat(np.arange(4), 34)  # of the train split


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags of digits of four classes, with the number of each image in its first pixel."""
    folder = save_few_digits(tmp_path_factory.mktemp("data") / "few", train=len(LABELS) // 4, test=9, numbered=True)
    data = f"--dataset {folder} --val_fraction 0.1 --img_size 32 --crop_pct 1 --eval_batch_size 20 --batch_size 16"
    data += f" --imbalance explicit --counts {' '.join(map(str, SIZES))}"
    return data.split()


def launch(folder, runs, *, sharded=False):
    """What each of two ranks has seen of runs, one after the other, as launched_runs.py takes and tells it."""
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps([{"watched": False, "stop": None} | run for run in runs]))
    device = "--use_fsdp --fsdp_version 2" if sharded else "--multi_gpu"  # at a free port, as other tests launch too
    launcher = f"accelerate.commands.launch {device} --quiet --num_processes 2 --num_machines 1 --main_process_port 0"
    defaults = "--mixed_precision no --dynamo_backend no tests/recipes/launched_runs.py"
    command = [sys.executable, "-m", *launcher.split(), *defaults.split(), str(folder / "runs.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [[json.loads((folder / f"{i}-{rank}.json").read_text()) for rank in (0, 1)] for i in range(len(runs))]


# A sampler, and how often it draws each class in 3 epochs of 60 images, 4 updates each.
SAMPLERS = {
    "instance": 3 * SIZES,
    "square_root --ema_decay 0.5": 180 * np.sqrt(SIZES) / np.sqrt(SIZES).sum(),
    "class_balanced": np.full(4, 45),
    "class_aware --gradient_accumulation_steps 2": np.full(4, 45),
    "reverse --ema_decay 0.5": 180 / SIZES / (1 / SIZES).sum(),
    "progressively_balanced --ema_decay 0.5 --gradient_accumulation_steps 2": 1.5 * SIZES + 1.5 * 15,
    "repeat_factor --gradient_accumulation_steps 2": 3 * SIZES * np.maximum(1, np.sqrt(15 / SIZES)),
    "class_balanced --defer 1": SIZES + 2 * 15,
}
TRAINED = "--model test_resnet --model_args.drop_rate 0.3 --lr 0.05 --clip_grad 1 --crop_pad 0"
TRAINED += " --epochs 3 --probe_every 0 --log_every 3"


def stop_and_resume(folder, flags, *, sharded=False):
    """For each of some flags: the folders of a run and of one that was stopped in its second epoch and resumed, and
    what two ranks have seen of the first, and of the second before and after the stop."""
    pairs, runs = [], []
    for i, each in enumerate(flags):
        pairs.append((folder / f"straight{i}", folder / f"stopped{i}"))
        straight, stopped = (["--output", str(path), *each] for path in pairs[-1])
        runs += [{"words": straight}, {"words": stopped, "stop": [1, 6]}, {"words": [*stopped, "--resume", "auto"]}]
    seen = launch(folder / "launch", [run | {"watched": True} for run in runs], sharded=sharded)
    return [(*pair, seen[3 * i : 3 * i + 3]) for i, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def resumed(words, tmp_path_factory):
    flags = [[*words, *TRAINED.split(), "--sampler", *sampler.split()] for sampler in SAMPLERS]
    return dict(zip(SAMPLERS, stop_and_resume(tmp_path_factory.mktemp("resumed"), flags), strict=True))


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TIMES = ("seconds", "images_per_second", "peak_memory_mib")


def numbers(folder):
    """All that a finished run of two ranks has measured and learnt, but for times."""
    read = [*records_of(folder), json.loads((folder / "results.json").read_text())]
    last = max((folder / "states").iterdir(), key=lambda path: path.name)
    files = [folder / "checkpoint" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    assert len(files) == 4
    return [each | dict.fromkeys(TIMES) for each in read], [file.read_bytes() for file in files]


def assert_it_went_on(straight, stopped, runs):
    assert [[rank["code"] for rank in run] for run in runs] == [[0, 0], [143, 143], [0, 0]]
    assert numbers(stopped) == numbers(straight)
    for whole, before, after in zip(*runs, strict=True):
        assert before["seen"] + after["seen"] == whole["seen"]
        assert len(before["seen"]) % (len(whole["seen"]) // 3)  # in the midst of an epoch


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ranks_that_are_stopped_go_on_to_the_same_numbers(resumed, sampler):
    assert_it_went_on(*resumed[sampler])


def test_so_do_ranks_that_hold_a_shard_each(words, tmp_path):
    flags = [*words, *TRAINED.split(), *"--sampler square_root --gradient_accumulation_steps 2".split()]
    assert_it_went_on(*stop_and_resume(tmp_path, [flags], sharded=True)[0])


def test_ranks_drop_out_differently_and_measure_the_same_model(resumed):
    for straight, *_ in resumed.values():
        for state in (straight / "states").iterdir():
            ranks = [read_tree(state / f"rank-{rank}") for rank in (0, 1)]
            seeds = [torch.Generator().set_state(rank["random"]["torch"]).initial_seed() for rank in ranks]
            assert seeds[0] != seeds[1]
            mine, yours = (rank["buffers"].get("average", rank["buffers"]["model"]) for rank in ranks)
            assert any("running_var" in name for name in mine)
            assert all(torch.equal(value, yours[name]) for name, value in mine.items())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ranks_share_out_what_the_sampler_asks_for(resumed, sampler):
    straight, _, (ranks, *_) = resumed[sampler]
    chosen = np.array(Manifest.load(straight / "manifest.json").indices)
    start, *records = records_of(straight)
    total = np.zeros(len(LABELS), dtype=int)
    forwards = [np.array_split(np.array(rank["seen"], dtype=object), len(records)) for rank in ranks]
    for record, *parts in zip(records, *forwards, strict=True):
        for forward in np.concatenate(parts):
            assert LABELS[forward["images"]].tolist() == forward["labels"]
        mine, yours = ([image for forward in part for image in forward["images"]] for part in parts)
        times = np.bincount(mine + yours, minlength=len(LABELS))
        assert record["draws"] == np.bincount(LABELS, times).tolist()
        if sampler == "instance":
            assert not set(mine) & set(yours) and sorted(mine + yours) == sorted(chosen)
        total += times
        for k in range(4):  # so that no image is drawn by both ranks before every other of its class by one
            mates = chosen[LABELS[chosen] == k]
            assert np.ptp(times[mates]) <= 1 and np.ptp(total[mates]) <= 1
    assert start["draws"] == [0] * 4 and total[chosen].sum() == total.sum()
    draws = np.array(list(json.loads((straight / "results.json").read_text())["draws_per_class"].values()))
    assert draws.tolist() == np.bincount(LABELS, total).tolist()
    assert np.abs(draws - SAMPLERS[sampler]).max() < 2


@pytest.mark.parametrize("average", [False, True], ids=["weights", "average"])
def test_batch_statistics_are_the_mean_of_those_of_the_ranks(words, tmp_path, average):
    """By hand, of weights that a learning rate of 1e-30 leaves as they are.

    In training every forward pass begins with the statistics of rank 0, as DDP has it; so at the end of an epoch those
    of the ranks differ by their last batches, or more in a moving average, and are reduced to their mean.
    """
    folder, kept = tmp_path / "run", 0.3
    flags = "--model test_resnet --lr 1e-30 --weight_decay 0 --sched constant --warmup_epochs 0 --crop_pad 0 --epochs 2"
    flags += f" --probe_every 0 --keep_checkpoints 99 {f'--ema_decay {kept}' if average else ''}"
    run = {"words": ["--output", str(folder), *words, *flags.split()], "watched": True}
    ((mine, yours),) = launch(tmp_path / "launch", [run])
    assert [mine["code"], yours["code"]] == [0, 0] and len(mine["seen"]) == len(yours["seen"]) == 8

    net = timm.create_model("test_resnet", num_classes=4)
    net.load_state_dict(timm.create_model(f"local-dir:{folder / 'checkpoint'}", pretrained=True).state_dict())
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    pictures = load_from_disk(words[1])["train"]["image"]
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))

    def after(statistics, numbers):
        """Statistics after a forward pass in training."""
        pixels = [torch.from_numpy(np.array(pictures[i].convert("RGB"))).permute(2, 0, 1) / 255 for i in numbers]
        net.load_state_dict(statistics, strict=False)
        net.train()((torch.stack(pixels) - mean) / std)
        return {name: value.clone() for name, value in net.named_buffers() if "running" in name}

    statistics = {name: value.clone() for name, value in net.named_buffers() if "running" in name}
    measured = statistics
    for epoch in range(2):
        averages = [measured, measured]
        for k in range(4 * epoch, 4 * epoch + 4):
            ranks = [after(statistics, rank["seen"][k]["images"]) for rank in (mine, yours)]
            statistics = ranks[0]
            keep = kept if average and k else 0.0  # 1 - 2^(-2/3), which the warmup allows at the second, is more
            averages = [
                {name: keep * value + (1 - keep) * rank[name] for name, value in one.items()}
                for one, rank in zip(averages, ranks, strict=True)
            ]
        measured = {name: (value + averages[1][name]) / 2 for name, value in averages[0].items()}
        statistics = statistics if average else measured
        part = ".average." if average else ".model."
        saved = load_file(folder / "states" / f"{4 * epoch + 4:08d}" / "state.safetensors")
        for name, value in measured.items():
            torch.testing.assert_close(saved[part + name], value, rtol=1e-4, atol=1e-5)
        gap = max((value - averages[1][name]).abs().max() for name, value in averages[0].items())
        assert gap > 0.01  # so that the mean is told from those of one rank


# A model without BatchNorm, whose gradient is a mean over images, so that it cannot depend on how a batch is cut.
PLAIN = "--model test_vit --model_args.img_size 32 --lr 0.05 --warmup_epochs 0 --epochs 2 --probe_every 0"
PLAIN += " --log_every 1 --checkpoint_every 1 --keep_checkpoints 99"
SECOND = "--model {first} --manifest {first}/manifest.json --stage"
LIKE_ONE = {
    "linear": "--ema_decay 0.5 --clip_grad 0.5 --mixup_alpha 0.4 --cutmix_alpha 1 --mix_prob 0.8 --label_smoothing 0.1",
    "cosine": "--classifier cosine --loss ldam --ema_decay 0.5 --clip_grad 1 --reweight_epoch 1",
    "etf": "--classifier etf --classifier_scale 9 --mixup_alpha 0.4 --clip_grad 1",
    "crt": f"{SECOND} crt --sampler class_balanced --ema_decay 0.5",
    "lws": f"{SECOND} lws --cutmix_alpha 1 --clip_grad 0.1",
}


def flags_of(name, words, first, *, accumulation):
    flags = [*words, *PLAIN.split(), "--gradient_accumulation_steps", str(accumulation)]
    if name in ("crt", "lws"):  # the manifest and the run say the rest
        for flag, count in (("--model", 2), ("--model_args.img_size", 2), ("--imbalance", 2), ("--counts", 5)):
            del flags[flags.index(flag) : flags.index(flag) + count]
    return [*flags, *LIKE_ONE[name].format(first=first).split()]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """Folder of the runs of one process, by name, and of "first", the first stage of two."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(["--output", str(folder / "first"), *words, *PLAIN.split()]) == 0
    for name, flags in LIKE_ONE.items():
        parts = 4 if "_alpha" in flags else 1  # mixing depends on how batches are cut, and nothing else may
        assert main(["--output", str(folder / name), *flags_of(name, words, folder / "first", accumulation=parts)]) == 0
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def shared(request, words, alone, tmp_path_factory):
    """Folder of the runs of two ranks, by name."""
    folder = tmp_path_factory.mktemp(request.param)
    runs = [["--output", str(folder / n), *flags_of(n, words, alone / "first", accumulation=2)] for n in LIKE_ONE]
    seen = launch(folder / "launch", [{"words": run} for run in runs], sharded=request.param == "fsdp2")
    assert [[rank["code"] for rank in run] for run in seen] == [[0, 0]] * len(runs)
    return folder


def curve(folder):
    """After every update, the mean loss of the epoch so far."""
    states = [json.loads(path.read_text())["progress"] for path in sorted(folder.glob("states/*/state.json"))]
    assert [state["updates"] for state in states] == list(range(9))
    return [(state["record"] or state["records"][-1])["train_loss"] for state in states[1:]]


def learnt(folder, updates):
    """The weights after some updates, and their moving average, as one vector."""
    state = load_file(folder / "states" / f"{updates:08d}" / "state.safetensors")
    return torch.cat([value.flatten().double() for key, value in sorted(state.items()) if key[1] in "ma"])


def saved(folder):
    return load_file(folder / "checkpoint" / "model.safetensors")


@pytest.mark.parametrize("name", LIKE_ONE)
def test_two_ranks_train_like_one_process(alone, shared, name):
    assert curve(shared / name) == pytest.approx(curve(alone / name), rel=1e-5)
    start, one, two = learnt(alone / name, 0), learnt(alone / name, 8), learnt(shared / name, 8)
    assert torch.equal(learnt(shared / name, 0), start)
    assert (two - one).norm() < 1e-4 * (one - start).norm()
    mine, theirs = saved(shared / name), saved(alone / name)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-6)


def test_a_frame_stays_what_it_is_on_two_ranks(shared):
    frame = saved(shared / "etf")["head.linear.weight"] / 9
    torch.testing.assert_close(frame @ frame.T, 4 / 3 * torch.eye(4) - 1 / 3)


@pytest.mark.parametrize("stage", ["crt", "lws"])
def test_a_second_stage_of_two_ranks_trains_the_classifier_alone(alone, shared, stage):
    before, after = saved(alone / "first"), saved(shared / stage)
    assert before.keys() == after.keys()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"head.weight", "head.bias"}
    factors = after["head.weight"] / before["head.weight"]
    assert ((factors - factors[:, :1]).abs().max() < 1e-5) == (stage == "lws")


def test_two_compiled_ranks_train_like_eager_ones(words, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = [*words, *PLAIN.split(), "--model_args.depth", "1"]
    runs = [
        ["--output", str(tmp_path / "eager"), *flags],
        ["--output", str(tmp_path / "fast"), *flags, "--compile", "true"],
    ]
    eager, fast = launch(tmp_path / "launch", [{"words": run} for run in runs])
    assert [rank["code"] for rank in eager + fast] == [0] * 4
    assert list((tmp_path / "cache").rglob("*.so"))
    assert curve(tmp_path / "fast") == pytest.approx(curve(tmp_path / "eager"), rel=1e-4)
    for key, value in saved(tmp_path / "eager").items():
        torch.testing.assert_close(saved(tmp_path / "fast")[key], value, rtol=1e-4, atol=1e-6)
