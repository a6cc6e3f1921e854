import copy
import inspect
import json
import re

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import save_for_hf
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.utils import ModelEmaV3

import timm_deq
from timm_deq import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    ReversibleIteration,
    Shine,
    SolveLog,
    Unrolled,
    set_solver,
)
from timm_deq.models._factory import create_equilibrium_args
from timm_deq.models.deq_resnet import DEQResNet

NAMES = ["deq_resnet18", "deq_resnet18_cifar", "deq_resnet34", "deq_resnet50", "deq_resnet8_cifar"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model(name="deq_resnet8_cifar", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def equilibrium(net) -> Equilibrium:
    return net.layer4.equilibrium


def test_the_registered_names_are_ours():
    assert sorted(timm.list_models("deq_*")) == sorted(NAMES)
    assert all(timm.model_entrypoint(name).__module__.startswith("timm_deq.") for name in NAMES)
    # registration only warns when it takes a name: every name of timm itself must still be timm's
    foreign = [n for n in timm.list_models() if n not in NAMES]
    assert all(timm.model_entrypoint(n).__module__.startswith("timm.") for n in foreign)


def test_sizes():
    count = {name: sum(p.numel() for p in model(name, device="meta").parameters()) for name in NAMES}
    assert count["deq_resnet8_cifar"] < 300_000
    assert count["deq_resnet18_cifar"] == 8_682_570


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_has_the_same_encoder_and_head(name):
    deq, twin = model(name), model(name, equilibrium=False)
    deq_state, twin_state = deq.state_dict(), twin.state_dict()
    shared = [key for key in deq_state if not key.startswith("layer4.")]
    assert shared == [key for key in twin_state if not key.startswith("layer4.")]
    assert [deq_state[k].shape for k in shared] == [twin_state[k].shape for k in shared]
    assert all(torch.equal(deq_state[k], twin_state[k]) for k in shared)  # one seed, the same initial values
    assert not any(isinstance(m, Equilibrium) for m in twin.modules())


@pytest.mark.parametrize("name", ["deq_resnet18", "deq_resnet50"])
def test_stage_4_is_initialised_as_he_et_al_and_its_branch_starts_small(name):
    """Convolutions by N(0, 2 / fan_out), the last normalisation of the branch at 0.1, every other one at 1 and 0."""
    net = model(name)
    stage, last = net.layer4, equilibrium(net).cell.branch[-1]
    convolutions = [m for m in stage.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == {"deq_resnet18": 3, "deq_resnet50": 4}[name]
    for conv in convolutions:
        fan_out = conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)
        assert abs(conv.weight.mean().item()) < 0.01 * conv.weight.std().item()
    norms = [m for m in stage.modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.BatchNorm2d))]
    gains = [m.weight.unique().tolist() for m in norms]
    assert all(not m.bias.any() for m in norms) and gains.count([1.0]) == len(norms) - 1
    assert last.weight.unique().item() == pytest.approx(0.1)


@pytest.mark.parametrize("kind", [True, False])
def test_out_norm(kind):
    for out_norm, check in {
        "none": lambda f: True,
        "group": lambda f: torch.allclose(f.unflatten(1, (8, -1)).mean(dim=(2, 3, 4)), torch.zeros(4, 8), atol=1e-5),
        "batch_relu": lambda f: (f >= 0).all() and (f == 0).any(),
    }.items():
        net = model(equilibrium=kind, out_norm=out_norm).train()
        features = net.forward_features(IMAGES)
        assert check(features)
        assert torch.equal(
            net.norm(net.forward_intermediates(IMAGES, indices=[4], intermediates_only=True)[0]), features
        )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deq_resnet18", {}),
        ("deq_resnet50", {"output_stride": 8}),
        ("deq_resnet18", {"act_layer": "silu", "norm_layer": "groupnorm", "output_stride": 16, "drop_path_rate": 0.2}),
    ],
    ids=["plain", "dilated bottleneck", "other layers"],
)
def test_the_twin_is_the_resnet_of_timm(name, settings):
    """Equal logits from equal weights, and the same stochastic depth: the encoder and stage 4 of timm's own ResNet."""
    twin = model(name, equilibrium=False, num_classes=5, **settings)
    block, layers = (Bottleneck, (3, 4, 6, 3)) if name == "deq_resnet50" else (BasicBlock, (2, 2, 2, 2))
    resnet = ResNet(block, layers, num_classes=5, **settings)
    resnet.load_state_dict(twin.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(images), resnet.eval()(images))
    paths = [[m.drop_prob for m in net.modules() if isinstance(m, DropPath)] for net in (twin, resnet)]
    assert paths[0] == pytest.approx(paths[1]) and len(paths[0]) == (7 if "drop_path_rate" in settings else 0)
    assert twin.feature_info == resnet.feature_info


