"""NCProbe on small models, against the features that the classifier received, taken by hand."""

import copy
import dataclasses
import errno
import gc
import io
import math
import tempfile
import weakref

import numpy as np
import oracles_nc
import pytest
import torch
import torch.utils.checkpoint
from collapsed import crosses, frame
from torch import nn

from nc_probe import ClassMoments, NCProbe, measure, pass_sums
from nc_probe.measures import formulas
from nc_probe.moments import second_pass, validation, waiting
from nc_probe.plots import plot_angles, plot_grams
from recipes.benchmarks.merged import closed_form, samples

K, d = 4, 6
GROUPS = {"majority": [0, 1], "minority": [2, 3]}


class Net(nn.Module):
    """torchvision-like: the classifier is `fc`."""

    def __init__(self, num_classes=K, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, d)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(d, num_classes, bias=bias)

    def features(self, x):
        return self.drop(torch.relu(self.stem(x)))

    def forward(self, x):
        return self.fc(self.features(x))


class TimmNet(Net):
    """timm-like: the classifier has a name that no search would find, and later linear layers that it is not."""

    def __init__(self):
        super().__init__()
        self.last = self.fc
        del self.fc
        self.fc = nn.Linear(1, 1)

    def get_classifier(self):
        return self.last

    def forward(self, x):
        return self.last(input=self.features(x))


def data(n=57):
    gen = torch.Generator().manual_seed(3)
    labels = torch.cat([torch.arange(K), torch.randint(0, K - 1, (n - K,), generator=gen)])
    return torch.randn(n, 5, generator=gen) + labels[:, None], labels


def run(model, x, labels, size=10, **arguments):
    with torch.no_grad(), NCProbe(model, **arguments) as probe:
        for xb, yb in zip(x.split(size), labels.split(size), strict=True):
            model(xb)
            probe.update(yb)
    return probe.compute()


