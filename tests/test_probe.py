"""NCProbe on small models, against the features that the classifier received, taken by hand."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from nc_probe import ClassMoments, NCProbe, find_head, measure

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
    pooled = run(model, x, labels, groups=GROUPS, class_counts=torch.bincount(labels))
    for a, b in ((report, pooled), *((report.groups[g], pooled.groups[g]) for g in GROUPS)):
        assert b.nc1 == pytest.approx(a.nc1, rel=1e-10) and b.nc1 > 0
        assert b.class_nc1 == () and len(a.class_nc1) == len(a.classes)
        assert b.nc3 == pytest.approx(a.nc3, rel=1e-10)


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


def test_bfloat16_activations_are_measured_as_they_are():
    model, (x, labels) = Net().eval(), data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = run(model, x, labels)
        with torch.no_grad():
            h = model.features(x)
    assert h.dtype == torch.bfloat16
    means = torch.stack([h[labels == k].double().mean(0) for k in range(K)])
    assert report.class_norm == pytest.approx((means - means.mean(0)).norm(dim=1).tolist(), rel=1e-12)
    chosen = (h.double() @ model.fc.weight.double().T + model.fc.bias.double()).argmax(1)
    assert report.accuracy == pytest.approx(float((chosen == labels).double().mean()))


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
    assert unseen["nc2_norm_weight"] is not None, "the classifier has rows for them"


def test_cache_budget():
    model, (x, labels) = Net().eval(), data()
    full = run(model, x, labels, cache_bytes=57 * d * 4)
    short = run(model, x, labels, cache_bytes=57 * d * 4 - 1)
    none = run(model, x, labels, cache_bytes=0)
    assert full.nc4 == full.nc4 and full.center_accuracy == full.center_accuracy
    for report in (short, none):
        assert report.nc4 != report.nc4 and report.center_accuracy != report.center_accuracy
        assert report.class_nc4 == () and "absent: features exceed cache_bytes=" in report.nc4_source
        assert (report.nc1, report.accuracy) == (full.nc1, full.accuracy)


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


def test_entering_and_reset_start_afresh():
    model, (x, labels) = Net().eval(), data()
    probe = NCProbe(model)
    for _ in range(2):
        with probe:
            model(x)
            probe.update(labels)
        assert probe.compute().samples == 57
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
        (lambda m, p, x, y: p.update(y), "exactly one forward pass of the model, got 0 through its classifier 'fc'"),
        (lambda m, p, x, y: (m(x), m(x), p.update(y)), "exactly one forward pass of the model, got 2"),
        (lambda m, p, x, y: (m(x), p.update(y), p.update(y)), "got 0"),
        (lambda m, p, x, y: (m.train(), m(x), p.update(y)), "evaluation mode, but its module '' trains"),
        (lambda m, p, x, y: (m.drop.train(), m(x), p.update(y)), "evaluation mode, but its module 'drop' trains"),
        (lambda m, p, x, y: (m(x), p.update(y[:5])), r"labels must have shape \(57,\).*got \(5,\)"),
        (lambda m, p, x, y: (m(x), p.update(y + 1)), "labels must be in 0..3, got 1..4 in batch 0"),
        (lambda m, p, x, y: (m(x), p.update(y - 1)), "labels must be in 0..3, got -1..2"),
        (lambda m, p, x, y: (m(x), p.update(y.float())), "labels must be integers"),
        (lambda m, p, x, y: (m(x), p.update(y), m(x * torch.nan), p.update(y)), "features must be finite.* in batch 1"),
        (lambda m, p, x, y: (m(x), p.update(y, mask=y)), r"mask must be bool \(57,\), got torch.int64"),
        (lambda m, p, x, y: (m(x), p.update(y, mask=y[:5] > 0)), r"mask must be bool \(57,\), got torch.bool \(5,\)"),
        (lambda m, p, x, y: (m(x[:, None]), p.update(y)), r"'fc' must receive \(B, d\), got \(57, 1, 6\)"),
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
        ({"cache_bytes": -1}, "cache_bytes must be at least 0, got -1"),
        ({"groups": {"a": [0, 0]}}, r"groups\['a'\] must be different classes in 0..3, got \[0, 0\]"),
        ({"groups": {"a": [4]}}, r"groups\['a'\] must be different classes in 0..3, got \[4\]"),
        ({"groups": {"a": [-1]}}, r"groups\['a'\]"),
        ({"class_counts": [1, 2]}, "class_counts must be 4 numbers"),
        ({"head": "stemm"}, "head must be the name of a module of Net, got 'stemm'"),
        ({"head": "drop"}, "Net.drop must be or contain an nn.Linear, got Dropout without one"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NCProbe(Net(), **arguments)
    with pytest.raises(TypeError):
        NCProbe(Net(), centre="balanced")


class Classifier(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


@pytest.mark.parametrize(
    "model, name",
    [
        (Net(), "fc"),
        (TimmNet(), "last"),
        (nn.DataParallel(TimmNet()), "last"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), "2"),
        (Classifier(classifier=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), z=nn.Linear(1, 1)), "classifier.1"),
        (Classifier(backbone=Net(), head=nn.Linear(3, 2)), "head"),
        (nn.Linear(3, 2), ""),
    ],
)
def test_find_head(model, name):
    head = find_head(model)
    assert head.name == name
    inner = model.module if isinstance(model, nn.DataParallel) else model
    assert head.module is dict(inner.named_modules())[name]


def test_head_by_name_and_without_bias():
    model, (x, labels) = Net(num_classes=d, bias=False).eval(), data()
    assert find_head(Net(), name="stem").module.out_features == d
    assert run(model, x, labels).nc3 > 0


@pytest.mark.parametrize("found", [nn.Identity(), nn.Conv2d(3, 4, 1), (nn.Linear(3, 2), nn.Linear(3, 2))])
def test_other_heads_are_named(found):
    model = Net()
    model.get_classifier = lambda: found
    with pytest.raises(ValueError, match=rf"Net.get_classifier\(\) must be nn.Linear, got {type(found).__name__}"):
        NCProbe(model)
    with pytest.raises(ValueError, match="Conv2d must be or contain an nn.Linear"):
        NCProbe(nn.Conv2d(3, 4, 1))