@pytest.mark.parametrize("name", ["deq_resnet18", "deq_resnet50", "deq_resnet18_cifar"])
def test_output_stride_and_activation_of_the_equilibrium(name):
    full = 8 if "cifar" in name else 32
    images = torch.randn(1, 3, 2 * full, 2 * full)
    for divisor in (1, 2, 4):
        net = model(name, output_stride=full // divisor, act_layer="silu", max_steps=2).eval()
        assert net.forward_features(images).shape[2:] == (2 * divisor, 2 * divisor)
        assert net.feature_info[-1]["reduction"] == full // divisor
        cell = equilibrium(net).cell
        wide = [m for m in cell.branch if isinstance(m, torch.nn.Conv2d) and m.kernel_size[0] == 3]
        assert {m.dilation for m in wide} == {(divisor, divisor)}
        assert not any(isinstance(m, torch.nn.ReLU) for m in net.modules())
    assert model(name).state_dict().keys() == net.state_dict().keys()


def test_the_branch_gain_is_an_argument():
    assert equilibrium(model(branch_gain=0.5)).cell.branch[-1].weight.unique().item() == 0.5


def resnet_weights(name="resnet18", **kwargs):
    torch.manual_seed(3)
    net = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.normal_()
    return net.state_dict()


def test_the_encoder_takes_the_weights_of_timm_s_resnet(tmp_path):
    weights = resnet_weights()
    torch.save(weights, tmp_path / "resnet18.pth")
    overlay = {"file": str(tmp_path / "resnet18.pth")}
    fresh = model("deq_resnet18").state_dict()
    loaded = model("deq_resnet18", pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    for key, value in loaded.items():
        encoder = key.startswith(("conv1", "bn1", "layer1", "layer2", "layer3"))
        assert torch.equal(value, (weights if encoder else fresh)[key]), key
    twin = model("deq_resnet18", equilibrium=False, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    assert twin.keys() == weights.keys() and all(torch.equal(twin[key], weights[key]) for key in twin)


def test_the_encoder_takes_them_with_other_classes_channels_and_norm(tmp_path):
    """timm drops a classifier of other classes and adapts the first convolution itself."""
    weights = resnet_weights("resnet50")
    torch.save(weights, tmp_path / "resnet50.pth")
    settings = {"num_classes": 7, "in_chans": 1, "out_norm": "batch_relu"}
    overlay = {"file": str(tmp_path / "resnet50.pth")}
    net = model("deq_resnet50", pretrained=True, pretrained_cfg_overlay=overlay, **settings)
    torch.testing.assert_close(net.conv1.weight, weights["conv1.weight"].sum(dim=1, keepdim=True))
    assert torch.equal(net.layer3[5].conv3.weight, weights["layer3.5.conv3.weight"])
    assert torch.equal(net.fc.weight, model("deq_resnet50", **settings).fc.weight)


def test_weights_of_another_stem_are_refused(tmp_path):
    torch.save(resnet_weights(), tmp_path / "resnet18.pth")
    with pytest.raises(RuntimeError, match="size mismatch for conv1.weight"):
        model("deq_resnet18_cifar", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "resnet18.pth")})


def test_a_batch_norm_saved_under_its_former_name_is_found(tmp_path):
    net = model(out_norm="batch_relu")
    net.norm.weight.data.normal_()
    former = {re.sub(r"^norm\.", "norm.0.", key): value for key, value in net.state_dict().items()}
    torch.save(former, tmp_path / "former.pth")
    overlay = {"file": str(tmp_path / "former.pth")}
    loaded = model(out_norm="batch_relu", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded.norm.weight, net.norm.weight)


def test_the_features_are_an_equilibrium():
    net = model(tol=1e-5, max_steps=60).train()
    inputs = []
    net.layer4.injection.register_forward_hook(lambda _, args, out: inputs.append(out))
    z = net.forward_features(IMAGES)
    fz = equilibrium(net).cell(z, inputs[0])
    assert ((fz - z).flatten(1).norm(dim=1) / fz.flatten(1).norm(dim=1)).max() < 2e-5


def test_the_settings_reach_the_equilibrium():
    assert equilibrium(model()).solver == Anderson() and equilibrium(model()).gradient == Implicit(Anderson())
    net = model(solver="broyden", memory=3, tol=1e-2, backward_max_steps=7)
    assert equilibrium(net).solver == Broyden(1e-2, memory=3)
    assert equilibrium(net).gradient == Implicit(Broyden(1e-2, 7, memory=3))
    net = model(solver="picard", damping=0.5, gradient="phantom", phantom_steps=2, phantom_damping=0.9)
    assert equilibrium(net).solver == Picard(damping=0.5)
    assert equilibrium(net).gradient == Phantom(2, damping=0.9)
    assert equilibrium(model(gradient="unrolled")).gradient == Unrolled()
    assert equilibrium(model(gradient="neumann", neumann_terms=3)).gradient == Neumann(3)
    net = model(solver="broyden", gradient="shine", shine_refine=2)
    assert equilibrium(net).solver == Broyden(memory=20) and equilibrium(net).gradient == Shine(2)
    assert equilibrium(model(solver="broyden", gradient="shine", memory=4)).solver == Broyden(memory=4)
    assert equilibrium(model(solver="broyden", memory=4, max_steps=9)).solver == Broyden(max_steps=9, memory=4)
    net = model(solver="reversible", damping=0.6, gradient="reversible", min_steps=4, gather=False, while_loop=True)
    assert equilibrium(net).solver == ReversibleIteration(damping=0.6, while_loop=True)
    assert equilibrium(net).gradient == Reversible()
    assert (equilibrium(net).min_steps, equilibrium(net).gather) == (4, False)
    assert (equilibrium(model()).min_steps, equilibrium(model()).gather) == (None, True)


@pytest.mark.parametrize("kind", [True, False])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"solver": "newton"}, ValueError, "solver must be one of picard, anderson, broyden, reversible, got 'newton'"),
        (
            {"gradient": "adjoint"},
            ValueError,
            "gradient must be one of implicit, phantom, neumann, shine, reversible, unrolled, got 'adjoint'",
        ),
        ({"solver": "picard", "memory": 3}, ValueError, 'memory does not apply to solver="picard"'),
        ({"phantom_steps": 3}, ValueError, 'phantom_steps does not apply to gradient="implicit"'),
        (
            {"gradient": "unrolled", "backward_tol": 1e-3},
            ValueError,
            'backward_tol does not apply to gradient="unrolled"',
        ),
        ({"gradient": "neumann", "shine_refine": 1}, ValueError, 'shine_refine does not apply to gradient="neumann"'),
        ({"gradient": "shine"}, ValueError, "solver must be Broyden for the gradient Shine, got Anderson"),
        ({"gradient": "shine", "solver": "picard"}, ValueError, "solver must be Broyden for the gradient Shine"),
        ({"min_steps": 0}, ValueError, "min_steps must be at least 1, got 0"),
        ({"tol": -1}, ValueError, "tol must be above 0, got -1"),
        ({"out_norm": "layer"}, ValueError, "out_norm must be one of none, group, batch_relu, got 'layer'"),
        ({"output_stride": 16}, ValueError, r"output_stride must be one of \(2, 4, 8\), got 16"),
        ({"tolerance": 1}, TypeError, "tolerance"),
    ],
)
def test_bad_arguments(kwargs, error, message, kind):
    with pytest.raises(error, match=message):
        model(equilibrium=kind, **kwargs)