def leaves(value, path=""):
    """The numbers of a report by name, in groups and lists too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {key: leaf for name, child in items for key, leaf in leaves(child, f"{path}/{name}").items()}


def assert_same(a, b):
    a, b = leaves(a.as_dict(per_class=True)), leaves(b.as_dict(per_class=True))
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.endswith("_source"):
            continue
        expected = pytest.approx(value, rel=1e-10, abs=1e-12) if isinstance(value, float) else value
        assert b[name] == expected, name


def test_report_is_that_of_the_features_the_classifier_received():
    model, (x, labels) = Net().eval(), data()
    report = run(model, x, labels, groups=GROUPS)
    with torch.no_grad():
        h = model.features(x)
    weight, bias = model.fc.weight.double(), model.fc.bias.double()
    assert report.nc1 == pytest.approx(measure(ClassMoments(K, d).update(h, labels), weight).nc1, rel=1e-10)
    means = torch.stack([h[labels == k].double().mean(0) for k in range(K)])
    chosen = (h.double() @ weight.T + bias).argmax(1)
    nearest = ((h.double()[:, None] - means) ** 2).sum(2).argmin(1)
    assert report.samples == 57 and report.class_count == tuple(torch.bincount(labels).tolist())
    assert report.accuracy == pytest.approx(float((chosen == labels).double().mean()))
    assert report.center_accuracy == pytest.approx(float((nearest == labels).double().mean()))
    agree = [float((nearest == chosen)[labels == k].double().mean()) for k in range(K)]
    assert report.class_nc4 == pytest.approx(agree)
    assert report.nc4 == pytest.approx(sum(agree) / K)
    assert report.balanced_accuracy == pytest.approx(sum(report.class_accuracy) / K)
    minority = labels >= 2
    assert report.groups["minority"].accuracy == pytest.approx(float((chosen == labels)[minority].double().mean()))
    assert report.groups["minority"].center_accuracy == pytest.approx(
        float((nearest == labels)[minority].double().mean())
    )
    assert report.nc4_source.startswith("from a second look")
    assert run(model, x, labels, center="empirical").nc4 == pytest.approx(float((nearest == chosen).double().mean()))


def test_any_batch_size_any_order_and_known_counts():
    # In float32 a model's own features depend on the size of the batch.
    model, (x, labels) = Net().double().eval(), data()
    x = x.double()
    report = run(model, x, labels, groups=GROUPS)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert_same(report, run(model, x, labels, size=1, groups=GROUPS))
    assert_same(report, run(model, x[order], labels[order], size=57, groups=GROUPS))
    pooled = run(model, x, labels, groups=GROUPS, class_counts=torch.bincount(labels), cache_bytes=0)
    for a, b in ((report, pooled), *((report.groups[g], pooled.groups[g]) for g in GROUPS)):
        assert b.nc1 == pytest.approx(a.nc1, rel=1e-10) and b.nc1 > 0
        assert b.class_nc1 == () and len(a.class_nc1) == len(a.classes)
        assert b.nc3 == pytest.approx(a.nc3, rel=1e-10)


def test_a_batch_in_blocks_is_the_batch(monkeypatch):
    model, (x, labels) = Net().eval(), data()
    with torch.no_grad():  # logits about zero, so that all classes are chosen
        model.fc.bias.copy_(-model.fc.weight @ model.features(x).mean(0))
        assert len(model(x).argmax(1).unique()) == K
    whole = run(model, x, labels, size=57, groups=GROUPS)
    monkeypatch.setattr(second_pass, "block_rows", lambda device, num_features: 7)
    assert_same(run(model, x, labels, size=57, groups=GROUPS), whole)


def test_padded_duplicates_are_not_counted():
    model, (x, labels) = Net().double().eval(), data(57)
    x = x.double()
    padded, padded_labels = torch.cat([x, x[:3]]), torch.cat([labels, torch.full((3,), -1)])
    with torch.no_grad(), NCProbe(model) as probe:
        for i in range(0, 60, 10):
            model(padded[i : i + 10])
            probe.update(padded_labels[i : i + 10], mask=torch.arange(i, i + 10) < 57)
    report = probe.compute()
    assert report.samples == 57
    assert_same(report, run(model, x, labels))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        nn.DataParallel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
        lambda m: (m.compile(backend="eager"), m)[1],
    ],
)
@pytest.mark.parametrize("build", [Net, TimmNet])
def test_wrapped_models(wrap, build):
    x, labels = data()
    expected = run(build().eval(), x, labels)
    model = wrap(build()).eval()
    with torch.no_grad():
        for xb in x.split(10):
            model(xb)  # compiled before the probe is attached, so the hook comes too late for the compiled code
        assert_same(run(model, x, labels), expected)
        assert_same(run(model, x, labels), expected)
        torch.testing.assert_close(model(x), build().eval()(x))
    torch.compiler.reset()


@pytest.mark.parametrize("center", ["balanced", "empirical"])
def test_bfloat16_activations_are_measured_as_they_are(center):
    """Every number of the report, against float64 sums over the very activations that the classifier received."""
    model, (x, labels) = Net().eval(), data()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        report = run(model, x, labels, center=center, groups=GROUPS, spectrum=True)
        h = model.features(x)
    assert h.dtype == torch.bfloat16
    arrays = (h.double().numpy(), labels.numpy(), model.fc.weight.detach().double().numpy())
    bias = model.fc.bias.detach().double().numpy()
    for classes, part in ((None, report), (GROUPS["minority"], report.groups["minority"])):
        expected = oracles_nc.report(*arrays, bias, center=center, classes=classes)
        expected.pop("feature_rank", None)  # the oracle's tolerance is that of float32
        assert len(expected) > 30
        for name, value in expected.items():
            assert getattr(part, name) == pytest.approx(value, rel=1e-10, abs=1e-12), name


@pytest.mark.parametrize("merged", [1.0, 1e-3, 1e-6])
def test_nc1_by_a_second_look_where_class_means_merge_in_closed_form(merged):
    """Two means at +-u, two more at `merged` of each other beside -3u: S_B is diagonal, and S_W = (s^2/3) Q Q^T."""
    Q, s = frame(20, 3), 0.1 * merged
    means = torch.stack([Q[:, 0], -Q[:, 0], -3 * Q[:, 1], -3 * Q[:, 1] + merged * Q[:, 2]])
    x, labels = crosses(means, Q, s)
    coordinates = (means - means.mean(0)) @ Q
    truth = s**2 / 3 * float(torch.linalg.inv(coordinates.T @ coordinates / 4).trace()) / 4
    net = nn.Linear(20, 4).double().eval()
    report = run(net, x, labels, size=5, groups={"merged": [2, 3], "apart": [0, 1]}, spectrum=True)
    assert report.nc1_rank == 3 and report.nc1 == pytest.approx(truth, rel=1e-13 / merged)
    moments = ClassMoments(4, 20).update(x, labels)
    expected = measure(moments, net.weight, net.bias, groups={"merged": [2, 3], "apart": [0, 1]})
    for part, other in ((report, expected), *((report.groups[g], expected.groups[g]) for g in report.groups)):
        assert part.nc1 == pytest.approx(other.nc1, rel=1e-13 / merged)
        assert part.class_nc1 == pytest.approx(other.class_nc1, rel=1e-12 / merged)
        assert (part.feature_rank, part.stable_rank) == (
            other.feature_rank,
            pytest.approx(other.stable_rank, nan_ok=True),
        )


def test_directions_that_may_be_rounding_are_counted():
    """A linear layer to more features than it has inputs: their span is that of its inputs, and what float32 adds."""
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7)).eval()
    x, labels = torch.randn(700, 5), torch.arange(700) % 7
    x += 2 * torch.randn(7, 5)[labels]
    report = run(narrow, x, labels, size=64, groups={"some": [0, 1, 2]})
    assert report.nc1_rank == 6 and report.nc1_unresolved == 1 and report.groups["some"].nc1_unresolved == 0
    assert "(1 of these directions may be rounding of the features" in " ".join(str(report).split())
    exact = run(narrow.double(), x.double(), labels, size=64)
    assert (exact.nc1_rank, exact.nc1_unresolved) in ((5, 0), (6, 1))
    wide = run(nn.Linear(5, 7).eval(), x, labels, size=64)
    assert (wide.nc1_rank, wide.nc1_unresolved) == (5, 0) and "rounding" not in str(wide)


@pytest.mark.parametrize("distance, unresolved", [(1e-2, 0), (1e-6, 0), (1e-8, 6)])
def test_minority_means_that_merge_are_resolved_where_float32_resolves_them(distance, unresolved):
    """At 1e-6 of the majority's distance NC1 is right to 4e-5; at 1e-8 it is said that it may not be."""
    x, labels = samples(distance)
    report = measure(ClassMoments(10, 512, class_counts=torch.bincount(labels)).update(x.float(), labels), None)
    assert report.nc1_unresolved == unresolved and report.nc1_rank == 9
    assert report.nc1 == pytest.approx(closed_form(distance), rel=0.1 if unresolved else 1e-4)


