"""The second look in float32: right to 1e-6, its decisions those of float64, and refused where a witness says so."""

import copy
import math
from fractions import Fraction

import oracles_nc
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nc_probe import NCProbe, OODProbe, pass_sums
from nc_probe.moments import precision
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.class_sums import ClassSums
from nc_probe.moments.precision import float32_has_all_bits
from nc_probe.moments.witness import WitnessRows, relative_error
from nc_probe.plots import plot_angles, plot_classes, plot_grams

K, d, N = 6, 24, 4800
GROUPS = {"many": [0, 1, 2], "few": [3, 4, 5]}


def problem(*, spread=1.0, offset=0.0, merged=0.0, outside=0.0, first=0):
    """Features (N, d) float32 of 10 : 1 class counts; the last three means are `merged` apart, if it is not 0.

    outside: how many times larger the standard deviation is in 12 of the directions, where all means are alike, of
    classes from `first` on.
    """
    gen = torch.Generator().manual_seed(0)
    means = torch.randn(K, d, generator=gen, dtype=torch.float64)
    if merged:
        means[3:] = means[3] + merged * means[3:]
    if outside:
        means[:, 12:] = 0
    labels = torch.cat([torch.arange(3).repeat_interleave(1440), 3 + torch.arange(3).repeat_interleave(160)])
    labels = labels[torch.randperm(N, generator=gen)]
    noise = spread * torch.randn(N, d, generator=gen, dtype=torch.float64)
    if outside:  # and means stay alike there
        for k in range(K):
            noise[labels == k, 12:] -= noise[labels == k, 12:].mean(0)
        noise[:, 12:] *= torch.where(labels >= first, outside, 1.0)[:, None]
        turn = torch.linalg.qr(torch.randn(d, d, generator=gen, dtype=torch.float64)).Q
        means, noise = means @ turn, noise @ turn
    head = torch.nn.Linear(d, K).eval()
    head.weight.data = means.float() + 0.1 * torch.randn(K, d, generator=gen)
    head.bias.data = torch.randn(K, generator=gen)
    return (means[labels] + noise + offset).float(), labels, head


def probed(x, labels, head, size=300, **arguments):
    with torch.no_grad(), NCProbe(head, groups=GROUPS, **arguments) as probe:
        for xb, yb in zip(x.split(size), labels.split(size), strict=True):
            head(xb)
            probe.update(yb)
    return probe


def in_float64(x, labels, head, **arguments):
    return probed(x.double(), labels, head.double(), **arguments).compute()


@pytest.mark.parametrize(
    "settings",
    [{}, {"spread": 1e-3}, {"spread": 1e-3, "merged": 1e-4, "offset": 100.0}, {"spread": 0.3, "offset": 1e4}],
    ids=["far", "collapsed", "merged", "offset"],
)
def test_every_number_is_that_of_float64(settings):
    x, labels, head = problem(**settings)
    probe = probed(x, labels, head, conventions=["papyan2020", "zhu2021"])
    got = probe.compute()
    assert got.nc1_precision == "float32"
    arrays = [t.detach().double().numpy() for t in (x, head.weight, head.bias)]
    arrays.insert(1, labels.numpy())
    expected = in_float64(x, labels, head, conventions=["papyan2020", "zhu2021"])
    assert expected.nc1_precision == "float64"
    exact = oracles_nc.report(*arrays)
    assert expected.nc1 == pytest.approx(exact["nc1"], rel=1e-6 if settings.get("merged") else 1e-9)
    for a, b in [(got, expected), *zip(got.groups.values(), expected.groups.values(), strict=True)]:
        for name, value in b.as_dict(per_class=True).items():
            if name.endswith(("accuracy", "nc4")):
                assert a.as_dict(per_class=True)[name] == value, name
            elif isinstance(value, float):
                close = 1e-6 if name in ("nc1", "nc1_trace", "cdnv", "mean_square_norm") else 1e-10
                assert getattr(a, name) == pytest.approx(value, rel=close, abs=1e-12), name
        assert a.class_nc1 == pytest.approx(b.class_nc1, rel=1e-6)
        assert a.class_variance == pytest.approx(b.class_variance, rel=1e-6)
    for paper in ("papyan2020", "zhu2021"):
        assert got.conventions[paper]["nc1"] == pytest.approx(expected.conventions[paper]["nc1"], rel=1e-6)