def save(net, folder):
    save_for_hf(net, folder, safe_serialization=True)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", [True, False])
def test_a_saved_model_reloads_with_equal_logits_and_its_settings(kind, tmp_path):
    net = model(num_classes=7, equilibrium=kind, solver="broyden", tol=1e-2, max_steps=5, out_norm="group").eval()
    net(IMAGES)
    assert save(net, tmp_path)["model_args"]["max_steps"] == 5
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), net(IMAGES))
    if kind:
        assert equilibrium(loaded).solver == Broyden(1e-2, 5)


def test_set_solver_survives_saving(tmp_path):
    net = model(solver="anderson", memory=3).eval()
    set_solver(net, tol=0.02, max_steps=4)
    assert equilibrium(net).solver == Anderson(0.02, 4, memory=3)
    assert equilibrium(net).gradient == Implicit(Anderson(0.02, 4, memory=3))
    set_solver(net, "picard", damping=0.8)
    assert equilibrium(net).solver == Picard(0.02, 4, damping=0.8)
    save(net, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert equilibrium(loaded).solver == Picard(0.02, 4, damping=0.8)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), net(IMAGES))


def test_set_solver_leaves_a_backward_solve_of_its_own_alone():
    net = model(backward_tol=1e-6)
    set_solver(net, max_steps=3)
    assert equilibrium(net).gradient == Implicit(Anderson(1e-6))


