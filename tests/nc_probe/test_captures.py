"""Layers and iterates measured in the same pass, against features pooled by hand and a solve written out."""

import pytest
import timm
import torch
from torch import nn

import timm_deq  # noqa: F401  (registers its models)
from nc_probe import ClassMoments, NCProbe, measure
from nc_probe.hooks.captures import OutputCapture, layer_captures
from nc_probe.hooks.pooling import pooled
from timm_deq import Equilibrium, Picard

K = 3


def test_pooling_by_layout():
    gen = torch.Generator().manual_seed(0)
    maps, tokens = torch.randn(2, 5, 4, 3, generator=gen), torch.randn(2, 6, 5, generator=gen)
    by_hand = torch.tensor(
        [[float(sum(maps[b, c].double().flatten().tolist())) / 12 for c in range(5)] for b in (0, 1)]
    )
    torch.testing.assert_close(pooled(maps).float(), by_hand)
    last = maps.permute(0, 2, 3, 1)
    torch.testing.assert_close(pooled(last, channels=5).float(), by_hand)
    torch.testing.assert_close(pooled(last).float(), torch.einsum("bhwc->bh", last) / 15)
    torch.testing.assert_close(pooled(tokens).float(), torch.stack([tokens[:, t] for t in range(6)]).mean(0))
    torch.testing.assert_close(
        pooled(tokens, prefix=2).float(), torch.stack([tokens[:, t] for t in range(2, 6)]).mean(0)
    )
    torch.testing.assert_close(pooled(tokens.mT, channels=5).float(), pooled(tokens).float())
    assert torch.equal(pooled(tokens, token=True), tokens[:, 0].double())
    assert torch.equal(pooled(tokens[:, 0]), tokens[:, 0].double())
    both = pooled({"a": (maps, 7), "b": [tokens, torch.arange(2)]})
    assert torch.equal(both, torch.cat([pooled(maps), pooled(tokens)], 1))
    assert torch.equal(pooled((tokens[:, :, :4], maps), channels=5), pooled(maps)), "the one with those channels"
    with pytest.raises(ValueError, match=r"must give a tensor \(B, ...\) of 2 to 4 dimensions, got int"):
        pooled(3)


def test_channels_as_many_as_places_are_taken_to_come_first_in_maps_and_last_in_tokens():
    gen = torch.Generator().manual_seed(0)
    square, tokens = torch.randn(2, 5, 5, 5, generator=gen), torch.randn(2, 5, 5, generator=gen)
    by_hand = [[sum(square[b, c].double().flatten().tolist()) / 25 for c in range(5)] for b in (0, 1)]
    torch.testing.assert_close(pooled(square, channels=5), torch.tensor(by_hand, dtype=torch.float64))
    by_hand = [[sum(tokens[b, :, c].double().tolist()) / 5 for c in range(5)] for b in (0, 1)]
    torch.testing.assert_close(pooled(tokens, channels=5), torch.tensor(by_hand, dtype=torch.float64))
    wide = square[:, :, :3]  # (B, 5, 3, 5): as wide as it has channels
    torch.testing.assert_close(pooled(wide, channels=5), torch.einsum("bchw->bc", wide.double()) / 15)


class Pair(nn.Module):
    """Gives maps and their tokens, as a layer does that hands on what it has read."""

    def forward(self, x):
        return {"maps": x.view(-1, 3, 2, 2), "size": 4, "tokens": [x.view(-1, 4, 3) ** 2]}


class OfPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.fc = Pair(), nn.Linear(12, K)

    def forward(self, x):
        self.pair(x)
        return self.fc(x)


def test_a_layer_that_gives_two_tensors_is_measured_by_both_side_by_side():
    gen = torch.Generator().manual_seed(0)
    x, labels = torch.randn(12, 12, generator=gen).double(), torch.arange(12) % K
    report = probed(OfPair().double().eval(), x, labels, 5, layers=["pair"])
    vectors = torch.cat([x.reshape(12, 3, 4).mean(2), x.reshape(12, 4, 3).square().mean(1)], 1)
    means = torch.stack([vectors[labels == k].mean(0) for k in range(K)])
    torch.testing.assert_close(report.layers["pair"].means, means - means.mean(0))
    first, second = torch.randn(2, 5, 3, generator=gen), torch.randn(2, 7, 3, generator=gen)
    assert torch.equal(pooled([first, second], channels=3), pooled(first)), "the first of those with the channels"


