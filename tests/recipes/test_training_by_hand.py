"""What training reports and learns, against sums in NumPy and updates written out in plain PyTorch.

Two runs of one loop agree on whatever it does wrong; here the other side is made of the batches that a run has seen and
of the weights that it has saved, without the loop.
"""

import json
import os
import signal
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from few_digits import save_few_digits
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from recipes.images.views import eval_transform
from recipes.imbalance.losses import Loss
from recipes.train import main
from recipes.training.manifest import Manifest
from recipes.training.state import read_tree

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

SIZES = [9, 6, 4, 3]  # 22 images: updates of 8, 7 and 7, each in two parts
LR, MOMENTUM = 0.05, 0.9
DECAY = 0.45

DEQ = {"channels": [4, 4, 8, 8], "stem_width": 4, "num_groups": 2, "solver": "picard", "tol": 1e-6, "max_steps": 100}
LOOP = f"--img_size 16 --crop_pct 1 --batch_size 8 --eval_batch_size 20 --lr {LR} --sched constant --warmup_epochs 0"
LOOP += " --weight_decay 0 --epochs 2 --probe_every 0 --checkpoint_every 1 --keep_checkpoints 99"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Where digits of four classes are saved."""
    return save_few_digits(tmp_path_factory.mktemp("data") / "few", train=30, test=9)


@pytest.fixture(scope="module")
def words(data):
    """Flags of a short run on 22 digits."""
    chosen = f"--dataset {data} --val_fraction 0 --imbalance explicit --counts {' '.join(map(str, SIZES))}"
    return [*chosen.split(), *LOOP.split()]


@pytest.fixture(scope="module")
def deq(words):
    """Flags of a run of a small equilibrium model, solved to the precision of float32."""
    model = [word for key, value in DEQ.items() for word in (f"--model_args.{key}", str(value).replace(" ", ""))]
    return [*words, "--model", "deq_resnet8_cifar", *model]


@contextmanager
def watched():
    """Collects, for each forward pass that the loss is put on, the images, the logits and the labels."""
    images, seen = [], []

    def note(module, inputs):
        if hasattr(module, "pretrained_cfg"):  # the model itself
            images.append(inputs[0].detach().clone())
        if isinstance(module, Loss):
            seen.append((images[-1], inputs[0].detach().clone(), inputs[1].clone()))

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def state_of(folder, updates, part):
    """The state dict of a part of the training state after some updates."""
    state = load_file(folder / "states" / f"{updates:08d}" / "state.safetensors")
    return {key.removeprefix(f".{part}."): value for key, value in state.items() if key.startswith(f".{part}.")}


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def cross_entropies(logits, labels):
    """Of each image, (B,), in float64."""
    logits = logits.double().numpy()
    return (
        np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
        + logits.max(1)
        - logits[range(len(labels)), labels]
    )


@pytest.fixture(scope="module")
def curve(deq, tmp_path_factory):
    """The folder of a run of 5 updates in two epochs with a penalty and a moving average, and its forward passes."""
    folder = tmp_path_factory.mktemp("runs") / "curve"
    flags = f"--gradient_accumulation_steps 2 --log_every 1 --max_updates 5 --jacobian_weight 5 --ema_decay {DECAY}"
    with watched() as seen:
        assert main(["--output", str(folder), *deq, *flags.split()]) == 0
    return folder, seen


def test_the_loss_is_the_mean_over_the_images_that_the_epoch_has_seen(curve):
    """Without the penalty, from zero in every epoch, and over 15 of 22 images where the run ends."""
    folder, seen = curve
    losses = [cross_entropies(logits, labels) for _, logits, labels in seen]
    assert [len(part) for part in losses] == [4, 4, 4, 3, 4, 3, 4, 4, 4, 3]
    start, first, second = records_of(folder)
    assert start["train_loss"] is None
    assert first["train_loss"] == pytest.approx(np.concatenate(losses[:6]).mean(), rel=1e-5)
    assert second["train_loss"] == pytest.approx(np.concatenate(losses[6:]).mean(), rel=1e-5)
    for updates, parts in ((1, losses[:2]), (2, losses[:4]), (4, losses[6:8])):  # as the epoch goes on
        progress = json.loads((folder / "states" / f"{updates:08d}" / "state.json").read_text())["progress"]
        assert progress["record"]["train_loss"] == pytest.approx(np.concatenate(parts).mean(), rel=1e-5)


def test_the_average_forgets_by_the_decay_after_a_warmup(curve):
    """Of update k it keeps min(decay, 1 - k^(-2/3)): nothing of the initial weights, and the decay from k = 3 on."""
    folder, _ = curve
    kept = {k: min(DECAY, 1 - k ** (-2 / 3)) for k in range(1, 6)}
    assert [k for k in kept if kept[k] == DECAY] == [3, 4, 5] and kept[1] == 0 < kept[2]
    average = {key: value.double() for key, value in state_of(folder, 0, "model").items()}
    for k in kept:
        weights = state_of(folder, k, "model")
        for key, value in average.items():
            average[key] = kept[k] * value + (1 - kept[k]) * weights[key] if value.is_floating_point() else value
        saved = state_of(folder, k, "average")
        assert saved.keys() == average.keys()
        for key, value in saved.items():
            wanted = average[key].to(value) if value.is_floating_point() else weights[key]
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    checkpoint = load_file(folder / "checkpoint" / "model.safetensors")
    assert all(torch.equal(value, checkpoint[key]) for key, value in state_of(folder, 5, "average").items())


AIDS = {
    "plain": {},
    "jacobian": {"jacobian_weight": 5.0},
    "correction": {"correction_at": [1, 3]},
    "both": {"jacobian_weight": 5.0, "correction_at": [2]},
}


def gradient_by_hand(net, images, labels, signs, *, jacobian_weight=0.0, correction_at=()):
    """Gradient of what is minimised in the parameters of a float64 model, by following a hundred plain iterations.

    That is cross-entropy at the equilibrium and at some iterates, an iterate n from the end by 0.8^n, divided by the
    sum of these weights, and the weighted mean of |v^T J|^2 over elements and images, v of `signs`.
    """
    stage = net.layer4
    x = stage.injection(net.layer3(net.layer2(net.layer1(net.act1(net.bn1(net.conv1(images)))))))
    cell = stage.equilibrium.cell
    iterates = [torch.zeros_like(x)]
    for _ in range(100):
        iterates.append(cell(iterates[-1], x))
    states = [iterates[k].detach() for k in correction_at]
    states = [z + (step := cell(z, x)) - step.detach() for z in states]  # the value of z, the derivative of f at z
    states.append(iterates[-1])
    losses = [F.cross_entropy(net.fc(state.mean((2, 3))), labels) for state in states]
    weights = [0.8**n for n in reversed(range(len(losses)))]
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    if jacobian_weight:
        z = iterates[-1].detach().requires_grad_()
        (row,) = torch.autograd.grad(cell(z, x), z, signs, create_graph=True)
        total = total + jacobian_weight * row.square().mean()
    return torch.autograd.grad(total, list(net.parameters()))


@pytest.mark.parametrize("aids", AIDS.values(), ids=AIDS)
def test_an_update_is_the_one_by_hand(deq, tmp_path, aids):
    """With Nesterov's momentum, the first update is 1.9 times the gradient."""
    folder = tmp_path / "x"
    flags = [
        f"--{name} {value:g}" if name == "jacobian_weight" else f"--{name} {' '.join(map(str, value))}"
        for name, value in aids.items()
    ]
    with watched() as seen:
        assert main(["--output", str(folder), *deq, "--max_updates", "1", *" ".join(flags).split()]) == 0
    images, _, labels = seen[0]
    before, after = state_of(folder, 0, "model"), state_of(folder, 1, "model")
    net = timm.create_model("deq_resnet8_cifar", num_classes=4, **DEQ)
    net.load_state_dict(before)
    net.double().train()
    # The signs are the first random numbers after the state that was saved before the update.
    random = torch.Generator().set_state(read_tree(folder / "states" / "00000000" / "rank-0")["random"]["torch"])
    signs = torch.randint(2, (len(images), 8, 2, 2), generator=random, dtype=torch.float32).double() * 2 - 1
    names = [name for name, _ in net.named_parameters()]
    made = torch.cat([(before[name].double() - after[name].double()).flatten() for name in names])

    def by_hand(**aids):
        gradients = gradient_by_hand(net, images.double(), labels, signs, **aids)
        return LR * (1 + MOMENTUM) * torch.cat([gradient.flatten() for gradient in gradients])

    wanted = by_hand(**aids)
    assert (made - wanted).norm() < 2e-3 * wanted.norm()
    for name in aids:  # each of them is seen
        assert (by_hand(**{**aids, name: type(aids[name])()}) - wanted).norm() > 0.05 * wanted.norm()


