"""CollapseReport: what goes into it, groups, JSON, the table, the picture; `measure` itself is in test_measures.py."""

import dataclasses
import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nc_probe import Agreement, ClassMoments, CollapseReport, measure, simplex_etf
from nc_probe.measures import formulas
from nc_probe.measures.pairwise import cosine_gram, gram_distance, mean_cosine
from nc_probe.plots import plot_grams

K, d = 5, 7
GROUPS = {"majority": [0, 1], "minority": (4, 2, 3), "none": []}


def example(center="balanced", weight=True, **arguments):
    gen = torch.Generator().manual_seed(0)
    counts = torch.tensor([40, 40, 5, 5, 5])
    labels = torch.arange(K).repeat_interleave(counts)
    x = 3 + torch.randn(K, d, generator=gen).double()[labels] + torch.randn(95, d, generator=gen).double()
    W, b = torch.randn(K, d, generator=gen), torch.randn(K, generator=gen)
    moments = ClassMoments(K, d).update(x, labels)
    report = measure(moments, W if weight else None, b if weight else None, center=center, groups=GROUPS, **arguments)
    return report, x, labels, W.double(), b.double()


def test_global_centre_and_weighting():
    for center in ("balanced", "empirical"):
        report, x, labels, W, _ = example(center)
        mu = torch.stack([x[labels == k].mean(0) for k in range(K)])
        M = mu - (mu.mean(0) if center == "balanced" else x.mean(0))
        assert report.class_norm == pytest.approx(M.norm(dim=1).tolist())
        within = torch.stack([(x[labels == k] - mu[k]).square().sum(1).mean() for k in range(K)])
        pi = torch.full((K,), 1 / K).double() if center == "balanced" else torch.bincount(labels).double() / 95
        assert report.nc1_trace == pytest.approx(float(pi @ within / (pi @ M.square().sum(1))))
        assert report.class_variance == pytest.approx(within.tolist())
        assert report.nc3 == pytest.approx(formulas.self_duality(W, M))
        assert report.nc2 == report.nc2_etf == pytest.approx(gram_distance(M, simplex_etf(K)))
        assert report.nc2_etf_weight == pytest.approx(gram_distance(W, simplex_etf(K)))
        torch.testing.assert_close(report.means, M)
        torch.testing.assert_close(report.weight, W)
        torch.testing.assert_close(report.gram, cosine_gram(M))
        torch.testing.assert_close(report.gram_weight, cosine_gram(W))


def test_groups_take_their_classes_about_the_global_centre():
    report, x, labels, W, _ = example()
    group = report.groups["minority"]
    mu = torch.stack([x[labels == k].mean(0) for k in range(K)])
    M = (mu - mu.mean(0))[2:]
    assert group.classes == (2, 3, 4) and group.samples == 15 and group.class_count == (5, 5, 5)
    S_W = sum((x[labels == k] - mu[k]).T @ (x[labels == k] - mu[k]) / 5 for k in (2, 3, 4)) / 3
    S_B = M.T @ M / 3
    # rank 3 in 7 dimensions, well conditioned: a plain pseudo-inverse will do
    assert group.nc1 == pytest.approx(float(torch.trace(S_W @ torch.linalg.pinv(S_B))) / 3, rel=1e-9)
    assert group.nc1_rank == 3
    assert group.nc2_etf == pytest.approx(gram_distance(M, simplex_etf(K, size=3)))
    assert group.nc2_etf_weight == pytest.approx(gram_distance(W[2:], simplex_etf(K, size=3)))
    assert group.mean_cosine == pytest.approx(mean_cosine(M))
    assert group.nc3 == pytest.approx(formulas.self_duality(W[2:], M))


def test_group_of_all_classes_is_the_whole():
    gen = torch.Generator().manual_seed(1)
    x, labels, W = torch.randn(90, d, generator=gen), torch.arange(90) % K, torch.randn(K, d, generator=gen)
    report = measure(ClassMoments(K, d).update(x, labels), W, groups={"all": range(K)})
    of_all = {"groups": {}, "feature_rank": None, "stable_rank": None, "participation_ratio": None}
    assert report.groups["all"].as_dict(per_class=True) == {**report.as_dict(per_class=True), **of_all}


