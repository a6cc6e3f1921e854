"""Accuracy by group, class and budget, and the pass over the images, against loops written out."""

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
from accelerate import Accelerator
from PIL import Image
from timm.models import save_for_hf
from torch import nn

from recipes import train
from recipes.evaluate import main
from recipes.images.sources import digits
from recipes.results.accuracy import accuracies, evaluate, recalls
from recipes.results.figures import anytime_figure
from recipes.training.evaluation import table
from timm_deq import Equilibrium, SolveLog

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

ROOT = Path(__file__).parents[2]
CONFUSION = np.array([[8, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 5, 1]])


def test_accuracy_counts_images_and_groups_without_images_have_none():
    found = accuracies(CONFUSION, {"majority": [0, 1], "minority": [3], "unseen": [2], "empty": []})
    assert {k: found[k] for k in ("overall", "majority", "minority")} == {
        "overall": 12 / 20,
        "majority": 11 / 14,
        "minority": 1 / 6,
    }
    assert math.isnan(found["unseen"]) and math.isnan(found["empty"])


def test_recall_of_a_class_without_images_is_not_a_number():
    np.testing.assert_allclose(recalls(CONFUSION), [0.8, 0.75, np.nan, 1 / 6])


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_counts_every_image_in_evaluation_mode(training):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 3)).train(training)
    images, labels = torch.randn(23, 3, 2, 2), torch.randint(3, (23,))
    batches = list(zip(images.split(5), labels.split(5), strict=True))
    confusion, solver, log, bins = evaluate(net, batches, Accelerator(cpu=True), 3)
    expected = np.zeros((3, 3), dtype=int)
    for image, label in zip(images, labels, strict=True):
        expected[label, int(net.eval()(image[None]).argmax())] += 1
    assert confusion.tolist() == expected.tolist()
    assert solver == {} and len(log) == 0
    assert bins[:, :, 0].sum(1).tolist() == expected.sum(1).tolist() and bins[:, :, 1].sum() == np.trace(expected)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of a few digits of the classes 0 to 4, the fifth of which is not in the test split."""
    folder, whole = tmp_path_factory.mktemp("data") / "few", digits()
    names = datasets.ClassLabel(names=list("abcde"))
    splits = {}
    for split, classes, count in (("train", 5, 80), ("test", 4, 43)):
        rows = whole[split].select(np.flatnonzero(np.array(whole[split]["label"]) < classes)[:count])
        content = {"picture": list(rows["image"]), "digit": list(rows["label"])}
        features = datasets.Features(picture=datasets.Image(), digit=names)
        splits[split] = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


TRAIN = "--epochs 1 --imbalance two_group --majority 2 --ratio 2 --val_fraction 0 --probe_every 0 --lr 0.05".split()


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The folder of a short run, whose solver is given a budget and a tolerance that not every image meets."""
    folder = tmp_path_factory.mktemp("runs") / "few"
    arguments = "--model_args.tol 0.03 --model_args.max_steps 9 --img_size 16 --eval_batch_size 8".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert train.main(["--output", str(folder), "--dataset", str(images), *TRAIN, *arguments]) == 0
    return folder


