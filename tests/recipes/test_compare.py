import json
import statistics

import pytest
import yaml
from scipy import stats
from study_runs import write_run

from recipes.compare import main
from recipes.results.page import build
from recipes.results.statistics import interval_of


def run(folder, *, seed, accuracy, nc1=0.25, steps=None, **settings):
    folder.mkdir(parents=True)
    config = {"output": str(folder), "seed": seed, "model": "net", "model_args": {}, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    results = {
        "test": {"overall": accuracy, "minority": None},
        "collapse": {"nc1": nc1, "nc2_etf": 0.5, "nc3": 0.5, "nc4": 1.0},
        "solver": {"mean_steps": steps} if steps else {},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_seeds_are_put_together_and_settings_apart(tmp_path, capsys):
    folders = [run(tmp_path / f"deq{s}", seed=s, accuracy=0.9 + 0.01 * s, steps=7 + s) for s in range(3)]
    folders.append(run(tmp_path / "twin", seed=0, accuracy=0.8, nc1=None, model_args={"equilibrium": False}))
    assert main(folders) == 0
    header, _, deq, twin = capsys.readouterr().out.splitlines()
    assert header == "| settings | runs | overall % | NC1 | NC2 | NC3 | NC4 | evaluations |"
    deviation = statistics.stdev([90, 91, 92])
    assert deq == f"| defaults | 3 | 91.0 ± {deviation:.2g} | 0.25 ± 0 | 0.5 ± 0 | 0.5 ± 0 | 1 ± 0 | 8 ± 1 |"
    assert twin == "| model_args.equilibrium=False | 1 | 80.0 | - | 0.5 | 0.5 | 1 | - |"


def test_what_all_runs_share_and_what_is_a_default_goes_without_saying(tmp_path, capsys):
    base = dict(seed=0, accuracy=0.5, sampler="instance", loss_args={}, lr=0.3, defer=0)
    changes = ({}, {"sampler": "reverse", "defer": 2}, {"loss": "focal", "loss_args": {"gamma": 1}})
    assert main([run(tmp_path / str(i), **base | change) for i, change in enumerate(changes)]) == 0
    names = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["| defaults", "| sampler=reverse defer=2", "| loss=focal loss_args.gamma=1"]


def test_runs_of_an_earlier_version_and_runs_pushed_elsewhere_are_of_one_setting(tmp_path, capsys):
    folders = [
        run(tmp_path / "a", seed=0, accuracy=0.5),  # has no word of skip_corrupt, nor of the Hub
        run(tmp_path / "b", seed=1, accuracy=0.5, skip_corrupt=0, push_to_hub="lab/b", resume="auto"),
        run(tmp_path / "c", seed=2, accuracy=0.5, skip_corrupt=3),
    ]
    assert main(folders) == 0
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["| defaults", "2"], ["| skip_corrupt=3", "1"]]


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (5, 2.776), (31, 2.042)])  # of any printed table
def test_intervals_are_those_of_students_tables(n, t, tmp_path, capsys):
    values = [50 + (-1) ** i * (i // 2 + 1) for i in range(n)]
    expected = t * statistics.stdev(values) / n**0.5
    assert interval_of(values) == pytest.approx(expected, rel=2e-4)
    folders = [run(tmp_path / f"{i}", seed=i, accuracy=value / 100) for i, value in enumerate(values)]
    assert main(["--ci", *folders]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert cells[1:3] == [str(n), f"{statistics.mean(values):.1f} ± {expected:.2g}"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["--cl", "nowhere"], "unrecognized arguments: --cl; allowed"),
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "'nowhere' has no config.yaml; allowed: folders of runs"),
        (["nowhere", "--loss", "low"], "invalid float value: 'low'"),
    ],
)
def test_bad_input(folders, message, capsys):
    assert main(folders) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def probes(folder, *records):
    """Write metrics.jsonl: for each epoch its training loss, and NC1 where it was probed."""
    lines = []
    for epoch, (loss, nc1) in enumerate(records):
        collapse = {"collapse": {"nc1": nc1, "nc2_etf": 0.5, "nc3": 0.5, "nc4": 1.0}} if nc1 else {}
        lines.append(
            {"epoch": epoch, "train_loss": loss, "solver": {}, "val": {"overall": 0.9 - loss / 10}, **collapse}
        )
    with open(f"{folder}/metrics.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def test_differences_are_taken_seed_by_seed(tmp_path, capsys):
    deq, twin = [0.95, 0.91, 0.94, 0.90, 0.93, 0.97], [0.90, 0.88, 0.92, 0.87, 0.92, 0.91]
    order = [3, 1, 5, 0, 4, 2]  # not that in which they ran
    folders = [run(tmp_path / f"twin{s}", seed=s, accuracy=twin[s], lr=0.3) for s in range(6)]
    folders += [run(tmp_path / f"deq{s}", seed=s, accuracy=deq[s], lr=0.2) for s in order]
    assert main([*folders, "--paired"]) == 0
    _, paired = capsys.readouterr().out.split("\n\n")
    header, _, overall, nc1, *_ = paired.splitlines()
    assert header.startswith("| minus lr=0.3 | n | difference |")
    test = stats.ttest_rel([100 * x for x in deq], [100 * x for x in twin])
    low, high = test.confidence_interval(0.95)
    expected = f"| lr=0.2: overall % | 6 | +3.33 | {low:+.3g} to {high:+.3g} | {test.pvalue:.3g} | 0.0312 |"
    assert overall == expected
    assert nc1 == "| lr=0.2: NC1 | 6 | +0 | - | - | 1 |"
    assert "fewer than 6" not in paired


def test_few_common_seeds_are_told(tmp_path, capsys):
    folders = [run(tmp_path / f"a{s}", seed=s, accuracy=0.9 + s / 100, lr=0.3) for s in range(4)]
    folders += [run(tmp_path / f"b{s}", seed=s, accuracy=0.8, lr=0.2) for s in (1, 2, 7)]
    assert main(["--paired", *folders]) == 0
    out = capsys.readouterr().out
    assert "| lr=0.2: overall % | 2 | -11.5 |" in out
    assert "2 common seeds, fewer than 6: the sign-flip p is never below 0.05 (least: 0.5)." in out


def test_runs_that_cannot_be_paired(tmp_path, capsys):
    folders = [run(tmp_path / f"a{i}", seed=0, accuracy=0.9, lr=0.3) for i in range(2)]
    assert main([*folders, "--paired"]) == 2
    assert "runs of one setting alone" in capsys.readouterr().err
    assert main([*folders, run(tmp_path / "b", seed=0, accuracy=0.8, lr=0.2), "--paired"]) == 2
    assert "seed 0 is there twice of 'lr=0.3'" in capsys.readouterr().err


def test_equal_training_loss(tmp_path, capsys):
    slow = probes(run(tmp_path / "slow", seed=0, accuracy=0.9, lr=0.2), (0.9, 3.0), (0.5, None), (0.4, 2.0), (0.1, 1.0))
    fast = probes(run(tmp_path / "fast", seed=0, accuracy=0.8, lr=0.3), (0.5, 0.7), (0.2, 0.5))
    never = probes(run(tmp_path / "never", seed=1, accuracy=0.8, lr=0.3), (0.7, 0.7), (0.6, 0.6))
    assert main([slow, fast, never, "--loss", "0.5", "--paired"]) == 0
    header, _, first, second, _, note, _, _, _, overall, nc1, *_ = capsys.readouterr().out.splitlines()
    assert header.startswith("| settings | runs | val overall % | NC1 |")
    assert first.startswith("| lr=0.2 | 1 | 86.0 | 2 |") and second.startswith("| lr=0.3 | 2 | 85.0 | 0.7 |")
    assert note == "1 of 3 runs have no probe at a training loss of at most 0.5."
    assert overall.startswith("| lr=0.3: val overall % | 1 | -1 |") and nc1.startswith("| lr=0.3: NC1 | 1 | -1.3 |")


def test_the_page_of_any_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "as_svg", lambda draw, **_: "")
    folders = [write_run(tmp_path / f"a{s}", seed=s, minority=0.6 + s / 50, lr=0.3) for s in range(3)]
    folders += [write_run(tmp_path / f"b{s}", seed=s, minority=0.7 + s / 40, lr=0.2, residual=1e-3) for s in range(3)]
    path = tmp_path / "page.html"
    assert main([*map(str, folders), "--html", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    page = path.read_text()
    low, high = stats.ttest_rel([70, 72.5, 75], [60, 62, 64]).confidence_interval(0.95)
    assert f"Yes: +10.50 points (95 % interval {low:+.2f} to {high:+.2f}, 3 seeds)." in page
    assert "Is lr=0.2 more accurate on minority classes than lr=0.3, seed by seed?" in page
    # These runs are made up, and their models are not there: the page says so, and has the numbers.
    assert page.count("could not be looked at again: model") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/a", "--html", "{}/no/page.html"], "no/page.html'; allowed: the path of a file in a folder that is there"),
        (["{}/a", "--html", "{}"], "allowed: the path of a file"),
        (["{}/a", "--html", "{}/page.html", "--paired"], "paired is True; allowed: not given with html"),
        (["{}/a", "--html", "{}/page.html", "--loss", "0"], "loss is 0.0; allowed: not given with html"),
        (["{}/a", "{}/a", "--html", "{}/page.html"], "seed 0 is there twice of 'defaults'"),
        (["{}/unfinished", "--html", "{}/page.html"], "unfinished' has no results.json; allowed: folders of runs"),
        (["{}/cut", "--html", "{}/page.html"], "results.json' cannot be read; allowed: files of runs that"),
        (["{}/other"], "results.json' does not hold collapse and solver and test; allowed: files of runs"),
        (["{}/listed"], "config.yaml' does not hold seed; allowed: files of runs"),
    ],
)
def test_bad_input_of_pages(words, message, tmp_path, capsys):
    for name in ("a", "unfinished", "cut", "other", "listed"):
        write_run(tmp_path / name, seed=0, minority=0.5)
    (tmp_path / "unfinished" / "results.json").unlink()
    (tmp_path / "cut" / "results.json").write_text('{"test": {')
    (tmp_path / "other" / "results.json").write_text('{"points": []}')
    (tmp_path / "listed" / "config.yaml").write_text("- 1")
    assert main([word.format(tmp_path) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))