def test_class_means_are_classified_with_the_bias():
    moments = ClassMoments(3, 3).update(torch.eye(3), torch.arange(3))
    groups = {"first": [0, 1]}
    assert measure(moments, torch.eye(3)).mean_accuracy == 1
    report = measure(moments, torch.eye(3), torch.tensor([0.0, 0.0, 2.0]), groups=groups)
    assert report.mean_accuracy == pytest.approx(1 / 3) and report.groups["first"].mean_accuracy == 0


def test_agreement_is_shared_out():
    rows = torch.tensor([[40, 20, 5, 0, 5], [40, 40, 4, 0, 5], [40, 20, 4, 5, 5]])
    counts = Agreement(*rows, "here")
    balanced, empirical = example(agreement=counts)[0], example("empirical", agreement=counts)[0]
    assert balanced.accuracy == empirical.accuracy == 70 / 95
    assert balanced.balanced_accuracy == pytest.approx((1 + 0.5 + 1 + 0 + 1) / 5)
    assert balanced.center_accuracy == 89 / 95 and balanced.balanced_center_accuracy == pytest.approx(3.8 / 5)
    assert balanced.nc4 == pytest.approx((1 + 0.5 + 0.8 + 1 + 1) / 5) and empirical.nc4 == pytest.approx(74 / 95)
    assert balanced.groups["minority"].accuracy == 10 / 15 and balanced.groups["majority"].nc4 == pytest.approx(0.75)
    assert math.isnan(balanced.groups["none"].accuracy) and balanced.nc4_source == "here"


def test_json_is_finite_and_complete():
    for report in (example()[0], example(weight=False)[0]):
        for per_class in (False, True):
            text = json.dumps(report.as_dict(per_class=per_class), allow_nan=False)
            again = json.loads(text)
            assert again["nc1"] == report.nc1 and again["groups"]["none"]["nc1"] is None
            assert ("class_norm" in again) == ("gram" in again) == per_class
    again = example()[0].as_dict(per_class=True)
    assert again["gram"][2][2] == pytest.approx(1) and len(again["class_nc1"]) == K
    names = {f.name for f in dataclasses.fields(CollapseReport)}
    assert set(again) == names - {"means", "weight"} | {"gram", "gram_weight"}
    assert "means=" not in repr(example()[0])


def nested(**arguments):
    """A report with everything in it."""
    report = example(conventions=["papyan2020", "fang2021"], **arguments)[0]
    parts = {"layers": {"layer4.1": example(weight=False)[0]}, "iterates": {"z*": report}, "heads": {"a/b": report}}
    return dataclasses.replace(report, cdnv=math.inf, gnc2_log=-math.inf, **parts)


def same(a, b):
    """Whether two reports are equal in every field, NaN being NaN."""
    for f in dataclasses.fields(CollapseReport):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y) and x.dtype == y.dtype, f.name
        elif f.name in ("groups", "heads", "layers", "iterates"):
            assert list(x) == list(y)
            for name in x:
                same(x[name], y[name])
        else:
            assert repr(x) == repr(y), f.name  # types too, and NaN is nan


