"""measure_ood in one call, and the second pass that measure_model takes, against the same by hand."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from nc_probe import NCProbe, OODProbe, measure_model, measure_ood

K, d = 3, 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.drop, self.fc = nn.Linear(4, d), nn.Dropout(0.5), nn.Linear(d, K)

    def forward(self, x):
        return self.fc(self.drop(self.stem(x).relu()))


class Loader(list):
    """Counts how often it is iterated over."""

    shown = 0

    def __iter__(self):
        self.shown += 1
        return super().__iter__()


def data():
    gen = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % K
    x = torch.randn(60, 4, generator=gen) + 2 * labels[:, None]
    return x[:40], labels[:40], x[40:], -torch.randn(25, 4, generator=gen)


def batches(x, labels):
    return Loader(zip(x.split(7), labels.split(7), strict=True))


def by_hand(held_out=True, **settings):
    model, (x, labels, known, unknown) = Net().eval(), data()
    with torch.no_grad(), NCProbe(model, **settings) as probe:
        model(x)
        probe.update(labels)
    with torch.no_grad(), OODProbe(probe) as ood:
        if held_out:
            model(known)
            ood.update_known()
        model(unknown)
        ood.update()
    return probe.compute(), ood.compute()


KINDS = {
    "tensors": lambda x: x.split(6),
    "tuples": lambda x: [(part, torch.arange(len(part)) % K) for part in x.split(6)],
    "no labels": lambda x: [[part] for part in x.split(6)],
    "mappings": lambda x: [{"image": part, "label": torch.zeros(len(part)).long()} for part in x.split(6)],
    "padded": lambda x: DataLoader(x, 4, sampler=DistributedSampler(x, 7, 6, shuffle=False)),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "padded"])
def test_detection_in_one_call_is_that_by_hand(kind):
    model, (x, labels, known, unknown) = Net(), data()
    model.drop.eval()
    given = KINDS[kind]
    report, ood = measure_ood(model, batches(x, labels), given(unknown), given(known), groups={"rare": [2]})
    expected = by_hand(groups={"rare": [2]})
    assert ood.scalars() == pytest.approx(expected[1].scalars(), rel=1e-7, abs=1e-9)
    assert ood.known_source == "shown" and ood.unknown == 25 and 0 < ood.auroc["neco"] < 1
    assert report.nc1 == pytest.approx(expected[0].nc1, rel=1e-6) and report.groups["rare"].samples == 13
    assert model.training and not model.drop.training and not model.fc._forward_pre_hooks


def test_samples_of_the_pass_are_scored_where_no_others_are_shown():
    x, labels, _, unknown = data()
    _, ood = measure_ood(Net(), batches(x, labels), [unknown], components=2, standardize=True)
    assert ood.scalars() == pytest.approx(by_hand(held_out=False)[1].scalars(), rel=1e-7, abs=1e-9)
    assert ood.known_source == "those of the pass" and ood.known == 40
    _, other = measure_ood(Net(), batches(x, labels), [unknown], components=1)
    assert other.neco_components == 1


def test_duplicates_that_pad_are_not_scored():
    """25 samples dealt to 7 ranks: the last two of rank 6's four would be duplicates of others."""
    x, labels, _, unknown = data()
    _, ood = measure_ood(Net(), batches(x, labels), KINDS["padded"](unknown))
    assert ood.unknown == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ood_loader": []}, "loader must give at least one sample, got none"),
        ({"known_loader": iter([])}, "loader must give at least one sample, got none"),
        ({"ood_labels": 1}, r"labels of unknown samples must be none of the classes 0..2, got 1..1"),
        ({"ood_labels": "label"}, "labels must be an entry of a batch, one of .*, got 'label'"),
        ({"ood_loader": ["cats"]}, "loader must give tuples, lists or mappings with images and labels, got a str"),
        ({"components": 0}, "components must be at least 1, got 0"),
        ({"cache_bytes": 0, "known_loader": None}, "known samples must be shown by update_known"),
        ({"head": "drop"}, "Net.drop must be or contain an nn.Linear"),
    ],
)
def test_a_mistake_is_told_in_one_line(change, message):
    model, (x, labels, known, unknown) = Net(), data()
    given = {"ood_loader": [(unknown, torch.ones(25).long())], "known_loader": [known]} | change
    with pytest.raises(ValueError, match=message) as error:
        measure_ood(model, batches(x, labels), **given)
    assert "\n" not in str(error.value) and model.training and not model._forward_hooks


@pytest.mark.parametrize(
    "room", [{"cache_bytes": 0}, {"cache_bytes": 40 * d * 4, "spill_bytes": 0}], ids=["none", "of the classifier's"]
)
def test_a_second_pass_where_features_were_too_many(room):
    x, labels, _, _ = data()
    once, twice, kept = (batches(x, labels) for _ in range(3))
    model = Net()
    report = measure_model(model, twice, second_pass=True, layers=["stem"], **room)
    expected = measure_model(model, kept, second_pass=True, layers=["stem"])
    assert (twice.shown, kept.shown) == (2, 1) and model.training
    assert report.nc4 == expected.nc4 and report.layers["stem"].nc4 == expected.layers["stem"].nc4
    assert report.layers["stem"].nc4_source == "from a second pass over the samples"
    without = measure_model(model, once, layers=["stem"], **room)
    assert once.shown == 1 and without.layers["stem"].nc4 != without.layers["stem"].nc4


def test_a_second_pass_over_what_can_be_shown_once():
    with pytest.raises(ValueError, match="loader must be one that can be iterated twice for second_pass, got a gener"):
        measure_model(Net(), (batch for batch in batches(*data()[:2])), second_pass=True)