@pytest.mark.parametrize(
    "switch, value, before",
    [
        (torch.set_float32_matmul_precision, "medium", "highest"),
        (torch.set_float32_matmul_precision, "high", "highest"),
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_default_dtype, torch.bfloat16, torch.float32),
        (torch.use_deterministic_algorithms, True, False),
    ],
    ids=["medium", "high", "double", "bfloat16", "deterministic"],
)
def test_what_is_set_for_all_of_torch_changes_no_number(switch, value, before):
    assert float32_has_all_bits(torch.device("cpu"))
    x, labels, head = problem(spread=0.3, offset=100.0)
    expected = in_float64(x, labels, copy.deepcopy(head), conventions=["zhu2021"])
    try:
        switch(value)
        probe = probed(x, labels, head, conventions=["zhu2021"])
        got = probe.compute()
        with torch.no_grad(), OODProbe(probe) as ood:
            head(x.flip(1))
            scores = ood.update().compute()
        assert str(got) and str(scores) and plot_grams(got) and plot_angles(got) and plot_classes(got)
    finally:
        switch(before)
    assert (got.nc4, got.class_accuracy) == (expected.nc4, expected.class_accuracy)
    assert got.class_center_accuracy == expected.class_center_accuracy
    assert got.class_nc1 == pytest.approx(expected.class_nc1, rel=1e-6) and scores.known == N
    for name, number in expected.scalars().items():
        assert got.scalars()[name] == pytest.approx(number, rel=1e-6, abs=1e-12), name