def one_by_one(net, split):
    """For each image alone: whether it is classified rightly, and how often the cell was evaluated."""
    cfg, calls = net.eval().pretrained_cfg, []
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    for layer in net.modules():
        if isinstance(layer, Equilibrium):
            layer.cell.register_forward_hook(lambda *_: calls.append(1))
    right, steps = [], []
    for row in split:
        calls.clear()
        picture = row["picture"].convert("RGB").resize(cfg["input_size"][1:], Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        with torch.no_grad():
            right.append(int(net(((pixels - mean) / std)[None]).argmax()) == row["digit"])
        steps.append(len(calls))
    return np.array(right), np.array(steps)


@pytest.mark.ddp
def test_two_ranks_print_and_save_what_a_loop_over_single_images_finds(images, run, tmp_path):
    out = tmp_path / "new" / "anytime"
    launcher = "accelerate.commands.launch --multi_gpu --quiet --num_processes 2 --num_machines 1".split()
    command = [
        *launcher,
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "recipes/evaluate.py",
        str(run),
    ]
    flags = ["--max-steps", "8", "2", "2", "--output", str(out)]
    names = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    whole = [sys.executable, "-m", *command, *flags]
    done = subprocess.run(whole, cwd=ROOT, env=os.environ | names, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "max_steps 8" in done.stderr and "Traceback" not in done.stderr

    results = json.loads((out / "results.json").read_text())
    assert (results["ranks"], results["images"], results["tol"]) == (2, 43, 0.03)
    test = datasets.load_from_disk(str(images))["test"]
    labels = np.array(test["digit"])
    rows = []
    for point, budget in zip(results["points"], (2, 8), strict=True):
        # The budget reaches the model through its constructor instead of through set_solver.
        net = timm.create_model(f"local-dir:{run / 'checkpoint'}", pretrained=True, max_steps=budget)
        right, steps = one_by_one(net, test)
        groups = [right.mean(), right[labels < 2].mean(), right[labels >= 2].mean()]
        assert list(point["accuracy"].values()) == pytest.approx(groups, abs=1e-12)
        per_class = [right[labels == k].mean() for k in range(4)]
        assert list(point["per_class"])[4] == "e" and point["per_class"]["e"] is None
        assert list(point["per_class"].values())[:4] == pytest.approx(per_class, abs=1e-12)
        assert point["solver"]["mean_steps"] == pytest.approx(steps.mean(), abs=1e-12)
        cells = " | ".join(f"{100 * value:.2f}" for value in groups)
        spent = point["solver"]["mean_evaluations"]  # some images have waited for others
        assert steps.mean() <= spent <= budget
        rows.append(f"| {budget} | {cells} | {spent:.2f} | {100 * point['solver']['converged']:.1f} |")
    assert 2 < steps.mean() < 8  # so that the mean says something
    header = "| max_steps | overall % | majority % | minority % | evaluations | converged % |"
    assert done.stdout.splitlines() == [header, "|" + " --- |" * 6, *rows]  # by the main rank alone
    assert {path.name for path in out.iterdir()} == {"results.json", "anytime.png", "confusion.png", "reliability.png"}
    assert [path.name for path in out.parent.iterdir()] == ["anytime"]
    assert np.asarray(Image.open(out / "anytime.png").convert("L")).std() > 10


def test_the_models_own_budget_and_flags_that_win_over_those_of_the_run(images, run, tmp_path, capsys):
    other = datasets.load_from_disk(str(images / "train")).select(range(20))
    datasets.DatasetDict(test=other).save_to_disk(tmp_path / "other")
    words = f"{run} --dataset {tmp_path / 'other'} --tol 1e-9 --img_size 24 --output {tmp_path / 'x'}"
    assert main(words.split()) == 0
    results = json.loads((tmp_path / "x" / "results.json").read_text())
    (point,) = results["points"]
    assert (point["max_steps"], point["solver"]["mean_steps"], point["solver"]["converged"]) == (9, 9, 0)
    assert (results["split"], results["images"], results["tol"]) == ("test", 20, 1e-9)
    net = timm.create_model(f"local-dir:{run / 'checkpoint'}", pretrained=True, tol=1e-9)
    net.pretrained_cfg["input_size"] = (3, 24, 24)
    with SolveLog(net) as log:
        right, _ = one_by_one(net, other)
    assert point["accuracy"]["overall"] == right.mean()
    assert point["solver"]["mean_residual"] == pytest.approx(log.summary()["mean_residual"], rel=1e-3)
    assert capsys.readouterr().out.endswith("| 9.00 | 0.0 |\n")


def test_images_that_have_finished_are_set_aside_unless_told_otherwise(images, run, capsys):
    rows = []
    for words in ([], ["--no-gather"]):
        assert main([str(run), "--dataset", str(images), "--max-steps", "30", *words]) == 0
        rows.append(capsys.readouterr().out.splitlines()[-1].split(" | "))
    (*_, gathered, converged), (*_, waited, _) = rows
    assert rows[0][:4] == rows[1][:4] and float(gathered) < float(waited) and float(converged[:-2]) > 90


def test_an_explicit_model_has_one_row_and_no_curve(images, tmp_path, capsys):
    twin = timm.create_model("deq_resnet8_cifar", num_classes=5, equilibrium=False)
    save_for_hf(twin, str(tmp_path / "twin"), safe_serialization=True)
    assert main([f"local-dir:{tmp_path / 'twin'}", "--dataset", str(images), "--output", str(tmp_path / "x")]) == 0
    right, _ = one_by_one(twin, datasets.load_from_disk(str(images))["test"])
    assert capsys.readouterr().out.splitlines()[-1] == f"| - | {100 * right.mean():.2f} | - | - |"
    (point,) = json.loads((tmp_path / "x" / "results.json").read_text())["points"]
    assert 0 < point["calibration_error"]["overall"] < 1
    assert (point["max_steps"], point["accuracy"], point["solver"]) == (None, {"overall": right.mean()}, {})
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "confusion.png",
        "reliability.png",
        "results.json",
    ]


def test_a_name_has_the_weights_of_seed_0_and_a_split_alone_names_its_classes(images, tmp_path):
    alone = datasets.load_from_disk(str(images / "test"))
    words = f"deq_resnet8_cifar --dataset {images / 'test'} --split {alone.split or 'train'} --max-steps 3".split()
    assert main([*words, "--output", str(tmp_path / "x")]) == 0
    torch.manual_seed(0)
    net = timm.create_model("deq_resnet8_cifar", num_classes=5, max_steps=3)
    with SolveLog(net) as log:
        right, steps = one_by_one(net, alone)
    (point,) = json.loads((tmp_path / "x" / "results.json").read_text())["points"]
    assert (point["accuracy"]["overall"], point["solver"]["mean_steps"]) == (right.mean(), steps.mean())
    assert point["solver"]["mean_residual"] == pytest.approx(log.summary()["mean_residual"], rel=1e-3)


def test_the_table_has_a_dash_for_what_is_not_known():
    solver = {"mean_evaluations": 3.14159, "converged": 0.25}
    points = [{"max_steps": 4, "accuracy": {"overall": 0.5, "minority": math.nan}, "solver": solver}]
    assert table(points).splitlines()[-1] == "| 4 | 50.00 | - | 3.14 | 25.0 |"


def test_anytime_figure_shows_accuracy_against_budgets():
    found = {1: (0.1, math.nan), 4: (0.75, 0.5), 20: (0.875, 0.625)}
    points = [{"max_steps": n, "accuracy": {"overall": a, "minority": b}} for n, (a, b) in found.items()]
    (axes,) = anytime_figure(points, title="t").axes
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    np.testing.assert_allclose(lines["overall"], [(1, 10), (4, 75), (20, 87.5)])
    np.testing.assert_allclose(lines["minority"], [(1, np.nan), (4, 50), (20, 62.5)])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "20"]
    gaps = np.diff(axes.transData.transform([(n, 0) for n in (1, 4, 16)])[:, 0])
    assert gaps[0] == pytest.approx(gaps[1])  # equal ratios are equally far apart


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: MODEL"),
        ("test_resnet --spilt test", "unrecognized arguments: --spilt test; allowed: what --help lists"),
        ("test_resnet --max-steps 2 4", "max-steps is [2, 4]; allowed: not given for 'test_resnet', which has"),
        ("test_resnet --tol 0.1", "tol is 0.1; allowed: not given for 'test_resnet', which has no equilibrium"),
        ("deq_resnet8_cifar --max-steps 4 0", "max_steps must be at least 1, got 0"),
        ("deq_resnet8_cifar --max-steps four", "argument --max-steps: invalid int value: 'four'"),
        ("deq_resnet8_cifar --tol 0", "tol must be above 0, got 0.0"),
        ("deq_resnet8_cifar --pretrained", "No pretrained weights exist for deq_resnet8_cifar"),
        ("resnet8", "model 'resnet8' is unknown (did you mean "),
        ("local-dir:nothing", "Config file not found: nothing/config.json"),
        ("test_resnet --split validation", "split 'validation' is not in the data set; allowed: 'train', 'test'"),
        ("test_resnet --label_column digit", "label_column 'digit' is not in split 'train'; columns: 'image', 'label'"),
        ("test_resnet --dataset ./nothing", "dataset './nothing' is not a folder"),
        ("test_resnet --eval_batch_size 0", "eval_batch_size is 0; allowed: 1 or more"),
        ("recipes", "model 'recipes' has no config.yaml; allowed: a folder in which recipes/train.py has run"),
        (
            "{run} --dataset digits",
            "'9' in 596 of 596 images; allowed: those of model",
        ),
        ("test_resnet --output {run}", "exists; allowed: a folder that does not"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    before = sorted(run.rglob("*"))
    output = [] if "--output" in words else ["--output", str(tmp_path / "x" / "y")]
    assert main([*words.format(run=run).split(), *output]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert out == "" and not list(tmp_path.iterdir()) and sorted(run.rglob("*")) == before


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_told_apart(run, tmp_path, capsys):
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: model {str(tmp_path)!r} has no checkpoint; allowed: ")
