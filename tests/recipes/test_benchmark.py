"""The script of the benchmark: its parts, its tables, its files."""

import json
import warnings

import pytest
import torch

from recipes import benchmark
from recipes.benchmarks import merged as benchmark_merged
from recipes.benchmarks import probe as benchmark_probe
from recipes.benchmarks import tables as benchmark_tables

with warnings.catch_warnings():  # docstrings of torchdeq hold escapes that Python warns of when it compiles them
    warnings.simplefilter("ignore")
    from recipes.benchmarks import solvers as benchmark_solvers


def test_table():
    rows = [
        {"f": "a", "n": 2, **benchmark_tables.compared("calls", 3.0, 4.0)},
        {"f": "b", "n": 3, **benchmark_tables.compared("calls", 1234.5, torch.inf)},
    ]
    assert benchmark_tables.table(rows).splitlines() == [
        "| f | n | calls, ours | calls, peer | calls, ratio |",
        "|---|---|---|---|---|",
        "| a | 2 | 3 | 4 | 0.75 |",
        "| b | 3 | 1234 | - | - |",
    ]


def test_runs_take_turns_and_medians_are_their_own(monkeypatch):
    times, order = iter([1.0, 10.0, 5.0, 30.0, 2.0, 20.0]), []
    monkeypatch.setattr(benchmark_tables, "milliseconds", lambda run, device: (run(), next(times))[1])
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert benchmark_tables.in_turn(runs, 3, torch.device("cpu")) == {"a": 2.0, "b": 20.0}
    assert order == ["a", "b"] * 3


def test_solvers_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_solvers, "MEMORY_CALLS", (3, 5))
    file = tmp_path / "benchmark.json"
    argv = ["solvers", "--threads", "1", "--rounds", "1", "--sizes", "2x32", "--tolerances", "0.3", "--json", str(file)]
    assert benchmark.main(argv) == 0
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    assert list(written) == ["environment", "evaluations", "overhead", "memory"]
    assert [len(written[name]) for name in ("evaluations", "overhead", "memory")] == [8, 2, 4]
    for row in written["evaluations"]:
        assert 1 <= row["mean calls, ours"] <= row["calls, ours"] <= benchmark_solvers.BUDGET
        assert row["calls, ratio"] == row["calls, ours"] / row["calls, peer"]
    assert written["environment"]["torch"] == torch.__version__
    assert f"torch: {torch.__version__}" in printed and benchmark_tables.table(written["memory"]) in printed


def test_probe_from_the_command_line(tmp_path, capsys, monkeypatch):
    for name, value in (("SAMPLES", 400), ("FEATURES", 16), ("CLASSES", 5), ("BATCH_SIZES", (100, 64))):
        monkeypatch.setattr(benchmark_probe, name, value)
    monkeypatch.setattr(benchmark_probe, "MANY", ((200, 16, 10), (40, 16, 50)))
    monkeypatch.setattr(benchmark_probe, "MODEL", "resnet10t")
    monkeypatch.setattr(benchmark_probe, "IMAGES", (2, 3, 32, 32))
    monkeypatch.setattr(benchmark_probe, "BATCHES", 3)
    one_epoch_of_few(monkeypatch)
    monkeypatch.setattr(benchmark_merged, "FEATURES", 16)
    file = tmp_path / "benchmark.json"
    argv = ["probe", "--threads", "1", "--rounds", "1", "--json", str(file), "--figures", str(tmp_path / "figures")]
    assert benchmark.main(argv) == 0
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    titles = ["features in memory", "many classes", "share of an evaluation", "share of training", "merged minorities"]
    assert list(written) == ["environment", *titles]
    assert [len(written[title]) for title in titles] == [6, 2, 1, 1, 9]
    assert all(benchmark_tables.table(written[title]) in printed for title in titles)
    for row in written["features in memory"]:
        assert row["ms, ratio"] == row["ms, ours"] / row["ms, peer"]
        assert row["NC1 error, ours"] < 1e-12
        assert row["NC1 error, peer"] < (1e-4 if row["peer"] == "float32" else 1e-12)
    (share,) = written["share of an evaluation"]
    assert share["images"] == 6
    assert share["updates %"] == pytest.approx(100 * share["updates ms"] / share["pass ms"])
    (share,) = written["share of training"]
    whole = share["epoch ms"] + share["evaluation ms"]
    assert share["% of epoch and evaluation"] == pytest.approx(100 * share["probe and report ms"] / whole)
    assert (tmp_path / "figures" / "nc1_merged.png").read_bytes().startswith(b"\x89PNG")


def one_epoch_of_few(monkeypatch):
    """The default run, with its first images only."""
    whole = benchmark_probe.default_run

    def few(config):
        net, images, labels, groups, _ = whole(config)
        assert (len(labels), config.model) == (382, "deq_resnet8_cifar")
        images, labels = images[::48], labels[::48]
        return net, images, labels, groups, torch.bincount(labels, minlength=10)

    monkeypatch.setattr(benchmark_probe, "default_run", few)


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["prob"])
    assert f"'prob' is no part; allowed: {', '.join(benchmark.PARTS)}" in capsys.readouterr().err
