"""The page of a study: its answer against SciPy, its tables against the runs, its text against a parser of HTML."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats
from study_runs import CLASSES, write_run

from recipes.results.page import build
from recipes.results.page.answer import answer, find, question
from recipes.results.page.build import build_page
from recipes.results.page.study import Group, Look, Study, common_loss, pooled
from recipes.results.page.svg import as_svg
from recipes.results.page.tables import difference_tables, mean_cell, setting_tables
from recipes.results.runs import read_run
from recipes.training import looks

REFERENCE, STOCK = [0.60, 0.70, 0.65, 0.62, 0.71, 0.66], [0.40, 0.52, 0.43, 0.44, 0.49, 0.48]
HIGHER, LIKE = [0.68, 0.75, 0.74, 0.70, 0.78, 0.75], [0.61, 0.69, 0.66, 0.60, 0.73, 0.66]
ARMS = {"plain": {"model_args.norm": "group"}, "stock": {}, "deq": {"lr": 0.3}}


@pytest.fixture
def study(tmp_path):
    """Makes a study of arms with the given minority accuracies by seed, at some settings."""

    def make(deq=HIGHER, plain=REFERENCE, stock=STOCK, *, residual=1e-3, settings=("R = 10",), **more):
        groups = []
        for setting in settings:
            for arm, values in (("plain", plain), ("stock", stock), ("deq", deq)):
                runs = {}
                for seed, minority in enumerate(values):
                    folder = tmp_path / str(len([*tmp_path.iterdir()])) / f"{arm}-{setting}-{seed}".replace(" ", "")
                    solved = {"residual": residual} if arm == "deq" else {}
                    runs[seed] = read_run(write_run(folder, seed=seed, minority=minority, **solved))
                groups.append(Group(arm=arm, setting=setting, runs=runs))
        given = {"title": "Study", "command": "make", "arms": ARMS, "reference": "plain", "tested": "deq"}
        return Study(**given | {"groups": groups} | more)

    return make


@pytest.fixture(autouse=True)
def no_theory(monkeypatch):
    monkeypatch.setattr(build, "_theory", lambda gallery: None)  # takes ten seconds


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(build, "as_svg", lambda draw, **_: "")


def difference(first, second):
    """Of SciPy: mean, low and high in points."""
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    return (
        f"{100 * np.mean(np.subtract(first, second)):+.2f} points (95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
    )


def test_an_advantage_over_the_reference(study):
    made = study()
    assert question(made) == "Is deq more accurate on minority classes than plain, seed by seed?"
    assert answer(made) == f"At R = 10, yes: {difference(HIGHER, REFERENCE)}, 6 seeds)."


def test_an_advantage_over_another_arm_alone_is_said_to_be_that(study):
    text = answer(study(LIKE))
    assert text.startswith(f"At R = 10, no difference is shown: {difference(LIKE, REFERENCE)}")
    assert f"its advantage over stock, {difference(LIKE, STOCK)}, 6 seeds), is none over plain" in text
    assert text.endswith(", which differs from stock in model_args.norm group.")


def test_an_advantage_of_a_solver_that_has_not_converged_is_none(study, undrawn):
    made = study(residual=1.1e-2)
    assert find(made, "R = 10").verdict == "unsolved"
    text = answer(made)
    assert text.startswith("At R = 10, it cannot be said, as its solver has not converged: ") and "1.1e-02" in text
    page = build_page(made)
    assert "deq: the mean residual of its solves is above 0.01 at R = 10" in page
    marked = [row for row in rows_of(page) if "⚠" in row[0]]
    assert marked and all(row[0].endswith("⚠") and ("deq" in row[0] or "minus" in row[0]) for row in marked)


def test_a_residual_that_is_no_number_is_not_converged(study):
    made = study()
    (deq,) = [group for group in made.groups if group.arm == "deq"]
    deq.runs[0].results["solver"]["mean_residual"] = None
    assert find(made, "R = 10").verdict == "unsolved"


def test_one_that_is_less_accurate(study):
    assert answer(study(REFERENCE, HIGHER)).startswith("At R = 10, no, it is less accurate: -")


def test_too_few_seeds_are_said_and_not_drawn(study, undrawn):
    made = study([0.9], [0.8], [0.5])
    assert answer(made) == "At R = 10, it cannot be said: +10.00 points, of 1 seed, too few for an interval."
    page = build_page(made)
    assert "R = 10: 1 common seeds, fewer than 6: the sign-flip p is never below 0.05 (least: 1)." in page
    assert "±" not in page and page.count("too few seeds") >= 2
    assert answer(study([0.9], [], [])) == "At R = 10, it cannot be said: no seed in common."


def test_many_settings_are_counted(study):
    settings = [f"R = {i}" for i in range(5)]
    text = answer(study(settings=settings))
    assert text.startswith("Yes at 5 of 5 settings (R = 0: +7.67 points, R = 1: ")
    assert text.endswith(f"the mean over all settings is {difference(HIGHER, REFERENCE)}, 6 seeds).")
    assert "an advantage over stock at R = 0, R = 1" in answer(study(LIKE, settings=settings[:4]))


def test_a_seed_counts_once_over_settings(study):
    made = study(settings=("R = 1", "R = 2"))
    found = pooled(made, "plain")
    assert found.n == 6 and found.mean == pytest.approx(100 * np.mean(np.subtract(HIGHER, REFERENCE)))
    assert (found.low, found.high) == pytest.approx(
        tuple(100 * x for x in stats.ttest_rel(HIGHER, REFERENCE).confidence_interval(0.95))
    )
    # A seed that one setting lacks is left out.
    del made.groups[-1].runs[3]
    assert pooled(made, "plain").n == 5


def test_one_arm_and_nothing(study, undrawn):
    made = study()
    alone = replace(made, arms={"deq": {}}, reference="deq", groups=[g for g in made.groups if g.arm == "deq"])
    assert question(alone) == "How accurate is deq on minority classes?"
    assert "one arm alone" in build_page(alone)
    empty = replace(made, groups=[replace(group, runs={}) for group in made.groups], missing={"deq-0": "error: <no>"})
    page = build_page(empty)
    assert "it cannot be said: no seed in common" in page and "error: &lt;no&gt;" in page


def test_means_have_the_interval_of_scipy():
    values = [1.31, 1.42, 1.29, 1.55]
    half = stats.t(3).interval(0.95)[1] * np.std(values, ddof=1) / 2
    assert mean_cell(values).text == f"{np.mean(values):.2f} ± {half:.2f}"
    assert mean_cell([*values, math.nan]).text == mean_cell(values).text
    assert mean_cell([0, 1000.0]).text == f"500 ± {stats.t(1).interval(0.95)[1] * 500:.0f}"
    assert (
        mean_cell([1.31]).text == "1.31" and mean_cell([math.nan]).text == "–" and mean_cell([2.0, 2.0]).text == "2 ± 0"
    )


class Reader(HTMLParser):
    """Tags, identifiers, links and the text of table rows of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.links, self.rows, self.loads = [], [], [], [], []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        for name in ("href", "src", "xlink:href", "data", "action"):
            if name in given:
                (self.links if given[name].startswith("#") else self.loads).append(given[name])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] = f"{self.rows[-1][-1]}{data.strip()} ".strip()


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def rows_of(page):
    return read(page).rows


