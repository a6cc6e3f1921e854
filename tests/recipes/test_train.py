"""recipes/train.py as a user runs it: a whole run, two ranks, and mistakes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from recipes.images.sources import digits
from recipes.imbalance.losses import Loss
from recipes.settings.config import parse
from recipes.train import main
from recipes.training.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

ROOT = Path(__file__).parents[2]


def launch(*words, ranks=1, sharded=False):
    """`accelerate launch recipes/train.py`, with one thread in each process so that sums have one order."""
    # `--cpu` starts one process whatever number is asked for, unless there is MPI; `--multi_gpu` stands for several.
    device = "--cpu" if ranks == 1 else "--use_fsdp --fsdp_version 2" if sharded else "--multi_gpu"
    launcher = (
        f"accelerate.commands.launch {device} --quiet --num_processes {ranks} --num_machines 1 --main_process_port 0"
    )
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    defaults = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", *launcher.split(), *defaults, "recipes/train.py", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300)


def lines_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def logits_of(net, split, rows):
    """Logits (N, K) of digits, through PIL and arithmetic written out."""
    cfg = net.pretrained_cfg
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[cfg["interpolation"]]
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = []
    for i in rows:
        picture = split[i]["image"].convert("RGB").resize(cfg["input_size"][1:], resample)
        images.append((torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std)
    with torch.no_grad():
        features = net.forward_head(net.forward_features(torch.stack(images)), pre_logits=True)
        return features.double(), net.get_classifier()(features)


STATE = ("rank-0.json", "rank-0.safetensors", "state.json", "state.safetensors")
DEFAULT = (
    "--epochs",
    "2",
    "--probe_every",
    "1",
    "--eval_batch_size",
    "50",
    "--model_args.tol",
    "2e-3",
    "--model_args.max_steps",
    "9",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the default command: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "deep" / "digits"
    done = launch("--output", str(folder), *DEFAULT)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_prints_results_and_progress(run):
    folder, done = run
    results = json.loads((folder / "results.json").read_text())
    test, collapse, solver = results["test"], results["collapse"], results["solver"]
    assert done.stdout.splitlines()[-4:] == [
        "test accuracy    " + "   ".join(f"{name} {test[name]:.2%}" for name in ("overall", "majority", "minority")),
        f"neural collapse  NC1 {collapse['nc1']:.4g}   NC2 {collapse['nc2_etf']:.4g}   NC3 {collapse['nc3']:.4g}   "
        f"NC4 {collapse['nc4']:.4g}",
        f"evaluations      {solver['mean_steps']:.2f} per image, {solver['converged']:.1%} converged",
        f"run folder       {folder}",
    ]
    assert "epoch 2/2" in done.stderr and "loss=" in done.stderr and "Traceback" not in done.stderr


def test_a_run_folder_holds_everything(run):
    folder, _ = run
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "config.yaml",
        "figures/gram.png",
        "figures/residual.png",
        "figures/steps.png",
        "figures/training.png",
        "manifest.json",
        "metrics.jsonl",
        "results.json",
        *(f"states/{updates}/{name}" for updates in ("00000012", "00000024") for name in STATE),
    ]
    assert parse(["--config", str(folder / "config.yaml")]) == parse(["--output", str(folder), *DEFAULT])


def test_the_settings_that_were_left_open_are_recorded(run):
    chosen = json.loads((run[0] / "results.json").read_text())["chosen"]
    cfg = timm.create_model("deq_resnet8_cifar").pretrained_cfg
    assert chosen == {
        **{name: list(value) if isinstance(value := cfg[name], tuple) else value for name in ("mean", "std")},
        **{name: cfg[name] for name in ("interpolation", "crop_pct")},
        **{"img_size": 32, "imbalance": "two_group", "majority": 3, "ratio": 10.0},
        **{"image_column": "image", "label_column": "label", "pipeline": "resident"},
    }


def test_open_settings_of_mixing_sampling_and_classifier_are_recorded(tmp_path):
    words = "--mixup_alpha 0.2 --sampler repeat_factor --classifier cosine --max_updates 1 --pipeline workers".split()
    assert main(["--output", str(tmp_path / "x"), *SMALL, *words]) == 0
    chosen = json.loads((tmp_path / "x" / "results.json").read_text())["chosen"]
    wanted = {"mix_prob": 1.0, "repeat_threshold": 0.1, "classifier_scale": 30.0}
    assert {name: chosen[name] for name in wanted} == wanted and "pipeline" not in chosen


@pytest.mark.parametrize(
    ("launched", "words", "message"),
    [
        ("MIXED_PRECISION=fp16", "", "mixed_precision is 'fp16'; allowed: no or bf16 on cpu"),
        ("MIXED_PRECISION=fp8", "", "fp8"),
        (
            "GRADIENT_ACCUMULATION_STEPS=3",
            "--gradient_accumulation_steps 2",
            "gradient_accumulation_steps is 2; allowed: 3, as `accelerate launch` has it, or 1",
        ),
    ],
)
def test_what_the_launcher_asks_for_is_done_or_refused(tmp_path, capsys, monkeypatch, launched, words, message):
    AcceleratorState._reset_state(True)
    name, value = launched.split("=")
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert main(["--output", str(tmp_path / "x"), *SMALL, *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
    monkeypatch.undo()
    AcceleratorState._reset_state(True)


def test_accumulation_that_the_launcher_sets_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    folder, passes = tmp_path / "x", []

    def count(module, *_):
        if isinstance(module, Loss):
            passes.append(module)

    handle = register_module_forward_hook(count)
    assert main(["--output", str(folder), *SMALL, "--max_updates", "2"]) == 0
    handle.remove()
    assert len(passes) == 6
    assert parse(["--config", str(folder / "config.yaml")]).gradient_accumulation_steps == 3


def test_metrics_have_a_line_for_every_epoch_from_the_initial_model_on(run):
    records = lines_of(run[0])
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert [record["train_loss"] is None for record in records] == [True, False, False]
    for record in records:
        assert set(record["val"]) == set(record["train"]) == {"overall", "majority", "minority"}
        assert record["collapse"]["nc1"] > 0 and 1 <= record["solver"]["mean_steps"] <= 9
    # Cosine with a warmup of one epoch of 12 updates: the last update of each epoch.
    assert records[1]["lr"] == pytest.approx(1e-4 + (0.1 - 1e-4) * 11 / 12)
    assert records[2]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 23 / 24)))


def test_the_manifest_is_the_two_group_protocol_on_what_validation_leaves(run):
    manifest = Manifest.load(run[0] / "manifest.json")
    labels = np.array(digits()["train"]["label"])
    sizes = np.bincount(labels)
    assert manifest.counts == [(sizes - np.round(sizes / 10)).min() // (1 if k < 3 else 10) for k in range(10)]
    assert np.bincount(labels[manifest.indices]).tolist() == manifest.counts
    assert np.bincount(labels[manifest.validation]).tolist() == np.round(sizes / 10).tolist()
    assert not set(manifest.indices) & set(manifest.validation)


def test_the_checkpoint_reloads_and_scores_what_was_reported(run):
    folder, _ = run
    results = json.loads((folder / "results.json").read_text())
    net = timm.create_model(f"local-dir:{folder / 'checkpoint'}", pretrained=True).eval()
    assert net.layer4.equilibrium.solver.tol == 2e-3
    assert sum(p.numel() for p in net.parameters()) == results["parameters"]

    test = digits()["test"]
    right = logits_of(net, test, range(len(test)))[1].argmax(1).numpy() == np.array(test["label"])
    groups = {"overall": range(10), "majority": range(3), "minority": range(3, 10)}
    for name, classes in groups.items():
        assert results["test"][name] == pytest.approx(right[np.isin(test["label"], list(classes))].mean(), abs=1e-9)
    per_class = [right[np.array(test["label"]) == k].mean() for k in range(10)]
    assert list(results["test_per_class"].values()) == pytest.approx(per_class)
    assert results["images"]["test"] == len(test)


def test_collapse_is_measured_on_the_training_images_as_they_are(run):
    folder, _ = run
    results = json.loads((folder / "results.json").read_text())
    manifest = Manifest.load(folder / "manifest.json")
    net = timm.create_model(f"local-dir:{folder / 'checkpoint'}", pretrained=True).eval()
    features = logits_of(net, digits()["train"], manifest.indices)[0].numpy()
    labels = np.array(digits()["train"]["label"])[manifest.indices]
    means = np.stack([features[labels == k].mean(0) for k in range(10)])
    within = np.mean([np.cov(features[labels == k].T, bias=True) for k in range(10)], axis=0)
    between = np.cov(means.T, bias=True)
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-8, hermitian=True)) / 10
    assert results["collapse"]["nc1"] == pytest.approx(nc1, rel=1e-3)
    assert results["collapse"]["samples"] == len(labels)


def test_a_run_folder_that_exists_is_not_touched(run, capsys):
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["--output", str(folder)]) == 2
    assert capsys.readouterr().err == f"error: output {str(folder)!r} exists; allowed: a folder that does not\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def assert_equal_numbers(left, right, tolerance):
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, dict):
            assert_equal_numbers(value, right[key], tolerance)
        elif isinstance(value, float):
            assert value == pytest.approx(right[key], rel=tolerance, abs=tolerance), key
        else:
            assert value == right[key], key


# A model without BatchNorm, whose gradient is a mean over images, so that it cannot depend on how a batch is cut.
VIT = "--model test_vit --model_args.img_size 32 --epochs 1 --lr 0.02 --batch_size 37 --probe_every 0".split()


def outcome(folder):
    """What an epoch of training did: its loss, and the collapse it led to."""
    record = lines_of(folder)[-1]
    return [record["train_loss"], record["collapse"]["nc1"], record["collapse"]["nc3"], record["lr"]]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert main(["--output", str(folder), *VIT]) == 0
    return outcome(folder)


def test_accumulated_batches_train_like_whole_ones(vit, tmp_path):
    assert main(["--output", str(tmp_path / "x"), *VIT, "--gradient_accumulation_steps", "3"]) == 0
    assert outcome(tmp_path / "x") == pytest.approx(vit, rel=1e-4)


def on_two_ranks(folder, *words, sharded=False):
    done = launch("--output", str(folder), *words, ranks=2, sharded=sharded)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "results.json").read_text())["ranks"] == 2
    assert done.stdout.count("test accuracy") == 1  # by the main process alone


@pytest.mark.ddp
def test_two_ranks_measure_what_one_does(run, tmp_path):
    on_two_ranks(tmp_path / "two", *DEFAULT, "--epochs", "1")
    one, two = lines_of(run[0])[0], lines_of(tmp_path / "two")[0]  # the initial model, the same in both
    assert_equal_numbers(two["collapse"], one["collapse"], 1e-10)
    assert_equal_numbers(two["solver"], one["solver"], 1e-10)
    for key in ("val", "train"):
        assert two[key] == one[key]
    assert (tmp_path / "two" / "manifest.json").read_bytes() == (run[0] / "manifest.json").read_bytes()


@pytest.mark.ddp
def test_two_ranks_train_like_one(vit, tmp_path):
    on_two_ranks(tmp_path / "two", *VIT, "--gradient_accumulation_steps", "2")
    assert outcome(tmp_path / "two") == pytest.approx(vit, rel=1e-4)


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_the_curve_of_two_ranks_is_that_of_one(tmp_path, sharded):
    """Loss after every update, with everything on that has to know of ranks, and over an interruption."""
    flags = "--checkpoint_every 1 --keep_checkpoints 99 --log_every 1 --ema_decay 0.5 --clip_grad 1".split()
    assert main(["--output", str(tmp_path / "one"), *VIT, *flags]) == 0
    accumulated = [*VIT, *flags, "--gradient_accumulation_steps", "2"]
    on_two_ranks(tmp_path / "two", *accumulated, sharded=sharded)

    def curve(folder):
        states = [json.loads(path.read_text())["progress"] for path in sorted(folder.glob("states/*/state.json"))]
        assert [state["updates"] for state in states] == list(range(12))
        return [state["record"]["train_loss"] for state in states[1:-1]] + [lines_of(folder)[-1]["train_loss"]]

    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-4)
    assert outcome(tmp_path / "two") == pytest.approx(outcome(tmp_path / "one"), rel=1e-4)
    again = ["--resume", str(tmp_path / "two" / "states" / "00000006"), *accumulated]
    on_two_ranks(tmp_path / "again", *again, sharded=sharded)
    assert outcome(tmp_path / "again") == outcome(tmp_path / "two")
    saved = [load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("two", "again")]
    torch.testing.assert_close(*saved, rtol=0, atol=0)


SMALL = "--model test_resnet --img_size 32 --crop_pct 1 --epochs 2 --probe_every 0".split()


def test_an_explicit_model_has_no_evaluations_and_best_is_chosen_by_validation(tmp_path, capsys):
    folder = tmp_path / "x"
    words = (
        "--select best --imbalance balanced --sampler class_balanced --ema_decay 0.9 --clip_grad 1 --lr 0.02".split()
    )
    assert main(["--output", str(folder), *SMALL, *words]) == 0
    out = capsys.readouterr().out
    assert "evaluations      -\n" in out and "majority" not in out
    results, records = json.loads((folder / "results.json").read_text()), lines_of(folder)
    val = [record["val"]["overall"] for record in records]
    assert results["selected"] == {"by": "best", "epoch": int(np.argmax(val))}
    assert not (folder / "figures" / "residual.png").exists() and not (folder / "figures" / "steps.png").exists()
    net = timm.create_model(f"local-dir:{folder / 'checkpoint'}", pretrained=True).eval()
    test = digits()["test"]
    right = logits_of(net, test, range(len(test)))[1].argmax(1) == torch.tensor(test["label"])
    assert right.double().mean().item() == pytest.approx(results["test"]["overall"], abs=0.002)


def test_the_initial_model_is_measured_without_training(tmp_path):
    assert main(["--output", str(tmp_path / "x"), *SMALL, "--epochs", "0", "--val_fraction", "0"]) == 0
    (record,) = lines_of(tmp_path / "x")
    assert "val" not in record and record["collapse"]["samples"] == 3 * 116 + 7 * 11
    torch.manual_seed(0)
    initial = timm.create_model("test_resnet", num_classes=10)
    saved = load_file(tmp_path / "x" / "checkpoint" / "model.safetensors")
    torch.testing.assert_close(dict(initial.state_dict()), saved, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--modle resnet18", "unrecognized arguments: --modle resnet18 (did you mean 'model'?)"),
        ("--model resnet8", "model 'resnet8' is unknown (did you mean "),
        ("--model_args.tool 1", "model 'deq_resnet8_cifar' has no argument 'tool' (did you mean 'tol'?) in model_args"),
        ("--model_args.solver newton", "newton"),
        ("--dataset org/nothing", "dataset 'org/nothing' cannot be opened: "),
        ("--dataset ./nothing", "dataset './nothing' is not a folder"),
        ("--label_column digit", "label_column 'digit' is not in split 'train'; columns: 'image', 'label'"),
        ("--test_split validation", "test_split is 'validation'; allowed: 'test', or --test_fraction 0.2 to take"),
        ("--majority 11", "majority (K_A) is 11; allowed: 0 to 10"),
        ("--ratio 0.5", "ratio (R) is 0.5; allowed: 1 or more"),
        ("--ratio 1000", "ratio (R) is 1000, which leaves a minority class empty; allowed: 1 to 104"),
        (
            "--batch_size 1 --gradient_accumulation_steps 2",
            "batch_size 1 gives batches of 1 images; allowed: 2 or more",
        ),
        ("--model_args.in_chans 2", "the model takes images of 2 channels; allowed: 1 or 3"),
        (
            "--model test_resnet --jacobian_weight 0.1",
            "jacobian_weight is 0.1; allowed: 0 for a model without an equilibrium",
        ),
        (
            "--model test_resnet --correction_at 2 5",
            "correction_at is [2, 5]; allowed: none for a model with 0 equilibria",
        ),
        (
            "--tracker trackio",
            "tracker 'trackio' needs the package trackio; allowed: none, or after pip install trackio",
        ),
        ("--mean [0.5,0.5]", "mean must have one value or 3 values, got 2"),
        ("--auto_augment foo", "auto_augment 'foo' cannot be used: "),
        ("--interpolation cubic", "interpolation is 'cubic'; allowed: nearest, bilinear, bicubic, "),
        ("--opt fusedadam", "opt 'fusedadam' cannot be created with lr 0.1, weight_decay 0.0005, momentum 0.9: "),
        ("--momentum 0", "opt 'sgd' cannot be created with lr 0.1, weight_decay 0.0005, momentum 0: Nesterov"),
        ("--model_args.global_pool=", "with model_args {'global_pool': ''} fails on an image of 3 x 32 x 32: "),
        ("--model_args.max_steps 2.5", "cannot be built with model_args {'max_steps': 2.5}: max_steps must be an int"),
        ("--model_args.max_stps 5", "has no argument 'max_stps' (did you mean 'max_steps'?) in model_args"),
        ("--model test_vit --model_args.drop_rat 1", "has no argument 'drop_rat' (did you mean 'drop_rate'?)"),
        ("--model_args.norm_layer foo", "model 'deq_resnet8_cifar' cannot be built with model_args {'norm_layer': "),
        ("--loss focal --loss_args.gamma two", "loss 'focal' cannot be created with loss_args {'gamma': 'two'}: "),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(tmp_path, capsys, words, message):
    assert main(["--output", str(tmp_path / "runs" / "x"), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert out == "" and not list(tmp_path.iterdir())


def test_the_launcher_passes_the_mistake_on(tmp_path):
    done = launch("--output", str(tmp_path / "x"), "--ratio", "1000")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ratio (R) is 1000")]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("--lr 1e30 --log_every 5", "epoch 1, updates 1 to 5 of 12"),  # the loss shows it
        ("--lr 1e38 --batch_size 1000 --warmup_epochs 0", "epoch 1, updates 1 to 1 of 1"),  # only the weights do
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, capsys, words, where):
    folder = tmp_path / "x"
    assert main(["--output", str(folder), *SMALL, "--probe_every", "1", *words.split()]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and where in err
    assert err.endswith(f"last good checkpoint: {folder / 'checkpoint'} (epoch 0)")
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert len(lines_of(folder)) == 1 and not (folder / "results.json").exists()


@pytest.mark.parametrize(
    "fill",
    [lambda: torch.empty(1 << 56), lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of\n memory."))],
    ids=["cpu", "gpu"],
)
def test_memory_that_is_full_is_told_in_one_line(tmp_path, capsys, monkeypatch, fill):
    from recipes.training.objective import Objective

    monkeypatch.setattr(Objective, "__call__", lambda *_: fill())
    assert main(["--output", str(tmp_path / "x"), *SMALL]) == 2
    last = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2].strip()
    assert last.startswith("error: out of memory: ") and "allowed: a smaller batch_size or eval_batch_size" in last


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_weights_that_are_cut_short_are_told_in_one_line(tmp_path, capsys, classifier):
    first, flags = tmp_path / "first", [*SMALL, "--classifier", classifier, "--epochs", "0"]
    assert main(["--output", str(first), *flags]) == 0
    weights = first / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["--output", str(tmp_path / "x"), *flags, "--model", str(first)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: model ") and str(first) in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_corrupt_image_is_named(tmp_path, capsys):
    whole = digits()
    train = whole["train"].cast_column("image", datasets.Image(decode=False))
    damaged = {"bytes": b"not a picture", "path": None}
    content = {"image": [*train["image"][:400], damaged], "label": [*train["label"][:400], 0]}
    broken = datasets.Dataset.from_dict(content, features=whole["train"].features)
    datasets.DatasetDict(train=broken, test=whole["test"]).save_to_disk(tmp_path / "data")
    # Seed 1 draws the damaged image, as it is among the first images of class 0.
    words = ["--dataset", str(tmp_path / "data"), "--val_fraction", "0", "--imbalance", "balanced", "--seed", "1"]
    for pipeline in ("resident", "workers"):
        assert main(["--output", str(tmp_path / pipeline), *SMALL, *words, "--pipeline", pipeline]) == 2
        assert not (tmp_path / pipeline).exists()
        err = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2].strip()
        assert err.startswith("error: image 400 of split 'train' cannot be decoded: ")