def nc1_of(features, labels):
    """tr(S_W S_B^+) / K with every class counted once, of features (N, d)."""
    means = np.stack([features[labels == k].mean(0) for k in range(4)])
    within = np.mean([np.cov(features[labels == k].T, bias=True) for k in range(4)], axis=0)
    between = np.cov(means.T, bias=True)
    return np.trace(within @ np.linalg.pinv(between, rcond=1e-8, hermitian=True)) / 4


@contextmanager
def after_update(n, deed):
    """Does something, given the optimizer, right after its n-th update in this process."""
    count = [0]

    def hook(optimizer, *_):
        count[0] += 1
        if count[0] == n:
            deed(optimizer)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def spoil(optimizer):
    """Turns the classifier round."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.ndim == 2:
                parameter.data.neg_()


@pytest.mark.parametrize("average", [True, False], ids=["average", "weights"])
def test_the_best_epoch_is_measured_on_the_training_images(data, tmp_path, average):
    """One of the first two, as the third ends with a spoilt classifier."""
    folder = tmp_path / "x"
    flags = f"--dataset {data} --val_fraction 0.3 --imbalance balanced --select best --model deq_resnet8_cifar {LOOP}"
    flags += " --epochs 3"
    flags += f" --ema_decay {DECAY}" if average else ""
    with after_update(33, spoil):
        assert main(["--output", str(folder), *flags.split()]) == 0
    val = [record["val"]["overall"] for record in records_of(folder)]
    results = results_of(folder)
    best = int(np.argmax(val))
    assert results["selected"] == {"by": "best", "epoch": best} and best in (1, 2) and val[best] > val[3] + 0.1

    manifest = Manifest.load(folder / "manifest.json")
    assert manifest.counts == [21] * 4  # 11 updates in an epoch
    net = timm.create_model("deq_resnet8_cifar", num_classes=4)
    net.load_state_dict(state_of(folder, 11 * best, "average" if average else "model"))
    cfg = {"input_size": (3, 16, 16), "crop_pct": 1.0}
    frame = eval_transform(cfg | {key: net.pretrained_cfg[key] for key in ("mean", "std", "interpolation")})
    rows = datasets.load_from_disk(str(data))["train"].select(manifest.indices)
    with torch.no_grad():
        images = torch.stack([frame(image.convert("RGB")) for image in rows["image"]])
        features = net.eval().forward_head(net.forward_features(images), pre_logits=True).double().numpy()
    assert results["collapse"]["samples"] == len(manifest.indices)
    assert results["collapse"]["nc1"] == pytest.approx(nc1_of(features, np.array(rows["label"])), rel=1e-3)
    checkpoint = load_file(folder / "checkpoint" / "model.safetensors")
    assert all(torch.equal(value, checkpoint[key]) for key, value in net.state_dict().items())


def test_weight_scaling_that_saves_before_its_end_goes_on_with_its_factors(words, tmp_path):
    """The factors by hand: d loss / d s_k = mean of (p_k - y_k) (w_k h + b_k), saved at every update, over a stop."""
    first, folder = tmp_path / "first", tmp_path / "x"
    assert main(["--output", str(first), *words, "--model", "test_resnet"]) == 0
    second = [*words, "--model", str(first), "--stage", "lws", "--probe_every", "1"]
    with watched() as seen:
        with after_update(2, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
            assert main(["--output", str(folder), *second]) == 143
        assert main(["--output", str(folder), "--resume", "auto", *second]) == 0
    assert len(seen) == 6

    frozen = load_file(first / "checkpoint" / "model.safetensors")
    net = timm.create_model("test_resnet", num_classes=4)
    net.load_state_dict(frozen)
    net.double().eval()
    scales, momentum = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for updates, (images, _, labels) in enumerate(seen, start=1):
        with torch.no_grad():
            raw = net(images.double())
        error = (scales * raw).softmax(1) - F.one_hot(labels, 4)
        gradient = (error * raw).mean(0)
        momentum = MOMENTUM * momentum + gradient
        scales = scales - LR * (gradient + MOMENTUM * momentum)
        saved = state_of(folder, updates, "model")["fc.parametrizations.weight.0.scales"]
        torch.testing.assert_close(saved.double(), scales, rtol=1e-4, atol=1e-5)
    assert (scales - 1).abs().max() > 0.01
    learnt = load_file(folder / "checkpoint" / "model.safetensors")
    torch.testing.assert_close(learnt["fc.weight"], scales.float()[:, None] * frozen["fc.weight"])
    torch.testing.assert_close(learnt["fc.bias"], scales.float() * frozen["fc.bias"])