def looks_of(made):
    """Looks at the first run of each arm, and at one update of all that solve."""
    looks = {}
    for group in made.groups:
        for seed, run in group.runs.items():
            solves = bool(run.results["solver"])
            one = {"overall": 0.5, "minority": 0.1 + seed / 10} if solves else {}
            full = {} if seed else {"points": np.random.default_rng(0).normal(size=(40, 2)).tolist()}
            if full:
                full |= {"labels": [i % 4 for i in range(40)], "class_names": CLASSES}
            if full and solves:
                full |= {"iterates": {str(i): {"nc1": 2 / (i + 1), "nc2_etf": 0.5, "cdnv": 0.1} for i in range(4)}}
            looks[str(run.folder)] = Look(one_update=one, **full)
    return looks


def test_the_page_is_whole_and_the_same_each_time(study):
    made = study()
    made = replace(made, looks=looks_of(made), missing={"deq-R=10-7": "not finished"})
    page = build_page(made)
    found = read(page)
    assert build_page(made) == page
    assert len(set(found.ids)) == len(found.ids) and {link[1:] for link in found.links} <= set(found.ids)
    # Pictures are inside, and nothing is loaded.
    assert all(each.startswith("data:") for each in found.loads) and "@import" not in page
    assert re.findall(r"(?<!xmlns=\")(?<!xlink=\")https?://[^\"]*", page) == []
    # The forest; curves of accuracy, collapse and the rest; Gram matrices and their scale; t-SNE; the solve.
    assert found.tags.count("figure") == 1 + (3 + 4 + 3) + (3 + 1) + 3 + 3
    assert "Not drawn" not in page
    # Each row of a mean names its runs.
    assert page.count(">deq-R=10-3</a>") > 3
    # One update, of the arm that solves alone.
    half = stats.t(5).interval(0.95)[1] * 100 * np.std(np.arange(6) / 10, ddof=1) / 6**0.5
    (row,) = [row for row in found.rows if "50 ± 0" in row]
    assert row[0] == "deq" and f"35 ± {half:.0f}" in row


