"""On an accelerator the probe finds what it finds on the CPU, waits for nothing meanwhile, and tells bad batches."""

import copy

import pytest
import torch
from torch import nn

from nc_probe import NCProbe, OODProbe, measure_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
K, d, N = 7, 24, 900
GROUPS = {"rare": [5, 6]}


class Net(nn.Module):
    def __init__(self, offset=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.hidden, self.fc = nn.Linear(12, 40), nn.Linear(40, d), nn.Linear(d, K)
        self.offset = offset

    def forward(self, x):
        return self.fc(self.hidden(self.stem(x).relu()).relu() + self.offset)


def data(dtype=torch.float64):
    gen = torch.Generator().manual_seed(1)
    labels = (torch.rand(N, generator=gen) ** 2 * K).long()
    return torch.randn(N, 12, generator=gen, dtype=dtype) + torch.eye(K, 12, dtype=dtype)[labels], labels


def measured(device, *, again=False, **settings):
    """A report by hand over batches of 128, shown once or again."""
    x, labels = (t.to(device) for t in data())
    model = Net().to(device).double().eval()
    with torch.no_grad(), NCProbe(model, groups=GROUPS, **settings) as probe:
        batches = list(zip(x.split(128), labels.split(128), strict=True))
        for image, label in batches:
            model(image)
            probe.update(label)
    if again:
        with torch.no_grad(), probe.second_pass():
            for image, label in batches:
                model(image)
                probe.update(label)
    return probe.compute()


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_bytes": 0}, {"cache_bytes": 0, "again": True}, {"layers": ["stem", "hidden"]}, {"spectrum": False}],
    ids=["kept", "moments", "second pass", "layers", "no ranks"],
)
def test_a_report_is_that_of_the_cpu(settings):
    here, there = measured("cpu", **settings), measured(DEVICE, **settings)
    assert there.scalars() == pytest.approx(here.scalars(), rel=1e-8, abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_of_float32_features(offset):
    """Against the same features, as the accelerator computed them, in float64."""
    x, labels = (t.to(DEVICE) for t in data(torch.float32))
    model = Net(offset).to(DEVICE).eval()
    features = []
    handle = model.fc.register_forward_pre_hook(lambda _, args: features.append(args[0].detach().cpu()))
    report = measure_model(model, list(zip(x.split(128), labels.split(128), strict=True)), groups=GROUPS)
    handle.remove()

    head = copy.deepcopy(model.fc).double().cpu()
    alone = nn.Sequential(head).eval()
    with torch.no_grad(), NCProbe(alone, groups=GROUPS) as probe:
        alone(torch.cat(features).double())
        probe.update(labels.cpu())
    expected = probe.compute()
    for name in ("nc1", "nc2_etf", "nc3", "nc4"):
        assert getattr(report, name) == pytest.approx(getattr(expected, name), rel=1e-6), name


def test_an_update_waits_for_nothing():
    x, labels = (t.to(DEVICE) for t in data(torch.float32))
    model = Net().to(DEVICE).eval()
    with torch.no_grad(), NCProbe(model) as probe:
        model(x)
        probe.update(labels)  # the first has its memory to make
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(x)
                probe.update(labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert probe.compute().samples == 4 * N


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda x, y: y.add_(K), "labels must be in 0..6"), (lambda x, y: x.fill_(float("nan")), "finite")],
    ids=["labels", "features"],
)
def test_a_bad_batch_is_told_by_its_number(spoil, message):
    x, labels = (t.to(DEVICE) for t in data(torch.float32))
    model = Net().to(DEVICE).eval()
    with torch.no_grad(), NCProbe(model) as probe:
        for i in range(3):
            image, label = x.clone(), labels.clone()
            if i == 1:
                spoil(image, label)
            model(image)
            probe.update(label)
    with pytest.raises(ValueError, match=message) as caught:
        probe.compute()
    assert "batch 1" in str(caught.value)


def test_out_of_distribution():
    found = []
    for device in ("cpu", DEVICE):
        x, labels = (t.to(device) for t in data())
        model = Net().to(device).double().eval()
        with torch.no_grad(), NCProbe(model) as probe:
            model(x)
            probe.update(labels)
        with torch.no_grad(), OODProbe(probe) as ood:
            model(x + 0.1)
            ood.update_known()
            model(3 * x.flip(1))
            ood.update()
        found.append(ood.compute().scalars())
    assert found[1] == pytest.approx(found[0], rel=1e-8)


def test_tokens():
    found = []
    for device in ("cpu", DEVICE):
        x, labels = (t.to(device) for t in data())
        model = Net().to(device).double().eval()
        labels = labels.clone().masked_fill_(torch.arange(N, device=device) % 3 == 0, -100)
        with torch.no_grad(), NCProbe(model, ignore_index=-100) as probe:
            model(x.view(30, 30, 12))
            probe.update(labels.view(30, 30))
        found.append(probe.compute().scalars())
    assert found[1] == pytest.approx(found[0], rel=1e-8, abs=1e-10, nan_ok=True)


def test_the_accelerator_s_random_numbers_go_on_as_if_nothing_had_been_measured():
    x, labels = (t.to(DEVICE) for t in data(torch.float32))
    model = Net().to(DEVICE)
    draws = []
    for look in (False, True):
        torch.manual_seed(5)
        if look:
            measure_model(model, [(x, labels)])
        draws.append(torch.rand(4, device=DEVICE).tolist())
    assert draws[0] == draws[1]
