"""The part of the benchmark that measures the layer: equal work on both sides, and equal answers."""

import json
import warnings

import pytest
import torch
from oracles import relative_error

from recipes import benchmark
from timm_deq import Equilibrium, Implicit, Phantom

with warnings.catch_warnings():  # docstrings of torchdeq hold escapes that Python warns of when it compiles them
    warnings.simplefilter("ignore")
    from recipes.benchmarks import layer as part

CPU = torch.device("cpu")


def sides(solver, gradient, cell, *, tol, calls):
    chosen = part.SOLVERS[solver](tol, calls)
    own = Implicit(chosen) if gradient == "implicit" else Phantom(part.PHANTOM_STEPS)
    return Equilibrium(cell, solver=chosen, gradient=own), part.PeerLayer(cell, solver, gradient, tol=tol, calls=calls)


@pytest.mark.parametrize("solver", part.SOLVERS)
@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_both_sides_find_the_same_equilibrium_and_gradient(solver, gradient):
    cell, x, g = (t.double() for t in part.problem(2, 16, 2, "NCHW", CPU))
    x, found = (4 * x).detach().requires_grad_(), []
    for layer in sides(solver, gradient, cell, tol=1e-8, calls=100):
        z = layer(x)
        found.append([z, *torch.autograd.grad(z, [x, *cell.parameters()], g)])
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize("solver", part.SOLVERS)
def test_all_sides_do_the_same_work(solver):
    cell, x, g = part.problem(2, 16, 2, "NCHW", CPU)
    counts = []
    for layer in sides(solver, "implicit", cell, tol=part.NEVER, calls=part.CALLS):
        layer.cell = counted = part.Counted(cell)
        part.solve(layer, x, g, "float32")
        counts.append((counted.calls, counted.products))
    counted = part.Counted(cell)
    part.bare(counted, x, g, "float32", 0)
    # One evaluation more is recorded, and takes the adjoint to the parameters.
    assert counts[0] == (counted.calls, counted.products) == (part.CALLS + 1, part.CALLS + 1)
    calls, products = counts[1]
    assert calls == part.CALLS + 2 and abs(products - part.CALLS - 1) <= 1  # the peer records two


def test_the_bare_cell_with_recorded_steps():
    cell, x, g = part.problem(2, 16, 2, "NCHW", CPU)
    ours, peer = sides("Anderson", "phantom", cell, tol=part.NEVER, calls=part.CALLS)
    counts = []
    for layer in (ours, peer):
        layer.cell = counted = part.Counted(cell)
        part.solve(layer, x, g, "float32")
        counts.append((counted.calls, counted.products))
    counted = part.Counted(cell)
    part.bare(counted, x, g, "float32", part.PHANTOM_STEPS)
    assert counts == [(counted.calls, counted.products)] * 2 == [(part.CALLS + 5, 5)] * 2


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(part, "CELLS", ((2, 8, 2),))
    monkeypatch.setattr(part, "IMAGES", (2, 3, 16, 16))
    monkeypatch.setattr(part, "LARGE_MODEL", "deq_resnet8_cifar")
    monkeypatch.setattr(part, "LARGE_IMAGES", (2, 3, 16, 16))
    monkeypatch.setattr(part, "SECOND_CALLS", (7, 14))
    monkeypatch.setattr(part, "ERROR_CELL", (2, 64, 2))
    file = tmp_path / "benchmark.json"
    assert benchmark.main(["layer", "--threads", "1", "--rounds", "1", "--json", str(file)]) == 0
    assert "channels_last" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert list(written) == [
        "environment",
        "one cell",
        "one model",
        "channels_last",
        "second derivative",
        "gradient errors",
    ]
    for row in written["one cell"]:
        assert row["ours / bare"] == row["ms, ours"] / row["bare ms"] and row["ms, ratio"] > 0
    assert [(row["gradient"], row["layout"], row["dtype"]) for row in written["one model"][:2]] == [
        ("implicit", "NCHW", "float32"),
        ("implicit", "NCHW", "bfloat16"),
    ]
    for row in written["channels_last"]:
        assert row["deq, gain %"] == pytest.approx(100 * (1 - row["deq, NHWC ms"] / row["deq, NCHW ms"]))
    errors = {row["gradient"]: row["max error"] for row in written["gradient errors"]}
    assert errors["implicit, tol 1e-9, as `exact=True`"] < 1e-6 < errors["`Phantom(1, damping=1)`, JFB"]
    peaks = [row["peak states"] for row in written["second derivative"]]
    assert peaks[0] == pytest.approx(peaks[1], abs=0.5)  # bounded in the budget


def test_rows_that_the_peer_does_not_serve(monkeypatch):
    """Its columns are empty, and ours are there."""

    def refuse(self, x):
        raise NotImplementedError("no lu_factor for BFloat16")

    monkeypatch.setattr(part.PeerLayer, "forward", refuse)
    monkeypatch.setattr(part, "CELLS", ((2, 8, 2),))
    monkeypatch.setattr(part, "VARIANTS", part.VARIANTS[:1])
    monkeypatch.setattr(part, "IMAGES", (2, 3, 16, 16))
    rows = [next(part.one_cell(CPU, 1)), next(part.one_model(CPU, 1))]
    for row in rows:
        assert row["ms, ours"] > 0 and row["ms, peer"] is None and row["ms, ratio"] is None
    assert rows[1]["evaluations, peer"] is None and rows[1]["evaluations, ours"] > 0