def test_tables_are_of_the_runs(study):
    made = study()
    accuracy, collapse, solves = setting_tables(made, "R = 10")
    half = stats.t(5).interval(0.95)[1] * np.std(HIGHER, ddof=1) / 6**0.5
    cells = {column: [row.cells[i].text for row in accuracy.rows] for i, column in enumerate(accuracy.columns)}
    assert cells["minority %"][2] == f"{100 * np.mean(HIGHER):.1f} ± {100 * half:.1f}"
    assert [row.head for row in accuracy.rows] == ["plain", "stock", "deq"] and cells["n"] == ["6"] * 3
    assert {"NC1", "NC2: ETF", "SELI", "frame", "NC3", "NC4"} <= {
        *collapse.columns
    } and "frame of W" not in collapse.columns
    assert solves.columns[1:4] == ["residual", "evaluations", "converged %"]
    assert [row.cells[1].text for row in solves.rows] == ["–", "–", "0.001 ± 0"]
    end, equal = difference_tables(made, "R = 10")
    assert end.rows[0].head == "minority %, minus plain" and end.rows[0].main and len(end.rows[0].runs) == 12
    test = stats.ttest_rel(HIGHER, REFERENCE)
    assert end.rows[0].cells[3].value == pytest.approx(test.pvalue) and end.rows[0].cells[4].text == "0.031"
    # Every run reaches 0.1 + 0.005 at epoch 10: seed 5 does so last.
    assert common_loss(made.groups) == pytest.approx(0.105) and "at most 0.105" in equal.note


def test_equal_loss_is_that_of_the_slowest(study):
    made = study()
    slow = made.groups[1].runs[2]
    for record in slow.records:
        record["train_loss"] = record["train_loss"] and 0.15 + record["train_loss"]
    assert common_loss(made.groups) == pytest.approx(0.252)
    _, equal = difference_tables(made, "R = 10")
    nc1 = {row.head: row.cells[1].value for row in equal.rows}
    # The fast ones are taken at epoch 5, where NC1 is 2 / 6, and the slow one at epoch 10, where it is 2 / 11.
    assert nc1["NC1, minus plain"] == 0 and nc1["NC1, minus stock"] == pytest.approx((2 / 6 - 2 / 11) / 6)


def test_names_are_text_and_nothing_else(study):
    evil = "<script>alert(1)</script>"
    made = study(title=evil, command=f"{evil} $\\frac$", notes=[evil], missing={evil: evil})
    rename = {"plain": evil, "stock": "$\\frac$", "deq": "_deq & \"x' $a$ <b>"}
    looks = {key: replace(look, class_names=[evil] * 4) for key, look in looks_of(made).items()}
    made = replace(
        made,
        arms={rename[arm]: {evil: evil} for arm in made.arms},
        reference=rename["plain"],
        tested=rename["deq"],
        groups=[replace(group, arm=rename[group.arm], setting=f"$x {evil}") for group in made.groups],
        looks=looks,
    )
    page = build_page(made)
    found = read(page)
    assert found.tags.count("script") == 1 and "<b>" not in page and "Not drawn" not in page
    assert found.tags.count("svg") > 15
    assert page.count("&lt;script&gt;alert(1)") > 20


def test_a_figure_that_fails_is_a_sentence(capsys):
    def fails():
        raise RuntimeError("no <font>")

    assert as_svg(fails, name="f1", alt="curves") == "<p>Not drawn: RuntimeError: no &lt;font&gt;</p>"
    assert "warning: curves is not drawn: RuntimeError" in capsys.readouterr().err


def test_what_was_seen_of_a_run_is_not_taken_for_another(tmp_path, monkeypatch):
    """A run made again in the same folder, after its page."""
    seen = []

    def look_at(run, *, features):
        seen.append(features)
        return Look(one_update={"overall": len(seen) / 8})

    monkeypatch.setattr(looks, "look_at", look_at)
    path, folder = tmp_path / "looks" / "run.json", tmp_path / "run"
    run = read_run(write_run(folder, seed=0, minority=0.5))
    found = [looks.kept_look(path, run, features=features) for features in (False, False, True, False)]
    assert [look.one_update["overall"] for look in found] == [0.125, 0.125, 0.25, 0.25] and seen == [False, True]
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"seconds": 1.5}))
    assert looks.kept_look(path, run, features=False).one_update == {"overall": 0.375}
