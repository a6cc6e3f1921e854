"""The pictures of a report show its numbers: depth, iterates, angles, classes by frequency."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from nc_probe import ClassMoments, measure
from nc_probe.plots import plot_angles, plot_depth, plot_grams, plot_iterates

K, d = 5, 7
COUNTS = torch.tensor([5, 40, 8, 5, 20])
GROUPS = {"majority": [1, 4], "minority": (0, 2, 3)}


def example(spread=1.0, *, groups=GROUPS, counts=COUNTS, weight=True):
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    means, W = torch.randn(len(counts), d, generator=gen), torch.randn(len(counts), d, generator=gen)
    x = means.double()[labels] + spread * torch.randn(len(labels), d, generator=gen).double()
    return measure(ClassMoments(len(counts), d).update(x, labels), W if weight else None, groups=groups)


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def names(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


@pytest.mark.parametrize("groups", [GROUPS, {}])
def test_depth_goes_through_the_layers_and_ends_with_the_features(groups):
    layers = {"stem": example(30, groups=groups), "features": example(3, groups=groups)}  # VGG has a layer of that name
    report = dataclasses.replace(example(0.1, groups=groups), layers=layers)
    figure = plot_depth(report, title="t")
    assert figure.get_suptitle() == "t"
    reports = [*layers.values(), report]
    for axes, key in zip(figure.axes[:3], ("nc1", "nc2_etf", "cdnv"), strict=True):
        assert names(axes) == ["stem", "features", "features"] and axes.get_xlabel() == "layer"
        shown = lines(axes)
        assert list(shown) == ["all", *groups]
        np.testing.assert_array_equal(shown["all"], [(i, getattr(r, key)) for i, r in enumerate(reports)])
        for name in groups:
            expected = [(i, getattr(r.groups[name], key)) for i, r in enumerate(reports)]
            np.testing.assert_array_equal(shown[name], expected)
        assert axes.get_yscale() == ("linear" if key == "nc2_etf" else "log")
        low, high = axes.get_ylim()
        values = np.concatenate([points[:, 1] for points in shown.values()])
        assert low < values.min() and values.max() < high and (low == 0 or key != "nc2_etf")
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 1 + len(groups)


@pytest.mark.parametrize("steps", [1, 10, 11, 12, 29, 50])
def test_iterates_from_the_input_to_the_equilibrium(steps):
    places = ["H0", *(f"z{k}" for k in range(1, steps)), "z*"]
    report = dataclasses.replace(example(), iterates={name: example(0.9**i) for i, name in enumerate(places)})
    nc1, *_ = plot_iterates(report).axes
    points = [(i, report.iterates[name].nc1) for i, name in enumerate(places)]
    np.testing.assert_array_equal(lines(nc1)["all"], points)
    ticks = nc1.get_xticks()
    assert [places[int(i)] for i in ticks] == names(nc1) and len(ticks) <= 12
    assert (names(nc1)[0], names(nc1)[-1]) == ("H0", "z*") and np.diff(ticks).min() == ticks[1] - ticks[0]


def test_each_equilibrium_layer_has_its_row():
    iterates = {f"{layer}.{step}": example(s) for s, layer in ((1, "a"), (2, "b.deq")) for step in ("H0", "z1", "z*")}
    figure = plot_iterates(dataclasses.replace(example(), iterates=iterates))
    each = len(figure.axes) // 2
    assert [axes.get_xlabel() for axes in figure.axes] == ["iterate of a"] * each + ["iterate of b.deq"] * each
    for axes, layer in zip(figure.axes[::each], ("a", "b.deq"), strict=True):
        assert names(axes) == ["H0", "z1", "z*"]
        assert lines(axes)["all"][0, 1] == iterates[f"{layer}.H0"].nc1


def test_what_is_undefined_leaves_a_gap():
    collapsed = dataclasses.replace(example(), nc1=math.inf, cdnv=math.nan, nc2_etf=0.0)
    report = dataclasses.replace(example(), layers={"a": collapsed, "b": collapsed})
    nc1, nc2, cdnv, *_ = plot_depth(report).axes
    assert np.isnan(lines(nc1)["all"][:2, 1]).all() and np.isnan(lines(cdnv)["all"][:2, 1]).all()
    assert lines(nc2)["all"][0, 1] == 0 and nc2.get_yscale() == "linear"  # which a logarithm would not show


def angles(rows):
    """Degrees between rows i < j, by arctan2 of what is across and along."""
    found = {}
    for i, a in enumerate(rows.numpy()):
        for j, b in enumerate(rows.numpy()[:i]):
            along = a @ b / np.linalg.norm(a)
            across = np.linalg.norm(b - along * a / np.linalg.norm(a))
            found[j, i] = math.degrees(math.atan2(across, along))
    return found


def bars(axes):
    """Heights and edges of the histograms, by legend entry."""
    return {patch.get_label(): patch.get_data() for patch in axes.patches if patch.get_label()}


@pytest.mark.parametrize("groups", [GROUPS, {}, {"a": [0, 1, 2], "b": [2, 3, 0]}, {"some": [4, 2]}])
def test_angles_of_pairs_by_group(groups):
    report = example(groups=groups)
    means, rows = plot_angles(report).axes
    for axes, vectors in ((means, report.means), (rows, report.weight)):
        found = angles(vectors)
        parts = {f"within {name}": [p for p in found if set(p) <= set(of)] for name, of in groups.items()}
        together = {p for pairs in parts.values() for p in pairs}
        parts["other pairs" if groups else "all pairs"] = [p for p in found if p not in together]
        shown = bars(axes)
        assert list(shown) == [f"{name}: {len(pairs)}" for name, pairs in parts.items()]
        for (heights, edges, _), pairs in zip(shown.values(), parts.values(), strict=True):
            expected, _ = np.histogram([found[p] for p in pairs], edges)
            np.testing.assert_allclose(heights, 100 * expected / len(pairs))
            assert axes.get_ylim()[1] > heights.max()
        (etf,) = [line for line in axes.get_lines() if "ETF" in line.get_label()]
        assert etf.get_xdata()[0] == pytest.approx(104.47751218592992)  # of a tetrahedron's kin: arccos(-1/4)
        low, high = axes.get_xlim()
        assert all(low <= angle <= high for angle in found.values()) and low < 104 < high


def test_angles_without_the_classes_that_have_no_samples():
    report = example(counts=torch.tensor([3, 0, 4, 5]), groups={"pair": [1, 2, 3]})
    shown = bars(plot_angles(report).axes[0])
    assert list(shown) == ["within pair: 1", "other pairs: 2"]
    heights, edges, _ = shown["within pair: 1"]
    assert heights[np.histogram([angles(report.means)[1, 2]], edges)[0] > 0] == [100]


def test_angles_of_many_classes_are_counted_in_tiles():
    counts = torch.ones(700, dtype=torch.int64)
    report = example(0, groups={"few": range(505, 530)}, counts=counts, weight=False)
    (axes,) = plot_angles(report).axes
    inside, other = bars(axes).values()
    found = angles(report.means[505:530])
    np.testing.assert_allclose(inside[0], 100 / 300 * np.histogram(list(found.values()), inside[1])[0])
    u = torch.nn.functional.normalize(report.means)
    every = (u @ u.T).clamp(-1, 1).acos().rad2deg()[torch.ones(700, 700).triu(1).bool()]
    counted = np.histogram(every, other[1])[0] - np.histogram(list(found.values()), other[1])[0]
    np.testing.assert_allclose(other[0], 100 * counted / (700 * 699 / 2 - 300))


def test_angles_at_collapse_stand_at_the_etf():
    etf = torch.eye(4).double() - 1 / 4
    moments = ClassMoments(4, 4).update(etf, torch.arange(4))
    (axes,) = plot_angles(measure(moments, None)).axes
    ((heights, edges, _),) = bars(axes).values()
    assert heights.max() == 100 and edges[heights.argmax()] == 109 and edges[1] - edges[0] == 1  # 109.47 degrees
    merged = dataclasses.replace(measure(moments, torch.ones(4, 4)), groups={})
    _, rows = plot_angles(merged).axes
    assert rows.get_xlim()[0] == 0 and next(iter(bars(rows).values()))[0][0] == 100


def test_a_class_at_the_centre_has_no_angle():
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 0]])
    (axes,) = plot_angles(measure(ClassMoments(3, 2).update(x, torch.arange(3)), None)).axes
    assert list(bars(axes)) == ["all pairs: 1"]


def test_grams_by_falling_frequency():
    report = example()
    left, right, _ = plot_grams(report, order="frequency", class_names="abcde").axes
    assert names(left) == list("becad") and left.get_xlabel() == "classes, most frequent first"
    order = torch.tensor([1, 4, 2, 0, 3])  # of equal frequency by number
    for axes, gram in ((left, report.gram), (right, report.gram_weight)):
        torch.testing.assert_close(torch.as_tensor(axes.images[0].get_array().data), gram[order][:, order])
    few = example(counts=torch.tensor([0, 3, 0, 9]), groups={})  # positions are not class numbers
    assert names(plot_grams(few, order="frequency").axes[0]) == ["3", "1"]


def test_names_are_names_whatever_is_in_them(tmp_path):
    """Mathematics that cannot be read ends a figure as it is drawn; a name of a line would push the picture out."""
    strange = {"$\\frac$": [1, 4], "a\nline": [0], "x" * 300: [2, 3]}
    report = example(groups=strange)
    report = dataclasses.replace(report, layers={"$1": report}, iterates={"H0": report, "$^$": report})
    class_names = ["$\\frac$", "two $", "a" * 200, "\n", "_{"]
    for figure in (
        plot_grams(report, class_names=class_names, title="$\\frac$"),
        plot_angles(report, title="$^"),
        plot_depth(report),
        plot_iterates(report),
    ):
        figure.savefig(tmp_path / "x.png", dpi=50)
        box = figure.get_tightbbox()
        assert box.x0 > -0.1 and box.y0 > -0.1
        assert box.x1 < figure.get_figwidth() + 0.1 and box.y1 < figure.get_figheight() + 0.1
    texts = names(plot_grams(report, class_names=class_names).axes[0])
    assert sorted(texts) == sorted([r"\$\frac\$", r"two \$", "a" * 8 + "…" + "a" * 7, "3", " _{"])


def test_cosines_that_round_to_zero_have_no_sign():
    rows = torch.tensor([[1.0, 1e-3, 0], [1e-3, -1, 0], [-1, 1, 0]])
    report = dataclasses.replace(example(counts=COUNTS[:3], groups={}), means=rows.double(), weight=None)
    texts = [text.get_text() for text in plot_grams(report).axes[0].texts]
    assert ".00" in texts and "-.71" in texts and "-.00" not in texts


def cosines(kind, K):
    """A report of K class means and as many rows: near an ETF, drawn at random, or half of them merged."""
    gen = torch.Generator().manual_seed(0)
    noise, rows = torch.randn(K, K, generator=gen).double(), torch.eye(K).double()
    if kind == "merged":
        rows[K // 2 :] = rows[K // 2 :].mean(0) + rows[K // 2 :] / (4 * K**0.5)
    rows = noise if kind == "spread" else rows + 0.05 / K**0.5 * noise
    return measure(
        ClassMoments(K, K, scatter=False).update(rows, torch.arange(K)), rows, groups={"b": range(K // 2, K)}
    )


@pytest.mark.parametrize("K", [10, 60, 300])
def test_one_look_tells_collapse_from_none(K):
    """How far from white is the picture off the diagonal?"""
    paint, merged = {}, []
    for kind in ("near", "spread", "merged"):
        axes = plot_grams(cosines(kind, K)).axes[0]
        (image,) = axes.images
        tint = 1 - image.to_rgba(image.get_array())[..., :3].min(2)
        tint = tint[~np.eye(len(tint), dtype=bool)]
        paint[kind] = tint.mean()
        merged.append((tint > 0.8).mean())
    assert paint["near"] < 0.15 and paint["spread"] > 2.5 * paint["near"] and paint["merged"] > 3 * paint["near"]
    assert merged[0] < 0.01 and 0.15 < merged[2] < 0.3


def test_white_is_the_simplex():
    for K in (2, 10, 60):
        (image,) = plot_grams(cosines("near", K)).axes[0].images
        norm, etf = image.norm, -1 / (K - 1)
        assert float(norm(etf)) == pytest.approx(0.5) and float(norm(1)) >= 1
        few = float(norm(etf + 0.05)) - 0.5
        assert few == pytest.approx(0.5 * 0.05 / (1 - etf) if K <= 10 else 0.5 * (0.05 / 0.5) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_many_classes(dtype):
    """Whatever bits of a float32, and whatever type by default, are thought to be enough elsewhere."""
    report = cosines("spread", 300)
    try:
        torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "medium")
        torch.set_default_dtype(dtype)
        image = plot_grams(report, order="frequency").axes[0].images[0]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    shown, etf, gram = np.asarray(image.get_array()), -1 / 299, report.gram.numpy() + 1 / 299
    assert shown.shape == (100, 100) and list(image.get_extent()) == [-0.5, 299.5, 299.5, -0.5]
    for i, j in ((0, 0), (7, 99), (99, 99), (50, 3)):
        cosines_there = [gram[a, b] for a in range(3 * i, 3 * i + 3) for b in range(3 * j, 3 * j + 3) if a != b]
        distance = math.copysign(np.sqrt(np.mean(np.square(cosines_there))), np.mean(cosines_there))
        assert shown[i, j] == pytest.approx(etf + distance, rel=1e-4)
    absent = dataclasses.replace(report, means=torch.cat([torch.zeros(1, 300).double(), report.means[1:]]))
    assert not np.isnan(np.asarray(plot_grams(absent).axes[0].images[0].get_array())).any()  # a mean at the centre


@pytest.mark.parametrize(("K", "step"), [(25, 1), (26, 5), (60, 5), (100, 10), (300, 50)])
def test_ticks_are_few_and_round(K, step):
    report = measure(ClassMoments(K, 3).update(torch.randn(K, 3), torch.arange(K)), None)
    axes = plot_grams(report, class_names=[f"c{k}" for k in range(K)]).axes[0]
    assert names(axes) == [f"c{k}" for k in range(0, K, step)] and list(axes.get_xticks()) == [*range(0, K, step)]


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda r: plot_grams(r, order="size"), r"order must be one of \('group', 'frequency'\), got 'size'"),
        (plot_depth, "report must hold layers, got none: NCProbe"),
        (plot_iterates, "report must hold iterates, got none: NCProbe"),
        (lambda r: plot_angles(example(counts=torch.tensor([0, 4]), groups={})), "two class means or more, got 1"),
        (lambda r: plot_angles(example(groups={"none": []}).groups["none"]), "two class means or more, got 0"),
    ],
)
def test_a_report_without_what_is_asked_for(draw, message):
    with pytest.raises(ValueError, match=message) as error:
        draw(example())
    assert "\n" not in str(error.value)
