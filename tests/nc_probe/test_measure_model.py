"""measure_model: batches of any kind, every sample once, and a model and its training left as they were."""

import io
import random
from collections import UserDict, namedtuple
from types import SimpleNamespace

import accelerate.data_loader
import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset, WeightedRandomSampler

from nc_probe import NCProbe, measure_model

K, d, N = 3, 6, 23
GROUPS = {"rare": [2]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.drop = nn.Linear(4, d), nn.BatchNorm1d(d), nn.Dropout(0.5)
        self.fc = nn.Linear(d, K)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.stem(x)).relu()))


class Keywords(Net):
    """As of transformers: pictures by keyword, one of them optional, and labels, which it is not to be given."""

    def forward(self, *, pixel_values, shift=None, labels=None):
        assert labels is None
        return {"logits": super().forward(pixel_values if shift is None else pixel_values + shift)}


class Wrapper(nn.Module):
    """As DistributedDataParallel is."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def data():
    gen = torch.Generator().manual_seed(1)
    labels = torch.arange(N) % K
    return torch.randn(N, 4, generator=gen) + labels[:, None], labels


def by_hand(model, x, labels):
    model.eval()
    with torch.no_grad(), NCProbe(model, groups=GROUPS) as probe:
        model(x)
        probe.update(labels)
    model.train()
    return probe.compute()


def split(x, labels):
    return list(zip(x.split(5), labels.split(5), strict=True))


Pair = namedtuple("Pair", "image label")
KINDS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y.numpy()],
    "named": lambda x, y: Pair(x, y),
    "more": lambda x, y: (x, y, torch.zeros(9)),
    "dict": lambda x, y: {"id": "no", "image": x, "label": y.tolist()},
    "of its keyword": lambda x, y: UserDict({"label": y, "x": x, "image": None}),
    "one entry": lambda x, y: {"picture": x, "targets": y},
    "masked": lambda x, y: {
        "image": torch.cat([x, x[:2]]), "label": torch.cat([y, y[:2]]), "mask": torch.arange(len(x) + 2) < len(x)
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_kind(kind):
    model, (x, labels) = Net(), data()
    report = measure_model(model, [KINDS[kind](*batch) for batch in split(x, labels)], groups=GROUPS)
    expected = by_hand(model, x, labels)
    assert report.scalars() == pytest.approx(expected.scalars(), rel=1e-6) and report.samples == N


def test_entries_by_name():
    model, (x, labels) = Net(), data()
    batches = [{"a": x, "b": labels, "image": 0 * x, "label": 0 * labels, "c": labels < 2}]
    report = measure_model(model, batches, inputs="a", labels="b", mask="c", groups=GROUPS)
    assert report.class_count == (8, 8) and report.groups["rare"].samples == 0
    report = measure_model(model, [(labels, labels > 0, x)], inputs=2, labels=0, mask=1, groups=GROUPS)
    assert report.class_count == (8, 7)


def test_keywords_of_the_model():
    model, (x, labels) = Keywords(), data()
    expected = by_hand(Net(), x + 1, labels).scalars()
    batches = [{"pixel_values": x, "shift": torch.ones(1), "labels": labels, "name": ["a"] * N}]
    assert measure_model(model, batches, groups=GROUPS).scalars() == pytest.approx(expected, rel=1e-6)
    alone = [{"labels": labels, "pixel_values": x + 1}]
    assert measure_model(model, alone, groups=GROUPS).scalars() == pytest.approx(expected, rel=1e-6)
    wrapped = measure_model(Wrapper(model), batches, inputs=["pixel_values", "shift"], groups=GROUPS)
    assert wrapped.scalars() == measure_model(Wrapper(model), batches, groups=GROUPS).scalars()
    assert wrapped.scalars() == pytest.approx(expected, rel=1e-6)


def test_of_another_precision():
    x, labels = data()
    model = Net().double()
    assert measure_model(model, [(x, labels)]).nc1 == pytest.approx(by_hand(model, x.double(), labels).nc1, rel=1e-12)
    coarse, fine = measure_model(Net(), [(x, labels)], autocast=torch.bfloat16).nc1, by_hand(Net(), x, labels).nc1
    assert 1e-5 < abs(coarse / fine - 1) < 0.1


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [False, True])
def test_the_model_is_left_as_it_was(stop):
    model, (x, labels) = Net(), data()
    model.drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    def loader():
        yield x, labels
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        if stop:
            raise Stopped

    try:
        measure_model(model, loader())
    except Stopped:
        assert stop
    assert [module.training for module in model.modules()] == modes == [True, True, True, False, True]
    assert torch.is_grad_enabled() and not model.fc._forward_pre_hooks and not model._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class Noisy(TensorDataset):
    """Augments with whatever draws random numbers."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + random.random() + float(np.random.rand()) + torch.rand(1), y


@pytest.mark.parametrize("own", [False, True])
def test_training_goes_on_with_the_same_random_numbers(own):
    def train(measured):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        model = Net()
        generator = torch.Generator().manual_seed(3) if own else None
        loader = DataLoader(Noisy(*data()), batch_size=8, shuffle=True, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            for x, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), labels).backward()
                optimizer.step()
            if measured:
                assert measure_model(model, loader).samples == N
        return model.state_dict()

    once, again = train(True), train(False)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("world", [1, 4, 30])  # of the last most ranks see duplicates alone
