"""Every sampler, loss and classifier through recipes/train.py, and what is done to a model afterwards."""

import json

import datasets
import numpy as np
import pytest
import timm
import torch
from few_digits import save_few_digits
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from recipes import evaluate
from recipes.images.pipeline import choose_pipeline
from recipes.images.sources import load_splits
from recipes.imbalance.losses import Loss
from recipes.train import main
from recipes.training.checkpoint import load_run
from recipes.training.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

SIZES = [18, 12, 6, 4]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags of a short run on 40 digits of four classes."""
    folder = save_few_digits(tmp_path_factory.mktemp("data") / "few", train=18, test=9)
    data = f"--dataset {folder} --val_fraction 0 --img_size 32 --crop_pct 1 --eval_batch_size 20"
    model = "--model test_resnet --lr 0.05 --batch_size 8 --epochs 2 --probe_every 0"
    return [*data.split(), *model.split()]


EXPLICIT = ["--imbalance", "explicit", "--counts", *map(str, SIZES)]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    """The folder of a run of 5 updates an epoch, all of which have left a checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    flags = "--checkpoint_every 1 --keep_checkpoints 99".split()
    assert main(["--output", str(folder), *words, *EXPLICIT, *flags]) == 0
    return folder


@pytest.fixture
def seen():
    """Classes of the images that training has put the loss on, (B,) for each forward pass."""
    labels = []

    def note(module, inputs):
        if isinstance(module, Loss):
            labels.append(inputs[1].numpy())

    handle = register_module_forward_pre_hook(note)
    yield labels
    handle.remove()


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def pictures(words, folder):
    data = datasets.load_from_disk(words[1])
    net = load_run(folder)
    config = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    config |= {key: net.pretrained_cfg[key] for key in ("mean", "std", "interpolation")}
    split = load_splits(data)[1]
    pipeline = choose_pipeline("workers", images=36, data_config=config, workers=0)
    loader = pipeline.load(split, np.arange(len(split.labels))).eval_loader(batch_size=100, rank=0, world=1)
    ((images, labels),) = loader
    return images, labels


# Each loss and each sampler at least once, and how often the sampler draws each class in 2 epochs of 40 images.
METHODS = {
    "--sampler square_root --loss mse": np.sqrt(SIZES) / np.sqrt(SIZES).sum() * 80,
    "--sampler class_balanced --loss focal --loss_args.gamma 1": [20] * 4,
    "--sampler class_aware --defer 1 --loss focal": np.array(SIZES) + 10,
    "--sampler reverse --classifier cosine --loss ldam": 80 / np.array(SIZES) / (1 / np.array(SIZES)).sum(),
    "--sampler progressively_balanced --loss balanced_softmax": np.array(SIZES) + 10,
    "--sampler repeat_factor --loss vs": None,
    "--loss class_balanced --reweight_beta 0.9": np.array(SIZES) * 2,
    "--loss logit_adjustment --label_smoothing 0.1 --mixup_alpha 0.2": np.array(SIZES) * 2,
    "--classifier etf --classifier_scale 9 --reweight_epoch 1 --cutmix_alpha 1": np.array(SIZES) * 2,
}


