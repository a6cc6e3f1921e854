"""Classifiers and what is done to them, against cosines by hand, the simplex's Gram matrix and loops over classes."""

import copy
import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

import timm_deq  # noqa: F401 - registers its models
from nc_probe import NCProbe
from nc_probe import simplex_etf as reference
from recipes.imbalance.classifiers import (
    KINDS,
    STAGES,
    classifier_name,
    fold,
    replace_classifier,
    second_stage,
    simplex_etf_vectors,
    tau_normalise,
)
from recipes.imbalance.losses import create_loss
from recipes.training.checkpoint import save_checkpoint

K, SIZE = 4, 48
DATA_CONFIG = dict(input_size=(3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bilinear", crop_pct=0.9)
NORMALISED = [kind for kind in KINDS if kind != "linear"]


def build(name="test_resnet", seed=0, **arguments):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=K, **arguments).eval()


def images(B=6, size=SIZE):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1))


def features(model, x):
    """What enters the classifier."""
    with torch.no_grad():
        return model.forward_head(model.forward_features(x), pre_logits=True)


@pytest.mark.parametrize(("num_classes", "num_features"), [(2, 1), (3, 2), (10, 9), (10, 64), (7, 7)])
def test_the_frame_has_the_gram_matrix_of_the_simplex(num_classes, num_features):
    frames = [simplex_etf_vectors(num_classes, num_features, seed=seed) for seed in (0, 0, 1)]
    for frame in frames:
        assert frame.shape == (num_classes, num_features)
        torch.testing.assert_close(frame @ frame.T, reference(num_classes).rows(), rtol=0, atol=1e-14)
        torch.testing.assert_close(frame.sum(0), torch.zeros(num_features).double(), rtol=0, atol=1e-14)
    assert torch.equal(frames[0], frames[1])
    if num_features > 1:
        assert not torch.allclose(frames[0], frames[2], atol=1e-2)


def test_frames_point_in_every_direction_equally_often():
    first = torch.stack([simplex_etf_vectors(3, 4, seed=seed)[0] for seed in range(1000)])
    # A uniform unit vector in 4 dimensions has mean 0 and covariance I / 4; 1000 of them, within 4 standard errors.
    assert first.mean(0).abs().max() < 4 * math.sqrt(1 / 4 / 1000)
    torch.testing.assert_close(
        first.T @ first / 1000, torch.eye(4).double() / 4, rtol=0, atol=4 * math.sqrt(0.06 / 1000)
    )


def test_a_frame_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_features is 8; allowed: 9 or more, for a simplex of 10 classes"):
        simplex_etf_vectors(10, 8)
    with pytest.raises(ValueError, match="num_classes is 1; allowed: 2 or more"):
        simplex_etf_vectors(1, 8)


@pytest.mark.parametrize(("name", "layer"), [("test_resnet", "fc"), ("test_vit", "head"), ("test_convnext", "head.fc")])
@pytest.mark.parametrize("kind", NORMALISED)
def test_logits_are_scaled_cosines(name, layer, kind):
    size = 160 if name == "test_vit" else SIZE  # a ViT's is fixed
    model = build(name)
    x = images(size=size)
    vectors, h = model.get_classifier().weight.detach().clone(), features(model, x)
    state = torch.random.get_rng_state()
    assert replace_classifier(model, kind, scale=5.0, seed=3) is model
    assert torch.equal(torch.random.get_rng_state(), state)
    assert classifier_name(model) == layer
    if kind == "etf":
        vectors = simplex_etf_vectors(K, h.shape[1], seed=3).float()
    expected = torch.tensor([[5 * (w @ v) / (w.norm() * v.norm()) for w in vectors] for v in h])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_linear_changes_nothing():
    model = build()
    before, layer = model(images()), model.get_classifier()
    assert replace_classifier(model, "linear").get_classifier() is layer and torch.equal(model(images()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_finds_the_map_that_gives_the_logits(kind):
    model = replace_classifier(build(), kind, scale=8.0)
    probe = NCProbe(model, head=classifier_name(model))
    assert NCProbe(model).head.maps == probe.head.maps  # it is found without being named, too
    captured = []
    handle = probe.head.maps[0].module.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    with probe, torch.no_grad():
        logits = model(images(8))
        probe.update(torch.arange(8) % K)
    handle.remove()
    (h,) = captured
    bias = 0 if probe.head.bias is None else probe.head.bias
    torch.testing.assert_close((h.double() @ probe.head.weight.T + bias).float(), logits)
    if kind != "linear":
        torch.testing.assert_close(h.norm(dim=1), torch.ones(8))
        torch.testing.assert_close(probe.head.weight.norm(dim=1).float(), torch.full((K,), 8.0))
    assert math.isfinite(probe.compute().nc1)


@pytest.mark.parametrize("kind", NORMALISED)
def test_training_moves_a_cosine_classifier_and_leaves_a_frame(kind):
    model = replace_classifier(build(), kind)
    weight = model.fc.linear.weight.detach().clone()
    average = ModelEmaV3(model, decay=0.5)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        create_loss("ldam", [9, 5, 3, 1])(model(images()), torch.arange(6) % K).backward()
        optimizer.step()
        average.update(model)
    for net in (model, average.module):
        torch.testing.assert_close(net.fc.linear.weight.norm(dim=1), torch.full((K,), 30.0))
        assert torch.equal(net.fc.linear.weight, weight) is (kind == "etf")


@pytest.mark.parametrize("kind", NORMALISED)
def test_a_normalised_classifier_is_loaded_after_it_is_replaced(tmp_path, kind):
    model = replace_classifier(build(), kind, scale=8.0, seed=1)
    folder = tmp_path / "checkpoint"
    save_checkpoint(model, folder, data_config=DATA_CONFIG)
    with pytest.raises(RuntimeError, match="fc.linear"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    again = replace_classifier(timm.create_model(f"local-dir:{folder}").eval(), kind, scale=8.0)
    again.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize("kind", NORMALISED)
def test_low_precision_stays_as_timm_has_it(kind):
    model = replace_classifier(build().bfloat16(), kind)
    assert model(images().bfloat16()).dtype == torch.bfloat16
    half = replace_classifier(build(), kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half(images()).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="cosin"), r"classifier is 'cosin'; allowed: linear, cosine, etf \(did you mean 'cosine'\?\)"),
        (dict(kind="cosine", scale=0.0), r"scale is 0.0; allowed: above 0"),
        (dict(kind="etf", scale=float("inf")), r"scale is inf; allowed: above 0"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        replace_classifier(build(), **arguments)


@pytest.mark.parametrize("change", [lambda m: replace_classifier(m, "cosine"), lambda m: second_stage(m, "crt")])
def test_only_a_plain_linear_classifier_is_changed(change):
    with pytest.raises(ValueError, match="classifier of ResNet is CosineClassifier; allowed: a plain nn.Linear"):
        change(replace_classifier(build(), "cosine"))
    scaled = build()
    second_stage(scaled, "lws")
    with pytest.raises(ValueError, match="allowed: a plain nn.Linear"):
        change(scaled)
    with pytest.raises(ValueError, match="is Identity; allowed: a plain nn.Linear"):
        change(timm.create_model("test_resnet", num_classes=0))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_tau_normalising_divides_each_class_by_a_power_of_its_length(tau):
    model = build()
    model.fc.weight.data *= torch.tensor([[1.0], [4.0], [9.0], [0.25]])
    before, h = model.fc.weight.detach().clone(), features(model, images())
    assert tau_normalise(model, tau) is model
    expected = torch.tensor([[float(w @ v) / math.sqrt(float(w @ w)) ** tau for w in before] for v in h])
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-6)
    assert model.fc.weight.requires_grad


def test_tau_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="tau is 1.5; allowed: 0 to 1"):
        tau_normalise(build(), 1.5)


def train(model, parameters, steps=3):
    """Some steps as a recipe takes them: the optimizer is given the model, not the parameters."""
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.5, weight_decay=1e-3)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in parameters}
    for _ in range(steps):
        optimizer.zero_grad()
        create_loss("cross_entropy", [1] * K)(model(images()), torch.arange(6) % K).backward()
        optimizer.step()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["test_resnet", "deq_resnet8_cifar"])