@pytest.mark.parametrize("kind", ["shuffled", "cut", "timm", "accelerate", "split", "uneven"])
def test_every_sample_once_over_all_ranks(kind, world):
    x, labels = data()
    dataset, total, counts = TensorDataset(x, labels), 0, torch.zeros(K, dtype=torch.int64)
    size = 4 if kind != "split" else 4 * world
    for rank in range(world):
        loader = DataLoader(dataset, batch_size=size, shuffle=kind == "accelerate")
        if kind in ("shuffled", "cut"):
            sampler = DistributedSampler(dataset, world, rank, shuffle=True, drop_last=kind == "cut")
            loader = DataLoader(dataset, batch_size=4, sampler=sampler)
        elif kind == "timm":
            loader = DataLoader(dataset, batch_size=4, sampler=OrderedDistributedSampler(dataset, world, rank))
        else:
            loader = accelerate.data_loader.prepare_data_loader(
                loader,
                num_processes=world,
                process_index=rank,
                put_on_device=False,
                split_batches=kind == "split",
                even_batches=kind != "uneven",
                use_seedable_sampler=True,
            )
        try:
            report = measure_model(Net(), loader)
        except ValueError as error:  # nothing to count
            assert "at least one sample" in str(error)
            continue
        total += report.samples
        counts[list(report.classes)] += torch.tensor(report.class_count)
    assert total == (N if kind != "cut" else N // world * world)
    assert kind == "cut" or counts.tolist() == labels.bincount().tolist()


def test_what_repeats_samples_is_refused():
    x, labels = data()
    dataset = TensorDataset(x, labels)
    samplers = [
        RandomSampler(dataset, replacement=True),
        WeightedRandomSampler([1.0] * N, N),
        RepeatAugSampler(dataset, 2, 0),
    ]
    for sampler in samplers:
        loader = DataLoader(dataset, batch_size=4, sampler=sampler)
        for given in (loader, SimpleNamespace(batch_sampler=SimpleNamespace(batch_sampler=loader.batch_sampler))):
            with pytest.raises(ValueError, match=f"got one with a {type(sampler).__name__} that repeats some"):
                measure_model(Net(), given)
    without = WeightedRandomSampler([1.0] * N, N, replacement=False)
    assert measure_model(Net(), DataLoader(dataset, batch_size=4, sampler=without)).samples == N


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        (lambda x, y: [x], {}, "loader must give tuples, lists or mappings with images and labels, got a Tensor"),
        (lambda x, y: [(x,)], {}, r"labels must be an entry of a batch, one of \[0\], got 1: name it by labels="),
        (lambda x, y: [{"image": x}], {}, r"labels must be an entry of a batch, one of \['image'\], got none of"),
        (lambda x, y: [{"image": x, "y": y}], {"labels": "z"}, r"one of \['image', 'y'\], got 'z': name it by labels="),
        (lambda x, y: [{"a": x, "b": x, "y": y}], {}, r"inputs must name entries of a batch, which has \['a', 'b'\]"),
        (lambda x, y: [{"y": y}], {}, "which has nothing but labels"),
        (lambda x, y: [{"a": x, "y": y}], {"inputs": "c"}, r"inputs must be an entry .*, got 'c': name it by inputs="),
        (lambda x, y: [(x, y)], {"mask": 2}, r"mask must be an entry of a batch, one of \[0, 1\], got 2"),
        (lambda x, y: [(x, None)], {}, "labels must be a tensor, an array or a list, got NoneType"),
        (lambda x, y: [(x, nn.functional.one_hot(y))], {}, r"labels must have shape \(23,\) as the batch has"),
        (lambda x, y: [(x, y[:5])], {}, r"labels must have shape \(23,\) as the batch has, got \(5,\)"),
        (lambda x, y: [(x, y[0])], {}, r"labels must have shape \(23,\) as the batch has, got \(\)"),
        (lambda x, y: [], {}, "loader must give at least one sample, got none"),
        (lambda x, y: [(x, y)], {"head": "drop"}, "Net.drop must be or contain an nn.Linear .* name the layer with"),
    ],
)
def test_a_mistake_is_told_in_one_line(batches, settings, message):
    model = Net()
    with pytest.raises(ValueError, match=message) as error:
        measure_model(model, batches(*data()), **settings)
    assert "\n" not in str(error.value) and model.training


def test_a_model_whose_head_cannot_be_read():
    with pytest.raises(ValueError, match="ReLU must be or contain an nn.Linear or a 1x1 nn.Conv2d"):
        measure_model(nn.ReLU(), [data()])


def test_the_bar_is_for_terminals(monkeypatch):
    shown = []
    for terminal, progress in ((True, True), (True, False), (False, True)):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr("sys.stderr", stream)
        measure_model(Net(), [data()], progress=progress)
        shown.append("nc_probe" in stream.getvalue())
    assert shown == [True, False, False]
