"""Nearest class means, agreement with the final decision and ranks at layers and iterates, against NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from nc_probe import NCProbe
from nc_probe.plots import plot_depth, plot_iterates
from timm_deq import Anderson, Equilibrium

K, N = 4, 61
GROUPS = {"many": [0, 1], "few": [2, 3]}


class Cell(nn.Module):
    def forward(self, z, x):
        return torch.linspace(0, 0.9, 6, dtype=z.dtype) * torch.tanh(z + x)


class Model(nn.Module):
    """A map of images, an equilibrium whose samples need different numbers of steps, and a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.narrow = nn.Conv2d(3, 5, 1), nn.Linear(5, 6)
        self.layer, self.fc = Equilibrium(Cell(), solver=Anderson(1e-6, 30)), nn.Linear(6, K)

    def forward(self, x):
        h = self.narrow(torch.relu(self.conv(x)).mean((2, 3)))
        return self.fc(self.layer(h))


def problem():
    gen = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(K), torch.randint(0, K - 1, (N - K,), generator=gen)])
    return torch.randn(N, 3, 2, 2, generator=gen) + labels[:, None, None, None] / 3, labels


def probed(size=13, again=False, **settings):
    model, (x, labels) = Model().eval(), problem()
    probe = NCProbe(model, groups=GROUPS, layers=["conv", "narrow"], iterates=True, **settings)

    def show():
        for images, classes in zip(x.split(size), labels.split(size), strict=True):
            model(images)
            probe.update(classes)

    with torch.no_grad():
        with probe:
            show()
        if again:
            with probe.second_pass():
                show()
    return probe


@torch.no_grad()
def expected_places():
    """Features by place: each sample alone, and where its solve has ended it stands still."""
    model, (x, labels) = Model().eval(), problem()
    conv = model.conv(x)
    h = model.narrow(torch.relu(conv).mean((2, 3)))
    paths = []
    for sample in h:
        path = []
        handle = model.layer.register_iterate_hook(lambda layer, step, z, path=path: path.append(z.clone()))
        end = model.layer(sample[None])
        handle.remove()
        paths.append([sample[None], *path[1:], end])
    longest = max(map(len, paths))
    names = ["H0", *(f"z{k}" for k in range(1, longest - 1)), "z*"]
    filled = [[*path[:-1], *[path[-1]] * (longest - len(path) + 1)] for path in paths]
    iterates = {name: torch.cat([path[i] for path in filled]) for i, name in enumerate(names)}
    logits = model.fc(iterates["z*"])
    return (
        {"conv": conv.double().mean((2, 3)), "narrow": h},
        iterates,
        labels,
        logits.argmax(1),
        len({*map(len, paths)}),
    )


def of_place(features, labels, chosen, classes):
    x, labels, chosen = features.double().numpy(), labels.numpy(), chosen.numpy()
    means = np.stack([x[labels == k].mean(0) for k in range(K)])
    nearest = ((x[:, None] - means) ** 2).sum(2).argmin(1)
    of = [labels == k for k in classes]
    right = [float((nearest == labels)[member].mean()) for member in of]
    agree = [float((nearest == chosen)[member].mean()) for member in of]
    shown = np.isin(labels, classes)
    return {
        "center_accuracy": float((nearest == labels)[shown].mean()),
        "balanced_center_accuracy": float(np.mean(right)),
        "class_center_accuracy": tuple(right),
        "nc4": float(np.mean(agree)),
        "class_nc4": tuple(agree),
    }


def assert_places(report):
    layers, iterates, labels, chosen, lengths = expected_places()
    assert lengths > 1 and set(report.layers) == set(layers) and list(report.iterates) == list(iterates)
    for places, reports in ((layers, report.layers), (iterates, report.iterates)):
        for name, features in places.items():
            for place, classes in ((reports[name], range(K)), (reports[name].groups["few"], [2, 3])):
                for field, value in of_place(features, labels, chosen, classes).items():
                    assert getattr(place, field) == pytest.approx(value, rel=1e-12), (name, field)
            x = features.double().numpy()
            means = np.stack([x[labels.numpy() == k].mean(0) for k in range(K)])
            within = np.mean([np.cov(x[labels.numpy() == k].T, bias=True) for k in range(K)], 0)
            values = np.linalg.eigvalsh(within + np.cov(means.T, bias=True))
            ratio = values.sum() ** 2 / (values**2).sum()
            assert reports[name].participation_ratio == pytest.approx(ratio, rel=1e-5), (
                name
            )  # of a solve that ends at 1e-6
            assert np.isnan(reports[name].accuracy), "the classifier is not one of this place"