def test_offset_does_not_move_nearest_means():
    """Features about 1e8, class distances about 1: half a squared norm is 3e16, known to 4 only."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(d, K)).double().eval()
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(K).repeat(50)
    x = 1e8 + torch.randn(K, d, generator=gen).double()[labels] + 0.6 * torch.randn(200, d, generator=gen).double()
    report = run(net, x, labels)
    means = torch.stack([x[labels == k].mean(0) for k in range(K)])
    nearest = ((x[:, None] - means) ** 2).sum(2).argmin(1)
    assert 0.5 < report.center_accuracy < 1
    assert report.center_accuracy == float((nearest == labels).double().mean())


def test_absent_classes_attract_nobody():
    model, (x, labels) = Net(num_classes=K + 2).eval(), data()
    report = run(model, x - 1, labels, groups={"seen": [0, 1], "unseen": [4, 5]})
    with torch.no_grad():
        h = model.features(x - 1).double()
    means = torch.stack([h[labels == k].mean(0) for k in range(K)])
    assert report.center_accuracy == float((torch.cdist(h, means).argmin(1) == labels).double().mean())
    assert report.classes == (0, 1, 2, 3)
    unseen = report.groups["unseen"].as_dict(per_class=True)
    assert unseen["samples"] == 0 and unseen["classes"] == []
    for name in ("nc1", "nc1_condition", "cdnv", "nc2_etf", "nc3", "nc4", "accuracy", "center_accuracy"):
        assert unseen[name] is None, name
    assert unseen["nc2_norm_weight"] is None, "nor of the classifier's rows"


def test_cache_budgets():
    model, (x, labels) = Net().eval(), data()
    whole, most = run(model, x, labels, spectrum=True), 57 * d * 4
    assert whole.nc4_source == "from a second look at the features, kept in the host's memory as float32"
    memory = run(model, x, labels, spectrum=True, cache_bytes=most, spill_bytes=0)
    disk = run(model, x, labels, spectrum=True, cache_bytes=1, spill_bytes=most)
    both = run(model, x, labels, spectrum=True, cache_bytes=most - 1, spill_bytes=most)
    for report in (memory, disk, both):
        assert_same(report, whole)
    assert memory.nc4_source == whole.nc4_source and "memory and disk" in disk.nc4_source == both.nc4_source
    short = run(model, x, labels, spectrum=True, cache_bytes=most - 1, spill_bytes=0)
    none = run(model, x, labels, spectrum=True, cache_bytes=0)
    for report in (short, none):
        assert math.isnan(report.nc4) and math.isnan(report.center_accuracy)
        assert report.class_nc4 == () and "absent: features exceed cache_bytes and spill_bytes" in report.nc4_source
        assert report.accuracy == whole.accuracy
        assert report.nc1 == pytest.approx(whole.nc1, rel=1e-12)
        assert report.class_nc1 == pytest.approx(whole.class_nc1, rel=1e-12)
        assert report.participation_ratio == pytest.approx(whole.participation_ratio, rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"cache_bytes": 0}], ids=["kept", "scatter"])
def test_ranks_of_features_are_there_where_they_are_asked_for(settings, monkeypatch):
    model, (x, labels) = Net().eval(), data()
    asked = run(model, x, labels, spectrum=True, **settings)
    monkeypatch.setattr(formulas, "spectrum", None)  # nothing is computed for what nobody asks
    monkeypatch.setattr(pass_sums, "within_class_scatter", None)
    report = run(model, x, labels, **settings)
    ranks = {"feature_rank", "stable_rank", "participation_ratio"}
    assert asked.scalars().keys() - report.scalars().keys() == ranks and asked.feature_rank == d
    assert {name for name, value in report.as_dict().items() if value != asked.as_dict()[name]} == ranks
    assert "features: no ranks, for which NCProbe takes spectrum=True" in str(report)


@pytest.mark.parametrize("room", [0, 10**3, 10**6])
def test_batches_that_wait_to_be_added_together_are_those_that_came(room, monkeypatch):
    """Whatever their sizes and types, and whatever is done in between to labels and weights."""
    monkeypatch.setattr(waiting, "WAITING_BYTES", room)
    model, (x, labels) = Net().eval(), data()
    sizes = [5, 0, 7, 20, 1, 24]
    with torch.no_grad(), NCProbe(model, groups=GROUPS) as probe:
        for xb, yb in zip(x.split(sizes), labels.split(sizes), strict=True):
            if len(xb) == 20:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    model(xb)
            else:
                model(xb)
            given = yb.to(torch.int32 if len(xb) == 7 else torch.int64, copy=True)
            probe.update(given)
            given.fill_(0)
            model(x + math.inf)
            with pytest.raises(ValueError, match="features must be finite"):
                probe.update(labels)
        model.fc.weight.zero_()
    assert [len(kept) for kept, _ in probe.kept()] == sizes
    assert torch.equal(torch.cat([of for _, of in probe.kept()]), labels)
    features, weight = torch.cat([h.double() for h, _ in probe.kept()]), probe._sums.classifiers[0].snapshot()[0]
    report = probe.compute()
    expected = measure(ClassMoments(K, d).update(features, labels), weight)
    assert report.samples == 57 and report.nc1 == pytest.approx(expected.nc1, rel=1e-10)
    right = (features @ weight.T + model.fc.bias).argmax(1) == labels
    assert report.accuracy == float(right.double().mean()) and report.nc3 == pytest.approx(expected.nc3)


def test_a_full_disk_is_a_budget(monkeypatch):
    class Full(io.BytesIO):
        def write(self, raw):
            raise OSError(errno.ENOSPC, "No space left on device")

    model, (x, labels) = Net().eval(), data()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **arguments: Full())
    report = run(model, x, labels, cache_bytes=10 * d * 4)
    assert math.isnan(report.nc4) and report.nc1 == pytest.approx(run(model, x, labels).nc1, rel=1e-12)


def test_features_kept_in_half_are_rounded_for_nc4_alone():
    model, (x, labels) = Net().eval(), data()
    report, half = run(model, x, labels), run(model, x, labels, cache_dtype=torch.float16)
    assert half.nc4_source.endswith("as float16")
    assert (half.nc1, half.class_norm) == (pytest.approx(report.nc1, rel=1e-12), report.class_norm)
    with torch.no_grad():
        h = model.features(x)
    means = torch.stack([h[labels == k].double().mean(0) for k in range(K)])
    nearest = ((h.half().double()[:, None] - means) ** 2).sum(2).argmin(1)
    assert half.center_accuracy == float((nearest == labels).double().mean())


def test_a_second_pass_instead_of_kept_features():
    model, (x, labels) = Net().eval(), data()
    whole = run(model, x, labels, groups=GROUPS, size=57)
    with torch.no_grad():
        with NCProbe(model, cache_bytes=0, groups=GROUPS) as probe:
            model(x)
            probe.update(labels)
        with probe.second_pass():
            for xb, yb in zip(x.split(20), labels.split(20), strict=True):
                model(xb)
                probe.update(yb)
        report = probe.compute()
        assert_same(report, whole)
        assert_same(probe.compute(), whole)
        assert report.nc4_source == "from a second pass over the samples"
        with NCProbe(model, groups=GROUPS) as kept:
            model(x)
            kept.update(labels)
        with kept.second_pass():  # of no use, and no harm
            model(x)
            kept.update(labels)
        assert_same(kept.compute(), whole)
        with pytest.raises(ValueError, match="second pass must show the samples of the first, got 0 of class 0"):
            with probe.second_pass():
                model(x[labels > 0])
                probe.update(labels[labels > 0])
            probe.compute()
    with pytest.raises(ValueError, match="at least one sample"), NCProbe(model).second_pass():
        pass


def test_too_much_scatter_leaves_nc1_out_with_a_warning(monkeypatch):
    monkeypatch.setattr(validation, "SCATTER_BYTES", 0)
    model, (x, labels) = Net().eval(), data()
    with pytest.warns(
        UserWarning, match="features exceed cache_bytes and spill_bytes, so NC1 will be absent: a scatter"
    ):
        report = run(model, x, labels, cache_bytes=1, spill_bytes=0)
    assert math.isnan(report.nc1) and report.nc2 == run(model, x, labels, cache_bytes=2**20).nc2
    assert report.stable_rank != report.stable_rank and report.feature_rank is None
    counted = run(model, x, labels, cache_bytes=1, spill_bytes=0, class_counts=torch.bincount(labels))
    assert counted.nc1 == pytest.approx(run(model, x, labels).nc1, rel=1e-12)
    with pytest.raises(ValueError, match="give class_counts"):
        NCProbe(model, cache_bytes=0)


def test_kept_features_survive_later_changes():
    """The activation may be a view of something large, or be overwritten by the next batch."""
    buffer = torch.empty(10, d)

    class InPlace(Net):
        def features(self, x):
            return buffer[: len(x)].copy_(super().features(x))

    x, labels = data(50)
    assert_same(run(InPlace().eval(), x, labels), run(Net().eval(), x, labels))


def test_the_model_is_left_as_it_was():
    model, (x, labels) = Net().eval(), data()
    state, attributes = copy.deepcopy(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    probe = NCProbe(model)
    with pytest.raises(RuntimeError, match="mine"), probe:
        model(x)
        probe.update(labels)
        assert model.state_dict().keys() == state.keys()
        raise RuntimeError("mine")
    assert not model.fc._forward_pre_hooks
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    activation = weakref.ref(probe)
    clone = copy.deepcopy(model)
    report = probe.compute()
    del probe
    gc.collect()
    assert activation() is None, "the model holds the probe"
    clone(x)
    assert report.samples == 57


@pytest.mark.parametrize("arguments", [{}, {"cache_bytes": 0}], ids=str)
def test_the_second_look_is_taken_once_and_changes_nothing(monkeypatch, arguments):
    model, (x, labels) = Net().eval(), data()
    probe = NCProbe(model, layers=["stem"], **arguments)
    looks, add = [], second_pass.SecondPass.add
    monkeypatch.setattr(second_pass.SecondPass, "add", lambda self, *a: looks.append(a) or add(self, *a))
    with torch.no_grad(), probe:
        model(x[:20])
        probe.update(labels[:20])
        kept = [features.clone() for features, _ in probe.kept()]
        first = probe.compute()
        assert probe.compute() is first and len(looks) == 2 * len(kept), "at the classifier and at the layer"
        assert all(map(torch.equal, kept, [features for features, _ in probe.kept()]))
        model(x[20:])
        probe.update(labels[20:])
        assert probe.compute().samples == 57 and first.samples == 20
    assert_same(probe.compute(), run(model, x, labels, 57, layers=["stem"], **arguments))


def test_entering_and_reset_start_afresh():
    model, (x, labels) = Net().eval(), data()
    probe = NCProbe(model)
    for _ in range(2):
        with probe:
            model(x)
            probe.update(labels)
        report = probe.compute()
        assert report.samples == 57
    assert_same(report, run(model, x, labels))
    with probe:
        model(x)
        probe.update(labels).reset()
        model(x)
        probe.reset()
        model(x[:20])
        probe.update(labels[:20])
    assert probe.compute().samples == 20


def test_the_classifier_reported_is_the_one_probed():
    model, (x, labels) = Net().double().eval(), data()
    with NCProbe(model) as probe:
        model(x.double())
        probe.update(labels)
    before = probe.compute()
    with torch.no_grad():
        model.fc.weight.neg_()
    assert_same(probe.compute(), before)


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda m, p, x, y: p.update(y), "exactly one forward pass of the model, got 0 since"),
        (lambda m, p, x, y: (m(x), m(x), p.update(y)), "exactly one forward pass of the model, got 2"),
        (lambda m, p, x, y: (m(x), p.update(y), p.update(y)), "got 0"),
        (lambda m, p, x, y: (m.train(), m(x), p.update(y)), "evaluation mode, but its module '' trains"),
        (lambda m, p, x, y: (m.drop.train(), m(x), p.update(y)), "evaluation mode, but its module 'drop' trains"),
        (lambda m, p, x, y: (m(x), p.update(y[:5])), r"labels must have shape \(57,\).*got \(5,\)"),
        (lambda m, p, x, y: (m(x), p.update(y + 1)), "labels must be in 0..3, got 1..4 in batch 0"),
        (lambda m, p, x, y: (m(x), p.update(y - 1)), "labels must be in 0..3, got -1..2"),
        (lambda m, p, x, y: (m(x), p.update(y.float())), "labels must be integers"),
        (lambda m, p, x, y: (m(x), p.update(y), m(x * torch.nan), p.update(y)), "features must be finite.* in batch 1"),
        (lambda m, p, x, y: (m(x), p.update(y.to("meta"))), "labels must be dense and have values, got .* on meta"),
        (lambda m, p, x, y: (m(x), p.update(y.to_sparse())), "labels must be dense and have values, got torch.sparse"),
        (lambda m, p, x, y: (m(x), p.update(y, mask=y)), r"mask must be bool \(57,\), got torch.int64"),
        (lambda m, p, x, y: (m(x), p.update(y, mask=y[:5] > 0)), r"mask must be bool \(57,\), got torch.bool \(5,\)"),
        (lambda m, p, x, y: (m(x[:, None]), p.update(y)), r"'fc' must receive \(B, d\) where labels are \(B,\), got"),
        (lambda m, p, x, y: p.compute(), "at least one sample"),
        (lambda m, p, x, y: (m(x), p.update(y, mask=y < 0), p.compute()), "at least one sample"),
        (lambda m, p, x, y: p.__enter__(), "already attached"),
    ],
)
def test_misuse_is_one_line(use, message):
    model, (x, labels) = Net().eval(), data()
    probe = NCProbe(model)
    with torch.no_grad(), probe, pytest.raises(ValueError, match=message) as error:
        use(model, probe, x, labels)
    assert "\n" not in str(error.value)
    assert not model.fc._forward_pre_hooks


def test_a_classifier_that_is_called_twice_is_no_classifier():
    class Twice(Net):
        def forward(self, x):
            return self.fc(self.features(x)) + self.fc(self.features(-x))

    with pytest.raises(ValueError, match="got 2 through its classifier 'fc' since the last update"):
        run(Twice().eval(), *data())


def test_a_failed_update_forgets_its_forward_pass():
    model, (x, labels) = Net().eval(), data()
    with torch.no_grad(), NCProbe(model) as probe:
        model(x)
        model(x)
        with pytest.raises(ValueError, match="got 2"):
            probe.update(labels)
        model(x)
        probe.update(labels)
    assert probe.compute().samples == 57


def test_conventions_by_a_second_look_are_those_of_the_moments():
    """On imbalanced data, where the weights of classes matter."""
    model, (x, labels) = Net().double().eval(), data()
    papers = ["papyan2020", "zhu2021", "fang2021", "rhubarbwu"]
    report = run(model, x.double(), labels, conventions=papers, groups=GROUPS)
    with torch.no_grad():
        moments = ClassMoments(K, d).update(model.features(x.double()), labels)
    expected = measure(moments, model.fc.weight, model.fc.bias, conventions=papers, groups=GROUPS)
    for paper in papers:
        for name, value in expected.conventions[paper].items():
            if name not in ("nc4", "clf_ncc_agreement"):
                assert report.conventions[paper][name] == pytest.approx(value, rel=1e-10), (paper, name)
    assert report.conventions["papyan2020"]["nc4"] == pytest.approx(
        1 - run(model, x.double(), labels, center="empirical").nc4
    )


def test_weight_decay_reaches_layers_and_groups_too():
    model, (x, labels) = Net().eval(), data()
    settings = {"groups": GROUPS, "layers": ["stem"]}
    limit, finite = (run(model, x, labels, weight_decay=decay, **settings) for decay in (0, 0.05))
    for place in (lambda r: r, lambda r: r.groups["majority"], lambda r: r.layers["stem"]):
        assert place(finite).weight_decay == 0.05 and place(finite).nc2_gof != place(limit).nc2_gof
    assert finite.nc2_gof_weight != limit.nc2_gof_weight


def test_a_failed_update_counts_nothing():
    model, (x, labels) = Net().eval(), data()
    with torch.no_grad(), NCProbe(model) as probe:
        for bad in (labels + 1, labels[:5], labels.float()):
            model(x)
            with pytest.raises(ValueError):
                probe.update(bad)
        model(x)
        probe.update(labels)
    assert_same(probe.compute(), run(model, x, labels, size=57))


def test_features_and_logits_are_those_of_the_forward_pass():
    """What is overwritten before update, or later, was read as it was; of passes without update one is held."""
    model, (x, labels) = Net().double().eval(), data()
    expected = run(model, x.double(), labels, size=57, layers=["stem"])

    class Overwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            self.h = self.net.features(x)
            self.logits = self.net.fc(self.h)
            return self.logits

    outer, buffer = Overwritten().eval(), labels.clone()
    with NCProbe(outer, head="net.fc", layers=["net.stem"]) as probe:
        for _ in range(10):
            outer(x[:23].double())
        with pytest.raises(ValueError, match="got 10"):
            probe.update(labels[:23])
        for _ in range(10):
            outer(x[:23].double())
        held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 2 and len(t) == 23]
        assert len(held) < 12 and all(t.grad_fn is None for t in held if t is not outer.h and t is not outer.logits)
        probe.reset()
        outer(x.double())
        outer.h.detach().zero_(), outer.logits.detach().fill_(7)
        probe.update(buffer)
        buffer.zero_()
    assert probe.linear_error < 1e-12
    report = probe.compute()
    assert_same(report, dataclasses.replace(expected, layers={"net.stem": expected.layers["stem"]}))


def test_layers_of_float64_are_copies_too():
    class Given(Net):
        def forward(self, x):
            self.h = self.stem(x)
            return self.fc(torch.relu(self.h))

    model, (x, labels) = Given().double().eval(), data()
    expected = run(model, x.double(), labels, 57, layers=["stem"]).layers["stem"]
    with torch.no_grad(), NCProbe(model, layers=["stem"]) as probe:
        model(x.double())
        model.h.zero_()
        probe.update(labels)
    assert_same(probe.compute().layers["stem"], expected)


def test_a_batch_is_added_as_a_whole_or_not_at_all():
    class Holes(Net):
        def forward(self, x):
            self.log(x)
            return super().forward(torch.where(x.isfinite(), x, 0))

    model, (x, labels) = Holes().eval(), data()
    model.log = nn.Identity().eval()
    with torch.no_grad(), NCProbe(model, layers=["stem", "log"]) as probe:
        model(x[:30])
        probe.update(labels[:30])
        bad = x[30:].clone()
        bad[3, 2] = torch.nan
        model(bad)
        with pytest.raises(ValueError, match="layer 'log': features must be finite, got NaN or infinity in batch 1"):
            probe.update(labels[30:])
        model(x[30:])
        probe.update(labels[30:])
    assert_same(probe.compute(), run(model, x, labels, 30, layers=["stem", "log"]))


def test_a_forward_pass_that_raised_midway_leaves_nothing():
    class Raises(Net):
        def forward(self, x):
            logits = super().forward(x)
            if len(x) == 13:
                raise RuntimeError("out of memory")
            return logits

    model, (x, labels) = Raises().eval(), data()
    with torch.no_grad(), NCProbe(model, layers=["stem"]) as probe:
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x[:13])
        with pytest.raises(ValueError, match="exactly one forward pass of the model, got 0 since"):
            probe.update(labels[:13])
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x[:13])
        model(x)
        probe.update(labels)
    assert_same(probe.compute(), run(model, x, labels, 57, layers=["stem"]))


def test_gradient_checkpointing_does_not_count_a_layer_twice():
    class Checkpointed(Net):
        def features(self, x):
            return torch.relu(torch.utils.checkpoint.checkpoint(self.stem, x, use_reentrant=True))

    model, (x, labels) = Checkpointed().eval(), data()
    with NCProbe(model, layers=["stem"]) as probe:
        model(x.requires_grad_()).sum().backward()
        probe.update(labels)
    assert_same(probe.compute(), run(Net().eval(), x.detach(), labels, 57, layers=["stem"]))


def read_only(values):
    array = np.asarray(values)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.asarray, read_only, torch.Tensor.int],
    ids=["list", "tuple", "array", "read-only array", "int32"],
)
def test_labels_and_masks_as_people_have_them(kind):
    model, (x, labels) = Net().eval(), data()
    keep = torch.arange(57) % 5 > 0
    with torch.no_grad(), NCProbe(model) as probe:
        model(x)
        given = labels if kind is torch.Tensor.int else labels.tolist()
        probe.update(kind(given), mask=keep if kind is torch.Tensor.int else kind(keep.tolist()))
        model(x)
        with pytest.raises(ValueError, match="labels must be a tensor, an array or a list, got list"):
            probe.update(["cat"] * 57)
    assert_same(probe.compute(), run(model, x[keep], labels[keep], 57))


@pytest.mark.parametrize(
    "arguments", [{}, {"class_counts": [20, 18, 18, 1], "cache_bytes": 0}, {"center": "empirical"}]
)
def test_any_default_device(arguments):
    model, (x, labels) = Net().eval(), data()
    settings = {"groups": GROUPS, "layers": ["stem"], "conventions": ["papyan2020", "fang2021", "rhubarbwu"]}
    settings |= arguments | ({"class_counts": torch.bincount(labels).tolist()} if "class_counts" in arguments else {})
    expected = run(model, x, labels, **settings)
    batches = list(zip(x.split(10), labels.split(10), strict=True))
    before = torch.get_default_device()
    try:
        torch.set_default_device("meta")  # on which everything fails
        with torch.no_grad(), NCProbe(model, **settings) as probe:
            for xb, yb in batches:
                model(xb)
                probe.update(yb.tolist())
        report = probe.compute()
        assert "NC1" in str(report) and report.gram.device.type == "cpu"
        plot_grams(report), plot_angles(report)
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)
    assert_same(report, expected)


def test_a_classifier_that_was_replaced_is_told():
    model = Net().eval()
    probe = NCProbe(model)
    model.fc = nn.Linear(d, K)
    with pytest.raises(ValueError, match="classifier 'fc' must be that of the model as the probe was made"), probe:
        pass
    assert not model._forward_hooks


def test_update_outside_with():
    with pytest.raises(ValueError, match="inside `with"):
        NCProbe(Net().eval()).update(data()[1])


def test_wrong_class_counts_are_an_error():
    model, (x, labels) = Net().eval(), data()
    with pytest.raises(ValueError, match=r"class_counts is \[1, 2, 3, 4\] but the samples seen are"):
        run(model, x, labels, class_counts=[1, 2, 3, 4])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"center": "mean"}, r"center must be one of \('balanced', 'empirical'\), got 'mean'"),
        ({"weight_decay": "no"}, "weight_decay must be a finite number >= 0, got 'no'"),
        ({"cache_bytes": -1}, "cache_bytes must be at least 0, got -1"),
        ({"groups": {"a": [0, 0]}}, r"groups\['a'\] must be different classes in 0..3, got \[0, 0\]"),
        ({"groups": {"a": [4]}}, r"groups\['a'\] must be different classes in 0..3, got \[4\]"),
        ({"groups": {"a": [-1]}}, r"groups\['a'\]"),
        ({"groups": {"a": [0.5]}}, r"groups\['a'\] must be different classes in 0..3, got a list of other things"),
        ({"groups": {"a": "01"}}, r"groups\['a'\] must be different classes in 0..3, got a str of other things"),
        ({"groups": {"a": torch.tensor([False, True])}}, r"groups\['a'\] must be different classes in 0..3, got a Ten"),
        ({"groups": {"a": np.array([False, True])}}, r"groups\['a'\] must be different classes in 0..3, got a ndarray"),
        ({"groups": [[0], [1]]}, "groups must be a mapping of names to classes, got a list"),
        ({"cache_bytes": "1GB"}, "cache_bytes must be at least 0, got '1GB'"),
        ({"cache_dtype": "float16"}, "cache_dtype must be a floating-point dtype, got 'float16'"),
        ({"class_counts": "1234"}, "class_counts must be 4 numbers >= 0, got '1234'"),
        ({"head": 1}, "head must be a name or a list of names, got 1"),
        ({"class_counts": [1, 2]}, "class_counts must be 4 numbers"),
        ({"head": "stemm"}, "head must be the name of a module of Net, got 'stemm'"),
        ({"head": "drop"}, "Net.drop must be or contain an nn.Linear or a 1x1 nn.Conv2d, got Dropout without one"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NCProbe(Net(), **arguments)
    with pytest.raises(TypeError):
        NCProbe(Net(), centre="balanced")
    with pytest.raises(ValueError, match=r"^model must be an nn.Module, got .*Net'>"):
        NCProbe(Net)


@pytest.mark.parametrize("when", ["between updates", "before the second pass"])
def test_weights_that_change_within_a_pass_are_told_once(when):
    model, (x, labels) = Net().eval(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    told = pytest.warns(UserWarning, match="weights were changed between two updates of one pass")

    def update(probe):
        model(x)
        probe.update(labels)

    with NCProbe(model, cache_bytes=0) as probe:
        update(probe)
        update(probe)
        optimizer.step()
        if when == "between updates":
            with told:
                update(probe)
            optimizer.step()
            update(probe)  # which would be an error if it warned again
            probe.reset()
            update(probe)
    if when == "before the second pass":
        with probe.second_pass(), told:
            update(probe)