def test_means_of_bfloat16_maps_are_taken_in_float64():
    x = (100 + torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    expected = torch.tensor([[sum(x[b, c].flatten().tolist()) / 256 for c in range(3)] for b in (0, 1)])
    torch.testing.assert_close(pooled(x).float(), expected, rtol=1e-7, atol=0)


def probed(model, x, labels, size, **arguments):
    with torch.no_grad(), NCProbe(model, **arguments) as probe:
        for xb, yb in zip(x.split(size), labels.split(size), strict=True):
            model(xb)
            probe.update(yb)
    return probe.compute()


@pytest.mark.parametrize("name, stages", [("test_resnet", 5), ("test_vit", 6), ("deq_resnet8_cifar", 5)])
def test_stages(name, stages):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=K).double().eval()
    x = torch.randn(12, 3, *model.pretrained_cfg["input_size"][1:], dtype=torch.float64)
    labels = torch.arange(12) % K
    report = probed(model, x, labels, 5, layers="stages", groups={"some": [0, 1]})
    assert len(report.layers) == stages
    seen = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[k].register_forward_hook(lambda m, a, output, k=k: seen.update({k: output})) for k in report.layers
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    for key, layer in report.layers.items():
        h = seen[key]
        h = h[:, 0] if h.ndim == 3 else h.flatten(2).mean(2)  # test_vit classifies the class token
        expected = measure(ClassMoments(K, h.shape[1]).update(h, labels), None)
        assert layer.nc1 == pytest.approx(expected.nc1, rel=1e-8) and layer.nc2 == pytest.approx(expected.nc2, rel=1e-8)
        assert layer.groups["some"].samples == 8 and layer.as_dict()["nc3"] is None
    again = probed(model, x, labels, 12, layers=list(report.layers)[-1:])
    assert list(again.layers) == list(report.layers)[-1:]


class Cell(nn.Module):
    """Contracts by another factor in each sample, which x carries: samples need different numbers of steps."""

    def forward(self, z, x):
        return 0.9 * x[:, :1] * torch.sin(z) + x


class Solver(nn.Module):
    def __init__(self, gather):
        super().__init__()
        self.layer, self.fc = Equilibrium(Cell(), solver=Picard(1e-2, 12), gather=gather), nn.Linear(4, K)

    def forward(self, x):
        return self.fc(self.layer(x))


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("size", [1, 4, 30])
def test_iterates_against_a_solve_written_out(gather, size):
    torch.manual_seed(0)
    x, labels = torch.rand(30, 4, dtype=torch.float64), torch.arange(30) % K
    model = Solver(gather).double().eval()
    report = probed(model, x, labels, size, iterates=True)
    states = {}
    for i in range(30):
        z, cell, steps = torch.zeros(1, 4).double(), Cell(), {}
        for k in range(12):
            fz = cell(z, x[i : i + 1])
            best = min(
                steps.get("best", (float("inf"), z)), (float((fz - z).norm() / fz.norm()), z), key=lambda p: p[0]
            )
            steps["best"] = best
            if best[0] > 1e-2 and k < 11:
                z = fz
            states.setdefault(f"z{k + 1}", []).append(z if best[0] > 1e-2 else best[1])
        states.setdefault("z*", []).append(steps["best"][1])
    states = {"H0": x, **{k: torch.cat(rows) for k, rows in states.items()}}
    assert list(report.iterates)[0] == "H0" and list(report.iterates)[-1] == "z*" and len(report.iterates) > 5
    for name, measured in report.iterates.items():
        expected = measure(ClassMoments(K, 4).update(states[name], labels), None)
        assert measured.nc1 == pytest.approx(expected.nc1, rel=1e-9), name
        torch.testing.assert_close(measured.means, expected.means)
    assert report.iterates["z*"].nc1 == pytest.approx(report.nc1, rel=1e-9)


def test_iterates_of_two_equilibria_bear_their_names():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Equilibrium(Cell(), solver=Picard(1e-2, 4)), Equilibrium(Cell(), solver=Picard(1e-2, 3))
            self.fc = nn.Linear(4, K)

        def forward(self, x):
            return self.fc(self.b(self.a(x)))

    report = probed(Two().eval(), torch.rand(9, 4), torch.arange(9) % K, 9, iterates=True)
    assert list(report.iterates) == ["a.H0", "a.z1", "a.z2", "a.z3", "a.z*", "b.H0", "b.z1", "b.z2", "b.z*"]


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.never, self.bad, self.fc = nn.Identity(), nn.Identity(), nn.LogSoftmax(1), nn.Linear(4, K)

    def forward(self, x):
        self.bad(x * float("inf"))
        return self.fc(self.twice(self.twice(x)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": ["stem"]}, "layers must be names of modules of Odd, got 'stem'"),
        ({"layers": "fc"}, "layers must be 'stages' or a list of names, got 'fc'"),
        ({"layers": "stages"}, "layers='stages' needs feature_info that names modules, which Odd has not"),
        ({"iterates": True}, "iterates=True needs a model with an equilibrium layer, got Odd"),
        ({"layers": ["twice"]}, "layer 'twice' must be called once in a forward pass, got 2 calls"),
        ({"layers": ["never"]}, "layer 'never' must be called once in a forward pass, got 0 calls"),
        ({"layers": ["bad"]}, "layer 'bad': features must be finite, got NaN or infinity in batch 0"),
    ],
)
def test_misuse_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        probed(Odd().eval(), torch.rand(3, 4), torch.arange(3), 3, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "efficientvim_m1", "pit_ti_224", "selecsls42", "tnt_s_legacy_patch16_224"]
)
def test_stages_of_unusual_layouts_have_the_channels_that_the_model_says(name):
    model = timm.create_model(name, num_classes=K).eval()
    captures = layer_captures(model, "stages")
    OutputCapture(model, captures).register()
    with torch.no_grad():
        model(torch.randn(2, *model.pretrained_cfg["input_size"]))
    for capture in captures:
        (vector,) = capture.pop().values()
        assert vector.shape == (2, capture.layout["channels"])
    assert len(captures) >= 3