# A model as it is made, and changes of its solver one after another.
CHANGES = {
    "a backward tolerance": ({"backward_tol": 1e-5}, [{"max_steps": 3}]),
    "a backward tolerance, then a memory": ({"backward_tol": 1e-5}, [{"memory": 3}, {"tol": 1e-2}]),
    "a backward budget, then a solver": (
        {"backward_max_steps": 9},
        [{"solver": "picard", "damping": 0.8}, {"tol": 0.1}],
    ),
    "backward as forward": ({"tol": 1e-3, "backward_tol": 1e-3}, [{"tol": 1e-2}]),
    "back and forth": ({"memory": 3, "ridge": 1e-3}, [{"solver": "broyden", "memory": 4}, {"solver": "anderson"}]),
    "every setting": ({}, [{"tol": 0.1, "max_steps": 4, "atol": 1e-3, "check_every": 2, "while_loop": True}]),
    "settings of anderson": ({}, [{"ridge": 0.1, "mixing": 0.9, "memory": 2}]),
    "shine": ({"solver": "broyden", "gradient": "shine"}, [{"max_steps": 30}]),
    "shine with a memory": ({"solver": "broyden", "gradient": "shine", "memory": 5}, [{"max_steps": 30}]),
    "reversible": ({"solver": "reversible", "gradient": "reversible"}, [{"damping": 0.7, "max_steps": 9}]),
    "phantom": ({"gradient": "phantom", "phantom_steps": 3}, [{"solver": "picard"}]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_set_solver_leaves_is_what_loading_builds(case, tmp_path):
    made, changes = CHANGES[case]
    net = model(**made)
    for change in changes:
        set_solver(net, **change)
    save(net, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert equilibrium(loaded).solver == equilibrium(net).solver
    assert equilibrium(loaded).gradient == equilibrium(net).gradient
    for key, value in changes[-1].items():
        assert key == "solver" or getattr(equilibrium(net).solver, key) == value


def test_set_solver_keeps_the_memory_of_shine_as_long_as_the_solve():
    net = model(solver="broyden", gradient="shine")
    set_solver(net, max_steps=30)
    assert equilibrium(net).solver == Broyden(max_steps=30, memory=30)
    set_solver(net, max_steps=40, memory=7)
    set_solver(net, max_steps=50)
    assert equilibrium(net).solver == Broyden(max_steps=50, memory=7)


# Every keyword that a model takes, with a value that is not its default and those that it needs.
KEYWORDS = {
    "num_classes": 7,
    "in_chans": 1,
    "global_pool": "max",
    "cell_dropout": 0.25,
    "cell_drop_rate": 0.25,
    "zero_init_last": False,
    "equilibrium": False,
    "out_norm": "group",
    "num_groups": 4,
    "branch_gain": 0.5,
    "output_stride": 4,
    "act_layer": "silu",
    "norm_layer": "groupnorm1",
    "solver": "picard",
    "tol": 1e-2,
    "max_steps": 9,
    "atol": 1e-4,
    "memory": 3,
    "ridge": 1e-2,
    "mixing": 0.9,
    "damping": {"solver": "picard", "damping": 0.8},
    "check_every": 3,
    "while_loop": True,
    "min_steps": 4,
    "gather": False,
    "gradient": "unrolled",
    "backward_tol": 1e-4,
    "backward_max_steps": 9,
    "phantom_steps": {"gradient": "phantom", "phantom_steps": 3},
    "phantom_damping": {"gradient": "phantom", "phantom_damping": 0.9},
    "neumann_terms": {"gradient": "neumann", "neumann_terms": 3},
    "shine_refine": {"solver": "broyden", "gradient": "shine", "shine_refine": 2},
}
STRUCTURE = {"block", "layers", "channels", "stem_width", "small_input"}  # what an entry point decides
REGULARISATION = {"drop_rate", "drop_path_rate"}  # which timm leaves out for its own models too


def test_the_list_of_keywords_is_whole():
    signatures = [inspect.signature(f).parameters for f in (DEQResNet.__init__, create_equilibrium_args)]
    names = {name for signature in signatures for name in signature} - {"self", "device", "dtype", "solver_args"}
    assert names == set(KEYWORDS) | STRUCTURE | REGULARISATION


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_every_keyword_survives_saving(keyword, tmp_path):
    value = KEYWORDS[keyword]
    kwargs = value if isinstance(value, dict) else {keyword: value}
    net = model(**kwargs)
    stored = save(net, tmp_path)["model_args"]
    assert kwargs.items() <= stored.items() or keyword == "cell_drop_rate"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert str(loaded) == str(net)  # which shows the settings of solver, gradient and dropout
    assert str(net) != str(model()) or keyword == "zero_init_last"
    assert loaded.state_dict().keys() == net.state_dict().keys()


def test_a_dropout_of_two_names():
    with pytest.raises(ValueError, match="cell_drop_rate must be 0 where cell_dropout is given, got 0.2"):
        model(cell_dropout=0.1, cell_drop_rate=0.2)


def test_set_solver_refuses_and_changes_nothing():
    net = model()
    for args, kwargs, message in [
        ((), {"damping": 0.5}, "damping does not apply to Anderson"),
        ((), {"max_steps": 0}, "max_steps must be at least 1, got 0"),
        (("newton",), {}, "solver must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            set_solver(net, *args, **kwargs)
    assert equilibrium(net).solver == Anderson()
    net = model(solver="broyden", gradient="shine")
    with pytest.raises(ValueError, match="solver must be Broyden for the gradient Shine, got Picard"):
        set_solver(net, "picard")
    assert equilibrium(net).solver == Broyden(memory=20)
    with pytest.raises(ValueError, match="model must have an Equilibrium layer, got DEQResNet without one"):
        set_solver(model(equilibrium=False), max_steps=3)


@pytest.mark.parametrize("name", ["deq_resnet8_cifar", "deq_resnet18"])
def test_a_fresh_model_converges_in_evaluation_once_its_batch_norms_have_seen_a_batch(name):
    """With statistics of 0 and 1 what is injected is small, and the cell, which ends in a norm, hardly contracts."""
    net, injected = model(name), []
    net.layer4.injection.register_forward_hook(lambda module, args, x: injected.append(x.std().item()))

    def converged():
        with SolveLog(net.eval()) as log, torch.no_grad():
            net(IMAGES)
        return log.summary()["converged"], injected[-1] > 0.8

    assert converged() == (0, False)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        net.train()(IMAGES)
    assert converged() == (1, True)


def test_fewer_steps_cost_fewer_evaluations():
    net = model().train()
    steps = {}
    for most in (1, 4, 20):
        set_solver(net, max_steps=most)
        with SolveLog(net) as log, torch.no_grad():
            net(IMAGES)
        steps[most] = log.steps.max().item()
    assert steps[1] == 1 and steps[4] == 4 and 4 < steps[20] <= 20


def test_ema_deepcopy_and_state_dict(tmp_path):
    net = model().train()
    ema = ModelEmaV3(net, decay=0.5)
    twin = copy.deepcopy(net)
    net(IMAGES).square().sum().backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.01 * p.grad
    ema.update(net)
    expected = 0.5 * twin.fc.weight + 0.5 * net.fc.weight
    torch.testing.assert_close(ema.module.fc.weight, expected)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(twin.eval()(IMAGES), net.eval()(IMAGES))


def test_grad_checkpointing_gives_the_same_gradients():
    for kind in (True, False):
        grads = []
        for enable in (False, True):
            net = model(equilibrium=kind).train()
            net.set_grad_checkpointing(enable)
            net(IMAGES).square().sum().backward()
            grads.append([p.grad for p in net.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_features_only():
    net = timm.create_model("deq_resnet18_cifar", features_only=True)
    assert [f.shape[1:] for f in net(IMAGES)] == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert net.feature_info.reduction() == [1, 1, 2, 4, 8]


def test_layers_group_by_depth():
    groups = model().group_matcher()
    ids = timm.models._manipulate.group_parameters(model(), groups, reverse=True)
    order = ["conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight", "layer4.injection.0.weight"]
    order += ["layer4.equilibrium.cell.branch.0.weight", "fc.weight"]
    depths = [ids[name] for name in order]
    assert depths == sorted(set(depths))


def test_every_public_name_is_importable():
    assert set(timm_deq.__all__) <= set(dir(timm_deq))


def test_dropout_in_the_cell_is_for_training_alone():
    plain, dropping = model(), model(cell_drop_rate=0.5)
    with torch.no_grad():
        assert torch.equal(plain.eval()(IMAGES), dropping.eval()(IMAGES))
        assert not torch.equal(plain.train()(IMAGES), dropping.train()(IMAGES))
    assert plain.state_dict().keys() == dropping.state_dict().keys()
