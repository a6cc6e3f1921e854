import json
import statistics

import pytest
import yaml

from recipes.compare import interval_of, main


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
    assert names == ["| defaults", "| defer=2 sampler=reverse", "| loss=focal loss_args.gamma=1"]


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
        (["--cl", "nowhere"], "--cl is unknown; allowed: --ci, and run folders"),
        ([], "no run folder given"),
        (["nowhere"], "'nowhere' has no config.yaml; allowed: folders of runs"),
    ],
)
def test_bad_input(folders, message, capsys):
    assert main(folders) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