def test_float32_is_used_only_where_its_products_have_all_bits(monkeypatch):
    """Whatever the reason, such as a variable of the environment that oneDNN reads on ARM."""
    precision._products_are_exact.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which the probe turns off
        assert float32_has_all_bits(torch.device("cpu"))
    monkeypatch.setattr(precision, "_product", lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    precision._products_are_exact.cache_clear()
    try:
        assert not float32_has_all_bits(torch.device("cpu"))
        x, labels, head = problem()
        assert probed(x, labels, head).compute().nc1_precision == "float64"
    finally:
        precision._products_are_exact.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_without_samples_change_no_number(dtype):
    """Those between others, of which the second look holds nothing."""
    x, labels, head = problem(spread=1.5)
    x, head = x.to(dtype), head.to(dtype)
    sparse = torch.nn.Linear(d, 3 * K, dtype=dtype).eval()
    sparse.weight.data.zero_()
    sparse.bias.data.fill_(-1e6)
    sparse.weight.data[2::3], sparse.bias.data[2::3] = head.weight.data, head.bias.data
    groups = {"few": [11, 14, 17, 0]}
    with torch.no_grad(), NCProbe(sparse, groups=groups) as probe:
        for xb, yb in zip(x.split(300), labels.split(300), strict=True):
            sparse(xb)
            probe.update(3 * yb + 2)
    got, expected = probe.compute(), probed(x, labels, head).compute()
    assert got.classes == (2, 5, 8, 11, 14, 17) and got.nc1_precision == str(dtype)[6:] and expected.nc4 < 1
    for a, b in ((got, expected), (got.groups["few"], expected.groups["few"])):
        assert (a.nc4, a.class_accuracy, a.class_center_accuracy) == (b.nc4, b.class_accuracy, b.class_center_accuracy)
        assert a.class_nc1 == pytest.approx(b.class_nc1, rel=1e-12) and a.cdnv == pytest.approx(b.cdnv, rel=1e-12)


@pytest.mark.parametrize("outside", [30.0, 1e3, 1e4])
def test_a_witness_sends_variance_outside_the_span_to_float64(outside):
    x, labels, head = problem(outside=outside, spread=0.01)
    got = probed(x, labels, head).compute()
    assert outside < 1e4 or got.nc1_precision == "float64" == got.groups["few"].nc1_precision
    x, W, b = (t.detach().double().numpy() for t in (x, head.weight, head.bias))
    assert got.nc1 == pytest.approx(oracles_nc.report(x, labels.numpy(), W, b)["nc1"], rel=1e-6)
    for name, classes in GROUPS.items():
        expected = oracles_nc.report(x, labels.numpy(), W, b, classes=classes)
        assert got.groups[name].nc1 == pytest.approx(expected["nc1"], rel=1e-6)


def test_one_rare_group_is_enough_for_a_witness():
    """Only the rare classes vary outside: a part of them, drawn from all samples alike, could be a few rows."""
    x, labels, head = problem(outside=1e5, spread=0.01, first=5)
    assert probed(x, labels, head).compute().nc1_precision == "float64"


def test_batches_do_not_matter():
    x, labels, head = problem()
    reports = [probed(x, labels, head, size=size).compute() for size in (4800, 7, 600)]
    assert all(math.isclose(report.nc1, reports[0].nc1, rel_tol=1e-12) for report in reports)
    assert len({report.nc4 for report in reports}) == 1


def test_few_samples_are_measured_in_float64():
    x, labels, head = problem()
    assert probed(x[:4000], labels[:4000], head).compute().nc1_precision == "float64"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarser_features(dtype):
    x, labels, head = problem()
    x = x.to(dtype)
    model = torch.nn.Sequential(torch.nn.Identity(), head.to(dtype)).eval()
    got = probed(x, labels, model).compute()
    expected = in_float64(x, labels, torch.nn.Sequential(torch.nn.Identity(), head).eval())
    assert got.nc1_precision == "float32" and got.nc1 == pytest.approx(expected.nc1, rel=1e-6)
    assert (got.nc4, got.class_accuracy) == (expected.nc4, expected.class_accuracy)


def test_a_mean_halfway_is_decided_in_float64():
    """Samples on the bisector of two means, moved by less than float32 can tell apart at their size."""
    x, labels, head = problem(spread=1e-3)
    means = torch.stack([x[labels == k].double().mean(0) for k in range(K)])
    towards = torch.linspace(-1e-6, 1e-6, 200).double()[:, None] * (means[1] - means[0])
    x = torch.cat([x, ((means[0] + means[1]) / 2 + towards).float()])
    labels = torch.cat([labels, torch.arange(200) % 2])
    got, expected = probed(x, labels, head).compute(), in_float64(x, labels, head)
    assert got.nc1_precision == "float32"
    assert got.class_center_accuracy == expected.class_center_accuracy and 0 < got.class_center_accuracy[0] < 1


def not_witnessed(labels, k):
    """Indices of samples of class k that are none of the witness's rows."""
    shown = WitnessRows(labels)
    shown.show(torch.arange(N)[:, None])
    unseen = torch.ones(N, dtype=torch.bool).index_fill_(0, shown.features()[:, 0], False)
    return ((labels == k) & unseen).nonzero()[:, 0]


@pytest.mark.parametrize("many", [20, 600])
@pytest.mark.parametrize("spread, outside", [(0.01, 1e4), (0.3, 1e5)])
def test_a_few_samples_far_outside_of_the_span_are_told_by_their_norms(spread, outside, many):
    """Where none of them is one of those that the witness looks at."""
    x, labels, head = problem(spread=spread)
    rows = not_witnessed(labels, 0)[:many]
    means = torch.stack([x[labels == k].double().mean(0) for k in range(K)])
    span = torch.linalg.qr((means - means.mean(0)).T).Q[:, : K - 1]
    noise = torch.randn(many // 2, d, generator=torch.Generator().manual_seed(1)).double()
    far = outside * torch.nn.functional.normalize(noise - noise @ span @ span.T)
    x[rows] += torch.cat([far, -far]).float()
    got, expected = probed(x, labels, head).compute(), in_float64(x, labels, head)
    assert got.nc1 == pytest.approx(expected.nc1, rel=1e-6)
    assert got.class_nc1 == pytest.approx(expected.class_nc1, rel=1e-6)


@pytest.mark.parametrize("outside", [1e5, 3e5])
def test_decisions_allow_for_the_rounding_of_what_is_outside_of_the_span(outside, monkeypatch):
    """Samples about half the way to another mean: taken for their own at once, or by scores, too soon."""
    monkeypatch.setattr(pass_sums, "TOLERANCE", math.inf)  # or their norms send all to float64
    x, labels, head = problem(spread=0.1)
    rows, steps = not_witnessed(labels, 0)[:600], torch.linspace(-1e-3, 1e-3, 300).double()[:, None]
    noise = torch.randn(300, d, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(9):  # until the means, which these samples move, stay where they are
        means = torch.stack([x[labels == k].double().mean(0) for k in range(K)])
        span = torch.linalg.qr((means - means.mean(0)).T).Q[:, : K - 1]
        far = outside * torch.nn.functional.normalize(noise - noise @ span @ span.T)
        half = means[0] + (0.5 + steps) * (means[5] - means[0])  # of which no other mean is nearer
        x[rows] = torch.cat([half + far, half - far]).float()
    report = probed(x, labels, head).compute()
    assert report.nc1_precision == "float32"
    y = x.double()
    means = torch.stack([y[labels == k].mean(0) for k in range(K)])
    nearest = torch.stack([(y - mean).square().sum(1) for mean in means]).argmin(0)
    own = [float((nearest == k)[labels == k].double().mean()) for k in range(K)]
    assert report.class_center_accuracy == tuple(own) and own[0] < 1


def test_rows_of_a_witness_are_of_every_class():
    labels = torch.cat([torch.arange(3).repeat_interleave(5000), torch.full((2,), 3), torch.full((700,), 5)])
    x = torch.arange(len(labels))[:, None].float()
    rows = WitnessRows(labels)
    for part in x.split(33):
        rows.show(part)
    features = rows.features()
    assert torch.equal(labels[features[:, 0].long()], rows.labels)
    assert torch.bincount(rows.labels).tolist() == [102, 102, 102, 2, 0, 102]
    gaps = features[rows.labels == 1, 0].diff()
    assert gaps.min() >= 49 and gaps.max() <= 50, "spread over the class"
    assert WitnessRows(labels[:0]).features() is None
    assert len(WitnessRows(torch.arange(30_000)).labels) <= 1024


def test_relative_error_of_sums():
    sums = torch.tensor([[1.0, 0.0, 100.0], [-1.0, 4.0, 100.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]).double()
    assert relative_error(sums).tolist() == pytest.approx([0.01, 0.05, 0, math.inf])


def test_class_sums_of_float32_are_exact_about_a_large_offset():
    """1e4 + ..., in float32: sums of integers of 2^-10, which float64 holds to the last bit."""
    gen = torch.Generator().manual_seed(0)
    x, labels = 1e4 + torch.randn(500, 3, generator=gen), torch.randint(0, 4, (500,), generator=gen)
    sums = ClassSums(ClassMoments(4, 3, scatter=False))
    for part in torch.arange(500).split(7):
        sums.check(x[part], labels[part])
        sums.update(x[part], labels[part])
    exact = [[sum(map(Fraction, column)) / len(column) for column in x[labels == k].T.tolist()] for k in range(4)]
    found = sums.moments().mean.tolist()
    assert all(float(e) == f for row, of in zip(exact, found, strict=True) for e, f in zip(row, of, strict=True))


def test_class_sums_about_a_large_offset():
    gen = torch.Generator().manual_seed(0)
    x, labels = 1e8 + torch.randn(500, 3, generator=gen).double(), torch.randint(0, 4, (500,), generator=gen)
    sums = ClassSums(ClassMoments(5, 3, scatter=False))
    for part in torch.arange(500).split(7):
        sums.check(x[part], labels[part])
        sums.update(x[part], labels[part])
    moments = sums.moments()
    assert moments.count.tolist() == [*torch.bincount(labels).tolist(), 0] and not moments.mean[4].any()
    exact = torch.stack([(x[labels == k] - 1e8).mean(0) for k in range(4)])
    assert (moments.mean[:4] - 1e8 - exact).abs().max() < 2e-8  # the rounding of 1e8
    sums.reset()
    assert sums.moments().count.sum() == 0


def _rank(rank, world, path, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    reports = []
    for settings in ({}, {"outside": 1e5, "spread": 0.01, "first": 5}):
        x, labels, head = problem(**settings)
        mine = labels < 4 if rank == 0 else labels >= 4  # class 5 is on one rank alone
        reports.append(probed(x[mine], labels[mine], head).compute().as_dict(per_class=True))
    torch.save(reports, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_ranks_decide_alike(tmp_path):
    mp.spawn(_rank, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second and [report["nc1_precision"] for report in first] == ["float32", "float64"]
    x, labels, head = problem()
    expected = in_float64(x, labels, head)
    assert first[0]["nc1"] == pytest.approx(expected.nc1, rel=1e-6) and first[0]["nc4"] == expected.nc4