@pytest.mark.parametrize("flags", METHODS)
def test_methods_train_and_their_models_come_back(words, tmp_path, capsys, flags):
    folder = tmp_path / "x"
    assert main(["--output", str(folder), *words, *EXPLICIT, *flags.split()]) == 0, capsys.readouterr().err
    results = results_of(folder)
    drawn = np.array(list(results["draws_per_class"].values()))
    if METHODS[flags] is not None:
        assert np.abs(drawn - METHODS[flags]).max() < 2 and drawn.sum() == 80
    else:  # 4 classes, of 1/4 of the images each below which they are repeated
        asked = 2 * np.array(SIZES) * np.maximum(1, np.sqrt(10 / np.array(SIZES)))
        assert np.abs(drawn - asked).max() < 2 and drawn.sum() == 2 * round(asked.sum() / 2)
    images, labels = pictures(words, folder)
    with torch.no_grad():
        right = load_run(folder).eval()(images).argmax(1) == labels
    assert results["test"]["overall"] == pytest.approx(right.double().mean().item(), abs=1e-9)
    if "--classifier" not in flags:
        timm.create_model(f"local-dir:{folder / 'checkpoint'}", pretrained=True)
    # Once more, by evaluate.py, which has to find the classifier too.
    assert evaluate.main([str(folder)]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith(f"| - | {100 * results['test']['overall']:.2f} |")


def test_a_limit_of_updates_ends_the_run_on_the_schedule_of_the_whole(words, straight, tmp_path, seen):
    folder, flags = tmp_path / "x", [*EXPLICIT, "--max_updates", "8"]
    assert main(["--output", str(folder), *words, *flags]) == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2] and records[2]["collapse"]["nc1"] > 0
    assert results_of(folder)["selected"] == {"by": "last", "epoch": 2}
    draws = [np.bincount(np.concatenate([[], *part]).astype(int), minlength=4) for part in ([], seen[:5], seen[5:])]
    assert [record["draws"] for record in records] == [each.tolist() for each in draws] and sum(draws).sum() == 64
    assert list(results_of(folder)["draws_per_class"].values()) == sum(draws).tolist()
    ours = load_file(folder / "states" / "00000008" / "state.safetensors")
    theirs = load_file(straight / "states" / "00000008" / "state.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    # What has ended goes no further.
    before = results_of(folder)
    (folder / "results.json").unlink()
    assert main(["--output", str(folder), "--resume", "auto", *words, *flags]) == 0
    assert max(path.name for path in (folder / "states").iterdir()) == "00000008"
    after = results_of(folder)
    assert all(
        after[key] == before[key]
        for key in ("test", "test_per_class", "collapse", "selected", "images", "draws_per_class")
    )


def test_classes_are_reweighted_from_the_epoch_on(words, straight, tmp_path):
    flags = "--reweight_epoch 1 --checkpoint_every 1 --keep_checkpoints 99 --max_updates 6".split()
    assert main(["--output", str(tmp_path / "x"), *words, *EXPLICIT, *flags]) == 0
    for update, same in ((4, True), (5, True), (6, False)):  # an epoch has 5
        name = f"states/{update:08d}/state.safetensors"
        ours, theirs = load_file(tmp_path / "x" / name), load_file(straight / name)
        weights = [key for key in ours if key.startswith(".model") and key.endswith("fc.weight")]
        assert [torch.equal(ours[key], theirs[key]) for key in weights] == [same]


def test_a_manifest_stands_for_the_profile_it_was_made_by(words, straight, tmp_path, capsys):
    manifest = straight / "manifest.json"
    assert main(["--output", str(tmp_path / "x"), *words, "--manifest", str(manifest), "--max_updates", "1"]) == 0
    assert (tmp_path / "x" / "manifest.json").read_bytes() == manifest.read_bytes()
    assert Manifest.load(manifest).counts == SIZES
    other = ["--dataset", "digits", "--manifest", str(manifest)]
    assert main(["--output", str(tmp_path / "y"), *words, *other]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(
        "error: split 'train' has classes '4', '5', '6', '7', '8', '9' in 720 of 1201 images; allowed: "
    )
    assert err.endswith("those of the manifest, '0', '1', '2', '3'") and not (tmp_path / "y").exists()
    best = ["--manifest", str(manifest), "--select", "best"]
    assert main(["--output", str(tmp_path / "y"), *words, *best]) == 2
    assert "select is 'best' without a validation image; allowed: 'last'" in capsys.readouterr().err


def test_groups_are_those_asked_for(words, tmp_path, capsys):
    flags = "--grouping thresholds --bounds 5 15 --max_updates 1".split()
    assert main(["--output", str(tmp_path / "x"), *words, *EXPLICIT, *flags]) == 0
    assert Manifest.load(tmp_path / "x" / "manifest.json").groups == {"many": [0], "medium": [1, 2], "few": [3]}
    last = capsys.readouterr().out.splitlines()[-4]
    assert [word for word in last.split() if word.isalpha()] == "test accuracy overall many medium few".split()


@pytest.mark.parametrize("stage", ["crt", "lws"])
def test_a_second_stage_trains_the_classifier_alone(words, straight, tmp_path, capsys, stage):
    folder, manifest = tmp_path / "x", str(straight / "manifest.json")
    flags = ["--model", str(straight), "--stage", stage, "--manifest", manifest, "--sampler", "class_balanced"]
    assert main(["--output", str(folder), *words, *flags]) == 0, capsys.readouterr().err
    before = load_file(straight / "checkpoint" / "model.safetensors")
    after = load_file(folder / "checkpoint" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"fc.weight", "fc.bias"}
    factors = after["fc.weight"] / before["fc.weight"]
    same = (factors - factors[:, :1]).abs().max() < 1e-5 and not torch.allclose(factors, torch.ones(()))
    assert same == (stage == "lws")
    images, labels = pictures(words, folder)
    net = timm.create_model(f"local-dir:{folder / 'checkpoint'}", pretrained=True).eval()
    with torch.no_grad():
        right = (net(images).argmax(1) == labels).double().mean().item()
    assert results_of(folder)["test"]["overall"] == pytest.approx(right, abs=1e-9)


def test_a_trained_model_of_other_classes_is_refused(words, straight, tmp_path, capsys):
    flags = ["--dataset", "digits", "--model", str(straight), "--stage", "crt"]
    assert main(["--output", str(tmp_path / "x"), *words, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: dataset is 'digits'; allowed: one of the same classes with a stage, as model ")
    assert "has classes '0', '1', '2', '3'" in err and err.count("\n") == 1


@pytest.mark.parametrize(("flag", "tau"), [("--adjust-tau", 0.0), ("--adjust-tau", 2.0), ("--tau-normalise", 1.0)])
def test_what_is_done_to_a_model_after_training(words, straight, tmp_path, flag, tau):
    out = tmp_path / "x"
    assert evaluate.main([str(straight), flag, str(tau), "--output", str(out)]) == 0
    images, labels = pictures(words, straight)
    net = load_run(straight).eval()
    with torch.no_grad():
        features = net.forward_head(net.forward_features(images), pre_logits=True).double()
    weight, bias = net.fc.weight.detach().double(), net.fc.bias.detach().double()
    if flag == "--adjust-tau":
        logits = features @ weight.T + bias - tau * torch.tensor([n / 40 for n in SIZES]).double().log()
    else:
        logits = torch.stack([features @ (w / w.square().sum() ** 0.5) for w in weight], dim=1)
    (point,) = json.loads((out / "results.json").read_text())["points"]
    right = (logits.argmax(1) == labels).double()
    assert list(point["per_class"].values()) == pytest.approx([right[labels == k].mean().item() for k in range(4)])


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("test_resnet", "--adjust-tau 1", "adjust_tau is 1.0; allowed: not given without a run, which has counts"),
        ("{run}", "--adjust-tau nan", "tau is nan; allowed: a finite number"),
        ("{run}", "--tau-normalise 2", "tau is 2.0; allowed: 0 to 1"),
    ],
)
def test_mistakes_are_told_in_one_line(straight, capsys, model, flags, message):
    assert evaluate.main([model.format(run=straight), *flags.split()]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert message in err


def test_what_training_has_corrected_is_not_corrected_again(words, tmp_path, capsys):
    flags = "--loss balanced_softmax --max_updates 1".split()
    assert main(["--output", str(tmp_path / "x"), *words, *EXPLICIT, *flags]) == 0
    assert evaluate.main([str(tmp_path / "x"), "--adjust-tau", "1"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "adjust_tau is 1.0; allowed: not given, as loss 'balanced_softmax' has corrected already" in err