@pytest.mark.parametrize("weight", [True, False])
def test_a_report_is_loaded_as_it_was_saved(tmp_path, weight):
    report = nested(weight=weight)
    report.save(tmp_path / "report.json")
    again = CollapseReport.load(str(tmp_path / "report.json"))
    same(report, again)
    assert str(again) == str(report) and again.as_dict(per_class=True) == report.as_dict(per_class=True)
    assert report.as_dict()["infinite"] == ["cdnv", "gnc2_log"] and "infinite" not in again.as_dict()["groups"]["none"]
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    """A full disk, which says so in the middle of a file; and a link goes on pointing to it."""
    path, link = tmp_path / "report.json", tmp_path / "link.json"
    nested().save(path)
    link.symlink_to(path)
    before, write = path.read_text(), Path.write_text

    def full(self, text, **settings):
        write(self, text[: len(text) // 2], **settings)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for target in (path, link):
        with pytest.raises(OSError, match="No space left"):
            nested(weight=False).save(target)
    assert path.read_text() == before and {file.name for file in tmp_path.iterdir()} == {"report.json", "link.json"}
    monkeypatch.undo()
    nested(weight=False).save(link)
    assert link.is_symlink() and CollapseReport.load(path).weight is None


def test_reports_of_an_older_version_load(tmp_path):
    report, path = nested(), tmp_path / "report.json"
    report.save(path)
    document = json.loads(path.read_text())
    for part in (document["report"], document["report"]["groups"]["minority"]):
        del part["nc1_unresolved"], part["nc2_seli"], part["heads"]
    path.write_text(json.dumps(document))
    again = CollapseReport.load(path)
    assert again.nc1 == report.nc1 and math.isnan(again.nc2_seli) and again.heads == {}


@pytest.mark.parametrize(
    "text, got",
    [
        ("{", "format None, version None"),
        ("[1]", "format None, version None"),
        ('{"nc1": 3}', "format None, version None"),
        ('{"format": "nc_probe.CollapseReport", "version": 99}', "format 'nc_probe.CollapseReport', version 99"),
        ('{"format": "other", "version": 1}', "format 'other', version 1"),
        ('{"format": "nc_probe.CollapseReport", "version": true}', "format 'nc_probe.CollapseReport', version True"),
        ('{"format": "nc_probe.CollapseReport", "version": 0}', "format 'nc_probe.CollapseReport', version 0"),
    ],
)
def test_files_that_are_no_report(tmp_path, text, got):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(
        ValueError, match=f"x.json must be a nc_probe.CollapseReport of version 1..1, got {got}"
    ) as error:
        CollapseReport.load(tmp_path / "x.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.pop("classes"),
        lambda report: report.update(nc1="much"),
        lambda report: report.update(samples="12"),
        lambda report: report.update(class_norm=["a"]),
        lambda report: report.update(nc1=[0.5]),
        lambda report: report.update(class_norm=0.5),
        lambda report: report.update(feature_rank="3"),
        lambda report: report.update(samples=True),
        lambda report: report.update(groups=[1]),
        lambda report: report["groups"]["minority"].update(center=None),
        lambda report: report["means"].update(float64=report["means"]["float64"][:-4]),
        lambda report: report["means"].update(shape=[2, 2]),
        lambda report: report.clear(),
    ],
)
def test_damaged_reports(tmp_path, change):
    nested().save(tmp_path / "x.json")
    document = json.loads((tmp_path / "x.json").read_text())
    change(document["report"])
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="x.json must hold a whole report, got a damaged one: ") as error:
        CollapseReport.load(tmp_path / "x.json")
    assert "\n" not in str(error.value)


def test_scalars_for_trackers():
    report = nested()
    found = report.scalars("nc/")
    assert found["nc/nc1"] == report.nc1 and found["nc/minority/nc1"] == report.groups["minority"].nc1
    assert found["nc/layers/layer4.1/nc2_etf"] == report.layers["layer4.1"].nc2 and found["nc/cdnv"] == math.inf
    assert found["nc/conventions/papyan2020/nc1"] == report.conventions["papyan2020"]["nc1"]
    assert found["nc/iterates/z*/majority/samples"] == 80 and "nc/heads/a/b/nc3" in found
    assert all(type(value) is float and not math.isnan(value) for value in found.values())
    assert "nc/nc4" not in found and "nc/none/nc1" not in found and set(report.scalars()) == {n[3:] for n in found}


def test_grams_of_many_classes_are_not_for_json():
    labels = torch.arange(101)
    report = measure(ClassMoments(101, 3).update(torch.randn(101, 3), labels), None, groups={"most": range(100)})
    again = report.as_dict(per_class=True)
    assert "gram" not in again and len(again["groups"]["most"]["gram"]) == 100
    assert report.gram.shape == (101, 101) and report.gram_weight is None


def test_reports_of_other_features_are_nested():
    report = example()[0]
    inner = {"layer2": example(weight=False)[0], "a name that is far too long for one column of any table": report}
    whole = dataclasses.replace(report, layers=inner, iterates={"step 1": report}, heads={"aux": report})
    again = json.loads(json.dumps(whole.as_dict(), allow_nan=False))
    assert again["layers"]["layer2"]["nc1"] == inner["layer2"].nc1 and again["layers"]["layer2"]["nc3"] is None
    assert again["iterates"]["step 1"]["groups"]["minority"]["nc1"] == report.groups["minority"].nc1
    assert again["heads"]["aux"]["nc2_seli"] == report.nc2_seli
    lines = str(whole).splitlines()
    row = next(line for line in lines if line.startswith("layer2")).split()
    assert row[:2] == ["layer2", f"{report.nc1:.4g}"] and row[-1] == "-"
    assert max(map(len, lines)) <= 80 and not any(line != line.rstrip() for line in lines)