def test_a_second_stage_trains_the_classifier_alone(name, stage):
    model = build(name).train()
    with torch.no_grad():
        model.fc.bias.uniform_(-1, 1)
    first = copy.deepcopy(model)
    parameters = second_stage(model, stage)
    assert not model.training
    h = features(model, images())
    assert parameters == [p for p in model.parameters() if p.requires_grad]
    if stage == "lws":
        torch.testing.assert_close(model(images()), first.eval()(images()))
        assert [tuple(p.shape) for p in parameters] == [(K,)]
    else:
        assert [tuple(p.shape) for p in parameters] == [tuple(model.fc.weight.shape), (K,)]
        assert not torch.allclose(model.fc.weight, first.fc.weight)
        assert model.fc.weight.abs().max() <= 1 / math.sqrt(h.shape[1])  # PyTorch's initial range
    before = [p.detach().clone() for p in parameters]
    train(model, parameters)
    assert all(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert torch.equal(features(model, images()), h)
    state, old = model.state_dict(), first.state_dict()
    kept = {key: value for key, value in old.items() if not key.startswith("fc.")}
    torch.testing.assert_close({key: state[key] for key in kept}, kept, rtol=0, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_folded_second_stage_is_an_ordinary_timm_model(tmp_path, stage):
    model = build()
    with torch.no_grad():
        model.fc.bias.uniform_(-1, 1)
    weight, bias = model.fc.weight.detach().clone(), model.fc.bias.detach().clone()
    parameters = second_stage(model, stage)
    train(model, parameters)
    logits = model(images())
    folded = fold(copy.deepcopy(model))
    assert type(folded.get_classifier()) is nn.Linear
    if stage == "lws":
        scales = parameters[0].tolist()
        torch.testing.assert_close(folded.fc.weight, torch.stack([s * w for s, w in zip(scales, weight, strict=True)]))
        torch.testing.assert_close(folded.fc.bias, torch.stack([s * b for s, b in zip(scales, bias, strict=True)]))
        assert parameters == [p for p in model.parameters() if p.requires_grad]  # the copy alone was folded
        model(images())
    folder = tmp_path / "checkpoint"
    save_checkpoint(folded, folder, data_config=DATA_CONFIG)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(again(images()), logits)


def test_the_probe_measures_scaled_weights():
    model = build()
    (scales,) = second_stage(model, "lws")
    with torch.no_grad():
        scales.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    head = NCProbe(model).head
    torch.testing.assert_close(head.weight.float(), fold(copy.deepcopy(model)).fc.weight)


def test_folding_what_has_no_factors_changes_nothing():
    for kind in KINDS:
        model = replace_classifier(build(), kind)
        state = copy.deepcopy(model.state_dict())
        assert fold(model) is model
        torch.testing.assert_close(
            dict(model.state_dict()), {key: state[key] for key in model.state_dict()}, rtol=0, atol=0
        )


def test_a_stage_that_is_unknown_is_named():
    with pytest.raises(ValueError, match=r"stage is 'cRT'; allowed: crt, lws"):
        second_stage(build(), "cRT")
