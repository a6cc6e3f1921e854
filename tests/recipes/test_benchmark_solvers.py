"""The solvers of the benchmark, by hand."""

import warnings

import pytest
import torch

with warnings.catch_warnings():  # docstrings of torchdeq hold escapes that Python warns of when it compiles them
    warnings.simplefilter("ignore")
    from recipes.benchmarks import solvers as benchmark

CPU = torch.device("cpu")


def test_calls_to_a_tolerance_by_hand():
    recorded = benchmark.Recorded(lambda z: z / 2 + 1)  # the fixed point is 2
    for z in (
        [0.0, 2.0, 4.0],
        [1.6, 0.0, 4.0],
        [2.0, 2.0, 4.0],
    ):  # one that arrives, one that leaves, one that stays away
        torch.testing.assert_close(recorded(torch.tensor(z)[:, None])[:, 0], torch.tensor(z) / 2 + 1)
    assert (
        torch.stack(recorded.residuals)
        .isclose(torch.tensor([[1, 0, 1 / 3], [0.2 / 1.8, 1, 1 / 3], [0, 0, 1 / 3]]))
        .all()
    )
    assert recorded.calls_to(0.2).tolist() == [2, 1, torch.inf]
    assert recorded.calls_to(0.1).tolist() == [3, 1, torch.inf]


def test_no_number_is_no_success():
    recorded = benchmark.Recorded(lambda z: z / z)
    recorded(torch.zeros(2, 3, 4))
    assert recorded.calls_to(1e9).tolist() == [torch.inf] * 2


@pytest.mark.parametrize("method", benchmark.MEMORY)
@pytest.mark.parametrize("solve", [benchmark.ours, benchmark.peer])
def test_a_tolerance_never_met_takes_every_call_allowed(method, solve):
    f, z0 = benchmark.diagonal(2, 500, CPU)
    recorded = benchmark.Recorded(f)
    with torch.no_grad():
        solve(method, recorded, z0, tol=benchmark.NEVER, calls=17, memory=4)
    assert len(recorded.residuals) == 17


def test_peak_memory_by_hand():
    before = torch.zeros(5000)
    with benchmark.PeakMemory() as mode:
        a = torch.zeros(1000)
        before.view(50, 100).add_(1)  # was there before
        b = a + 1
        a.view(10, 100).mul_(2)  # a view, and in place: nothing new
        assert mode.live == 8000
        del b
        a.add_(1)
        assert (mode.live, mode.peak) == (4000, 8000)
        c, d = a.double().split(500)
        assert (mode.live, mode.peak) == (12000, 12000)
        del c, a
        assert mode.live == 8000  # the other half holds it
        del d
    assert (mode.live, mode.peak) == (0, 12000)


def test_once_full_our_memory_does_not_grow_and_the_peers_broyden_keeps_two_states_a_call(monkeypatch):
    monkeypatch.setattr(benchmark, "MEMORY_CALLS", (20, 30))
    rows = list(benchmark.memory(CPU))
    for method in benchmark.MEMORY:
        ours = [row["peak states, ours"] for row in rows if row["solver"] == method]
        assert max(ours) - min(ours) < 0.1
        assert min(ours) > 2 * benchmark.MEMORY[method]
    assert all(row["peak states, peer"] > 2 * 6 for row in rows)
    peer = {row["calls allowed"]: row["peak states, peer"] for row in rows if row["solver"] == "Broyden"}
    assert peer[30] - peer[20] == pytest.approx(20, abs=0.1)


def test_overhead_is_the_median_of_differences(monkeypatch):
    times = iter(
        [1.0, 3.0, 9.0, 2.0, 9.0, 9.0, 4.0, 7.0, 9.0] * 2
    )  # f alone, ours, the peer; three rounds, two solvers
    monkeypatch.setattr(benchmark, "milliseconds", lambda run, device: next(times))
    rows = list(benchmark.overhead(CPU, [(2, 64)], rounds=3))
    assert [row["solver"] for row in rows] == ["Anderson", "Broyden"]
    for row in rows:
        assert (row["state"], row["f ms"]) == ("2x64", 2.0)
        assert (row["overhead ms, ours"], row["overhead ms, peer"], row["overhead ms, ratio"]) == (3.0, 7.0, 3 / 7)


@pytest.mark.parametrize(("name", "radius"), [("rotation, radius 0.9", 0.9), ("non-normal, radius 0.95", 0.95)])
def test_the_radius_of_the_linear_maps(name, radius):
    f, z0 = benchmark.problems(CPU)[name]
    A = (f(torch.eye(len(z0[0]))[:, None]) - f(torch.zeros_like(z0[:1])))[:, 0].double()
    assert torch.linalg.eigvals(A).abs().max().item() == pytest.approx(radius, abs=1e-3)