def test_absent_classifier_is_absent_not_zero():
    report = example(weight=False)[0].as_dict()
    for name in ("nc3", "nc3_cosine", "nc4", "nc2_etf_weight", "nc2_norm_weight", "accuracy", "mean_accuracy"):
        assert report[name] is None, name
    assert report["nc1"] > 0


@pytest.mark.parametrize("offset", [0.1, 1e3])
def test_what_rests_on_means_that_coincide_is_absent(offset):
    """Permuted samples have equal means but for rounding, of which cosines and NC3 would be made."""
    gen = torch.Generator().manual_seed(0)
    arms = offset + torch.randn(9, d, generator=gen).double()
    x = torch.cat([arms[torch.randperm(9, generator=gen)] for _ in range(3)])
    report = measure(ClassMoments(3, d).update(x, torch.arange(3).repeat_interleave(9)), torch.randn(3, d))
    absent = ("nc1", "nc1_trace", "nc2_etf", "nc2_norm", "nc2_angle", "mean_cosine", "gnc2_log", "nc3", "nc3_cosine")
    assert all(math.isnan(getattr(report, name)) for name in absent)
    assert report.class_norm == (0, 0, 0) and all(map(math.isnan, report.class_nc3_cosine)) and report.cdnv == math.inf
    assert report.nc2_norm_weight > 0 and report.feature_rank == d


def test_report_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        example()[0].nc1 = 0  # pyright: ignore[reportAttributeAccessIssue]


def test_table():
    report = example()[0]
    lines = str(report).splitlines()
    assert lines[0].split() == ["all", "majority", "minority", "none"]
    assert lines[1].split() == ["classes", "5", "2", "3", "0"]
    assert lines[2].split() == ["samples", "95", "80", "15", "0"]
    values = lines[3].removeprefix("NC1  tr(S_W S_B^+)/K").split()
    expected = [report.nc1, report.groups["majority"].nc1, report.groups["minority"].nc1]
    assert [float(v) for v in values[:3]] == pytest.approx(expected, rel=1e-3) and values[3] == "-"
    assert [line for line in lines if line.startswith("center balanced; NC1 of rank 4, condition ")]
    assert lines[-1].startswith("features: rank 7, stable rank ")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"center": "median"}, "center must be one of"),
        ({"weight": torch.zeros(K, d + 1)}, r"weight must have shape \(5, 7\).*got \(5, 8\)"),
        ({"bias": torch.zeros(K + 1)}, r"bias must have shape \(5,\), got \(6,\)"),
        ({"groups": {"g": [1, 7]}}, r"groups\['g'\] must be different classes in 0..4, got \[1, 7\]"),
        ({"moments": ClassMoments(K, d)}, "at least one sample"),
    ],
)
def test_bad_arguments(arguments, message):
    moments = arguments.pop("moments", ClassMoments(K, d).update(torch.zeros(1, d), torch.tensor([0])))
    weight, bias = arguments.pop("weight", torch.zeros(K, d)), arguments.pop("bias", None)
    with pytest.raises(ValueError, match=message):
        measure(moments, weight, bias, **arguments)


def test_table_of_many_groups_goes_on_below():
    groups = {f"a group with the number {i}": [i % K, (i + 1) % K] for i in range(12)}
    x, labels = torch.randn(50, d), torch.arange(50) % K
    report = measure(ClassMoments(K, d).update(x, labels), torch.randn(K, d), groups=groups)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"{group.nc1:.4g}" in text for group in report.groups.values())
    assert text.count("NC1  tr(S_W S_B^+)/K") > 1 and all(name in text for name in groups)


def test_one_class_and_one_sample():
    report = measure(ClassMoments(K, d).update(torch.ones(1, d), torch.tensor([3])), torch.ones(K, d))
    assert report.classes == (3,) and report.samples == 1
    assert all(math.isnan(v) for v in (report.nc1, report.cdnv, report.nc2_etf, report.nc2_norm, report.mean_cosine))
    assert math.isnan(report.nc2_seli_weight) and math.isnan(report.stable_rank) and report.feature_rank == 0
    json.dumps(report.as_dict(per_class=True), allow_nan=False)
    str(report)


