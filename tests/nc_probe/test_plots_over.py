"""Pictures over epochs, over two reports and over classes: the numbers that they show."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from nc_probe import Agreement, ClassMoments, measure
from nc_probe.measures.predictions import at_seli
from nc_probe.output.style import COLORS
from nc_probe.plots import plot_classes, plot_compare, plot_grams, plot_history

K, d = 5, 7
COUNTS = torch.tensor([5, 40, 8, 5, 20])
GROUPS = {"majority": [1, 4], "minority": (0, 2, 3)}


def example(spread=1.0, *, counts=COUNTS, groups=GROUPS, weight=True, center="balanced"):
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    means, W = torch.randn(len(counts), d, generator=gen), torch.randn(len(counts), d, generator=gen)
    x = means.double()[labels] + spread * torch.randn(len(labels), d, generator=gen).double()
    moments = ClassMoments(len(counts), d).update(x, labels)
    right = Agreement(counts // 2, counts, counts // 3, "here") if weight else None
    return measure(moments, W + means / spread if weight else None, groups=groups, agreement=right, center=center)


HISTORY = {epoch: example(0.9**epoch) for epoch in (0, 5, 10, 30)}


def curves(axes):
    """Points of the lines with a legend entry, and the heights of the others with their style."""
    named = {line.get_label(): line.get_xydata() for line in axes.get_lines() if not line.get_label().startswith("_")}
    others = [line for line in axes.get_lines() if line.get_label().startswith("_")]
    return named, [(to_hex(line.get_color()), line.get_linestyle(), line.get_ydata()[0]) for line in others]


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_history_of_all_classes_and_of_groups():
    shown = panels(plot_history(dict(reversed(HISTORY.items())), title="t"))
    assert len(shown) == 8
    for start, key in (("NC1", "nc1"), ("NC3", "nc3"), ("accuracy", "accuracy"), ("mean cosine of cl", "mean_cosine")):
        (axes,) = [axes for title, axes in shown.items() if title.startswith(start)][:1]
        named, _ = curves(axes)
        assert list(named) == ["all", *GROUPS] and axes.get_xlabel() == "epoch"
        np.testing.assert_array_equal(named["all"], [(e, getattr(r, key)) for e, r in HISTORY.items()])
        expected = [(e, getattr(r.groups["minority"], key)) for e, r in HISTORY.items()]
        np.testing.assert_array_equal(named["minority"], expected)
    assert shown["NC1: spread within classes / between"].get_yscale() == "log"


def test_history_has_the_lines_of_seli_and_of_the_simplex():
    shown = panels(plot_history(list(HISTORY.values())))
    targets = [at_seli(COUNTS, classes) for classes in (None, *GROUPS.values())]
    colors = ["#000000", *(color.lower() for color in COLORS[:2])]
    for title, key, simplex in (
        ("NC2: class means to simplex ETF", "nc2_etf", []),
        ("NC2: classifier to simplex ETF", "nc2_etf_weight", []),
        ("mean cosine of class means", "mean_cosine", [("#000000", ":", -1 / 4)]),
        ("mean cosine of classifier rows", "mean_cosine_weight", [("#000000", ":", -1 / 4)]),
    ):
        named, others = curves(shown[title])
        assert named["all"][:, 0].tolist() == [0, 1, 2, 3]
        expected = [(color, "--", t[key]) for color, t in zip(colors, targets, strict=True)] + simplex
        assert [other[:2] for other in others] == [each[:2] for each in expected]
        assert [other[2] for other in others] == pytest.approx([each[2] for each in expected])
    assert curves(shown["NC1: spread within classes / between"])[1] == []


def test_history_without_what_is_not_known():
    balanced = panels(plot_history([example(counts=torch.full((K,), 9))]))
    assert curves(balanced["NC2: class means to simplex ETF"])[1] == []
    assert [style for _, style, _ in curves(balanced["mean cosine of class means"])[1]] == [":"]
    empirical = panels(plot_history([example(center="empirical")]))
    assert curves(empirical["NC2: class means to simplex ETF"])[1] == []
    assert len(curves(empirical["NC2: classifier to simplex ETF"])[1]) == 3
    features = panels(plot_history([example(weight=False, groups={})]))
    assert list(features) == [
        "NC1: spread within classes / between",
        "NC2: class means to simplex ETF",
        "mean cosine of class means",
    ]
    late = {0: dataclasses.replace(example(), groups={}, nc1=math.inf), 1: example()}  # groups that came later
    named, _ = curves(panels(plot_history(late))["NC1: spread within classes / between"])
    assert np.isnan(named["minority"][0, 1]) and np.isnan(named["all"][0, 1]) and np.isfinite(named["minority"][1, 1])


@pytest.mark.parametrize("folder", [False, True])
def test_history_from_a_file(tmp_path, folder):
    infinite = dataclasses.replace(HISTORY[5], cdnv=math.inf, nc1=math.inf)
    lines = [{"epoch": e, "loss": 1.0, "collapse": r.as_dict()} for e, r in (HISTORY | {5: infinite}).items()]
    lines.insert(1, {"epoch": 2, "loss": 0.5})  # an epoch in which collapse was not measured
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = plot_history(tmp_path if folder else str(path), class_counts=COUNTS.tolist())
    whole = panels(plot_history(HISTORY | {5: infinite}))
    for title, axes in panels(figure).items():
        (named, others), (expected, lines) = curves(axes), curves(whole[title])
        assert list(named) == list(expected)
        for name in named:
            np.testing.assert_array_equal(named[name], expected[name])
        assert set(others) <= set(lines) and len(others) == sum(color == "#000000" for color, *_ in lines)


def test_history_of_a_run_knows_what_it_was_trained_on(tmp_path):
    lines = [json.dumps({"epoch": e, "collapse": r.as_dict()}) + "\n" for e, r in HISTORY.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    expected = {title: curves(axes)[1] for title, axes in panels(plot_history(HISTORY)).items()}
    for content in ("[]", "{", '{"counts": 3}', '{"counts": [1, 2], "groups": [1]}'):  # those of others tell nothing
        (tmp_path / "manifest.json").write_text(content)
        assert not curves(panels(plot_history(tmp_path))["NC2: class means to simplex ETF"])[1]
    manifest = {"counts": COUNTS.tolist(), "groups": {name: list(of) for name, of in GROUPS.items()}, "seed": 0}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for title, axes in panels(plot_history(tmp_path / "metrics.jsonl")).items():
        assert curves(axes)[1] == expected[title], title
    assert len(expected["NC2: class means to simplex ETF"]) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "history must hold reports of collapse, got none"),
        ('{"epoch": 0}\n', "history must hold reports of collapse, got none"),
        ('{"format": "nc_probe.CollapseReport"\n', "x.jsonl must have a line of JSON for each epoch, .* got line 1: "),
        ('{"collapse": {"nc1": 1}}\n', "x.jsonl must have a line of JSON for each epoch, .* got line 1"),
        ('{"epoch": 0, "collapse": 3}\n', "x.jsonl must have a line of JSON for each epoch, .* got line 1"),
        ("[1]\n", "x.jsonl must have a line of JSON for each epoch, .* got line 1"),
    ],
)
def test_a_file_of_another_kind(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        plot_history(tmp_path / "x.jsonl")
    assert "\n" not in str(error.value)


def test_what_is_no_history():
    for history, got in (({}, "none"), ([1.0, 2.0], "float"), ({0: example(), 1: {}}, "dict")):
        with pytest.raises(ValueError, match=f"history must hold reports of collapse, got {got}"):
            plot_history(history)


def test_two_reports_beside_each_other():
    a, b = example(3.0), dataclasses.replace(example(0.3), nc3=math.nan)
    figure = plot_compare(a, b, labels=("early", "$late$"), title="t")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["early", r"\$late\$"]
    for title, key in (
        ("NC1: spread within / between", "nc1"),
        ("accuracy", "accuracy"),
        ("NC3: classifier to means", "nc3"),
    ):
        axes = panels(figure)[title]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["all", *GROUPS]
        points = np.stack([line.get_xydata()[0] for line in axes.get_lines()])
        parts = [
            part for name in (None, *GROUPS) for part in ((a, b) if name is None else (a.groups[name], b.groups[name]))
        ]
        expected = [getattr(part, key) for part in parts]
        np.testing.assert_array_equal(points[:, 1], [v if math.isfinite(v) else math.nan for v in expected])
        np.testing.assert_allclose(points[:, 0], [-0.12, 0.12, 0.88, 1.12, 1.88, 2.12])
        both = sum(math.isfinite(x) and math.isfinite(y) for x, y in zip(expected[::2], expected[1::2], strict=True))
        assert len(axes.texts) == both == (2 if key == "nc3" else 3)  # arrows
        faces = [to_hex(line.get_markerfacecolor()) for line in axes.get_lines()]
        assert faces[::2] == ["#ffffff"] * 3 and faces[1::2] == ["#000000", *(c.lower() for c in COLORS[:2])]
    other = panels(plot_compare(example(groups={}), example(groups={"x": [0, 1]}, weight=False)))
    assert "accuracy" in other and [t.get_text() for t in other["CDNV"].get_xticklabels()] == ["all", "x"]
    with pytest.raises(ValueError, match=r"labels must be two names, got \('a',\)"):
        plot_compare(a, b, labels=("a",))


def bars(axes):
    return [(bar.get_x() + bar.get_width() / 2, bar.get_height(), to_hex(bar.get_facecolor())) for bar in axes.patches]


def test_classes_the_most_frequent_first():
    report = example()
    figure = plot_classes(report, class_names="abcde", title="t")
    assert [axes.get_title(loc="left") for axes in figure.axes][:2] == ["samples", "accuracy"] and len(figure.axes) == 6
    assert [text.get_text() for text in figure.axes[-1].get_xticklabels()] == list("becad")
    order, (many, few) = [1, 4, 2, 0, 3], (color.lower() for color in COLORS[:2])
    keys = ("class_count", "class_accuracy", "class_nc1", "class_norm", "class_norm_weight", "class_nc3_cosine")
    for axes, key in zip(figure.axes, keys, strict=True):
        shown = bars(axes)[:K]
        assert [x for x, *_ in shown] == pytest.approx(range(K))
        assert [height for _, height, _ in shown] == pytest.approx([getattr(report, key)[i] for i in order])
        assert [color for *_, color in shown] == [many, many, few, few, few]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(GROUPS)
    few = plot_classes(example(counts=torch.tensor([0, 3, 0, 9]), groups={}, weight=False))
    assert [text.get_text() for text in few.axes[-1].get_xticklabels()] == ["3", "1"] and len(few.axes) == 3
    with pytest.raises(ValueError, match="class_names must name 5 classes, got 2"):
        plot_classes(report, class_names=["a", "b"])
    with pytest.raises(ValueError, match="report must hold classes with samples, got none"):
        plot_classes(example(groups={"none": []}).groups["none"])


def test_many_classes_are_shown_in_blocks():
    counts = torch.arange(300, 0, -1)
    labels = torch.arange(300).repeat_interleave(counts)
    x = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0))
    report = measure(ClassMoments(300, 3, scatter=False).update(x, labels), None)
    figure = plot_classes(report)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "samples",
        "variance of the class",
        "norm of the class mean (centred)",
    ]
    for axes, key in zip(figure.axes, ("class_count", "class_variance", "class_norm"), strict=True):
        values = np.array(getattr(report, key), dtype=float).reshape(100, 3)
        shown = bars(axes)
        assert [x for x, *_ in shown] == pytest.approx(np.arange(1, 300, 3))
        assert [height for _, height, _ in shown] == pytest.approx(values.mean(1))
        (ranges,) = axes.collections
        ends = np.stack([segment[:, 1] for segment in ranges.get_segments()])
        np.testing.assert_allclose(ends, np.stack([values.min(1), values.max(1)], 1))


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_pictures_are_written_whatever_names_are(tmp_path, kind):
    strange = {r"$\frac$": [1, 4], "a\nline" * 30: [0, 2], "猫": [3]}
    report, class_names = example(groups=strange), [r"$\frac$", "two $", "a" * 200, "\n", "猫"]
    for draw, settings in (
        (plot_grams, {"class_names": class_names}),
        (plot_classes, {"class_names": class_names}),
        (lambda r, **s: plot_history([r, r], **s), {}),
        (lambda r, **s: plot_compare(r, r, labels=class_names[:2], **s), {}),
    )[:: 1 if kind == "svg" else 2]:
        figure = draw(report, title="$x_1^$ and " + "a" * 200, **settings)
        figure.savefig(tmp_path / f"x.{kind}")
        assert (tmp_path / f"x.{kind}").read_bytes().startswith({"svg": b"<?xml", "pdf": b"%PDF"}[kind])
        box = figure.get_tightbbox()
        assert box.x0 > -0.1 and box.y0 > -0.1
        assert box.x1 < figure.get_figwidth() + 0.1 and box.y1 < figure.get_figheight() + 0.1