@pytest.mark.parametrize("size", [13, N])
def test_places_look_at_their_features_again(size):
    report = probed(size).compute()
    assert_places(report)
    assert report.layers["conv"].nc4_source == (
        "from a second look at the features, kept in the host's memory as float64"
    )
    assert report.iterates["z*"].nc4 == pytest.approx(report.nc4, abs=1e-12)


def test_a_second_pass_over_the_samples():
    report = probed(again=True, cache_bytes=0).compute()
    assert_places(report)
    assert report.layers["conv"].nc4_source == report.nc4_source == "from a second pass over the samples"


def test_features_of_places_on_disk():
    report = probed(cache_bytes=1000).compute()
    assert_places(report)
    assert "memory and disk as float64" in report.iterates["z1"].nc4_source


CLASSIFIER = N * 6 * 4  # bytes of its features


@pytest.mark.parametrize("budget", [{"spill_bytes": 0}, {"spill_bytes": 700}])
def test_all_places_or_none_and_the_classifier_before_them(budget):
    settings = {"cache_bytes": CLASSIFIER, **budget}
    report, whole = probed(**settings).compute(), probed().compute()
    places = [*report.layers.values(), *report.iterates.values()]
    assert {place.nc4_source for place in places} == {
        "absent: features exceed cache_bytes and spill_bytes, and there was no second pass"
    }
    assert all(np.isnan(place.nc4) and np.isnan(place.center_accuracy) for place in places)
    assert places[0].nc1 == whole.layers["conv"].nc1
    assert report.nc4 == whole.nc4 and "kept in the host's memory" in report.nc4_source
    assert np.isnan(probed(**{**settings, "cache_bytes": CLASSIFIER - 800}).compute().nc4)


# Bytes of the classifier's features and of a layer's: 24 and 40 a sample, 312 and 520 a batch of 13. With 1700 there is
# no room for the classifier's in the third batch until the layer's are gone.
@pytest.mark.parametrize("room, fits", [(1700, False), (2500, False), (N * 64 - 1, False), (N * 64, True)])
def test_the_room_is_shared_and_the_classifier_has_it_first(room, fits):
    model, (x, labels) = Model().eval(), problem()
    with torch.no_grad(), NCProbe(model, layers=["conv"], cache_bytes=room, spill_bytes=0) as probe:
        for images, classes in zip(x.split(13), labels.split(13), strict=True):
            model(images)
            probe.update(classes)
    report = probe.compute()
    assert np.isfinite(report.nc4) and np.isfinite(report.layers["conv"].nc4) == fits


def test_a_new_pass_forgets_them():
    probe = probed()
    with probe, torch.no_grad():
        probe.model(problem()[0][:20])
        probe.update(problem()[1][:20])
    assert probe.compute().layers["conv"].samples == 20


def test_figures_show_accuracy_agreement_and_ranks():
    report = probed().compute()
    titles = [ax.get_title(loc="left") for ax in plot_depth(report).axes]
    assert titles[3:] == [
        "nearest class mean: accuracy",
        "NC4: agreement with the final decision",
        "participation ratio",
    ]
    axes = plot_depth(report).axes
    (line,) = [line for line in axes[3].get_lines() if line.get_label() == "all"]
    expected = [*(r.center_accuracy for r in report.layers.values()), report.center_accuracy]
    assert line.get_ydata().tolist() == pytest.approx(expected)
    assert len(axes[3].get_lines()) == 3 and len(axes[5].get_lines()) == 1, "ranks are of all classes alone"
    assert len(plot_iterates(report).axes) == 6
    bare = probed(cache_bytes=0).compute()
    titles = [ax.get_title(loc="left") for ax in plot_depth(bare).axes]
    assert titles[3:] == ["participation ratio"], "what is absent takes no room"