@pytest.mark.parametrize("center", ["balanced", "empirical"])
@pytest.mark.parametrize("features", [1, 2, 6])
@pytest.mark.parametrize("counts", [[4], [1], [4, 1], [0, 3, 0], [1, 0, 1], [1, 1, 1], [5, 0, 1, 1]])
def test_what_few_classes_and_samples_leave_undefined_is_no_exception(center, features, counts):
    many, labels = len(counts), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x = torch.randn(len(labels), features, generator=torch.Generator().manual_seed(0))
    moments = ClassMoments(many, features).update(x, labels)
    groups = {"first": [0], "last": [many - 1], "all": range(many), "none": []}
    papers = ("papyan2020", "zhu2021", "fang2021")
    for weight in (torch.randn(many, features), torch.zeros(many, features), None):
        report = measure(moments, weight, center=center, groups=groups, conventions=papers)
        json.dumps(report.as_dict(per_class=True), allow_nan=False)
        assert len(str(report)) > 0 and report.samples == sum(counts)
        if sum(n > 0 for n in counts) < 2:
            assert all(math.isnan(v) for v in (report.nc1, report.cdnv, report.nc2_seli, report.gnc2_log))
        else:
            assert report.nc2_seli >= 0 and report.cdnv >= 0


def test_grams_are_drawn_in_the_order_of_groups(tmp_path):
    report = example()[0]
    figure = plot_grams(report, class_names=["cat", "dog", "ship", "truck", "horse"], title="digits")
    left, _, bar = figure.axes
    assert [t.get_text() for t in left.get_xticklabels()] == ["cat", "dog", "ship", "truck", "horse"]
    other = measure(ClassMoments(K, d).update(torch.randn(50, d), torch.arange(50) % K), None, groups={"few": [3, 1]})
    (only, _) = plot_grams(other).axes
    assert [t.get_text() for t in only.get_yticklabels()] == ["1", "3", "0", "2", "4"]
    drawn = torch.as_tensor(only.images[0].get_array().data)
    order = torch.tensor([1, 3, 0, 2, 4])
    torch.testing.assert_close(drawn, other.gram[order][:, order])
    assert only.images[0].norm.vmax == 1 and figure.axes[-1].get_ylim() == (-1, 1)
    figure.savefig(tmp_path / "gram.png")
    assert (tmp_path / "gram.png").stat().st_size > 10_000


def test_grams_without_the_classes_that_have_no_samples():
    labels = torch.tensor([0, 3, 4]).repeat(9)
    W = torch.randn(K, d)
    report = measure(ClassMoments(K, d).update(torch.randn(27, d), labels), W, groups={"some": [4, 1, 0]})
    assert len(report.class_norm_weight) == 3 and report.nc2_norm_weight == pytest.approx(
        formulas.equinorm(W[[0, 3, 4]].double())
    )
    assert plot_grams(report).axes[0].get_yticklabels()[2].get_text() == "3"
    _, right, _ = plot_grams(report.groups["some"]).axes
    cosine = torch.nn.functional.cosine_similarity(W[0], W[4], dim=0)
    assert float(right.images[0].get_array()[0, 1]) == pytest.approx(float(cosine), rel=1e-5)


def test_plot_errors():
    with pytest.raises(ValueError, match="must hold class means"):
        plot_grams(example()[0].groups["none"])
    with pytest.raises(ValueError, match="class_names must name 5 classes, got 2"):
        plot_grams(example()[0], class_names=["a", "b"])


def test_import_needs_torch_alone():
    """The package imports without the rest, and says that matplotlib is missing when a picture is asked for."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'timm', 'accelerate']))\n"
        "import torch, nc_probe, nc_probe.plots\n"
        "r = nc_probe.measure(nc_probe.ClassMoments(2, 2).update(torch.eye(2), torch.arange(2)), None)\n"
        "try: nc_probe.plots.plot_grams(r)\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "nc_probe.plots needs matplotlib: pip install 'timm-deq[recipes]'\n"
