"""The layer-peeled theory: reference values, other solvers, and the command."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import nc_probe
from nc_probe.measures.pairwise import gram_distance, mean_cosine
from recipes.results.theory import checks, equilibria, geometry
from recipes.results.theory.figure import theory_figure
from recipes.results.theory.program import Optimum, Program, cross_entropy, solve, solve_penalised
from recipes.results.theory.search import convex_loss, descend
from recipes.results.theory.tables import Settings
from recipes.results.theory.thresholds import balanced_loss, merge_decay, merge_growth, merge_ratio, vanish_ratio
from recipes.theory import main, read_flags


def measured(program):
    scales = program.per_class(program.scales)
    return geometry.measures(*geometry.factors(solve(program).logits, scales), program.majority)


@pytest.mark.parametrize(("energy", "loss"), [(1, 1.376934920450), (5, 0.559781524010), (20, 0.060670129527)])
@pytest.mark.parametrize("majority", [2, 5, 7])
def test_balanced_loss(energy, loss, majority):
    program = Program(energy=energy, majority=majority, ratio=1)
    assert solve(program).loss == pytest.approx(loss, abs=1e-9)
    assert balanced_loss(program) == pytest.approx(loss, abs=1e-9)
    assert measured(program)["nc2_w"] < 1e-6


@pytest.mark.parametrize(
    ("majority", "ratio", "energy", "loss", "cosine"),
    [
        (3, 10, 5, 0.269053954907, -0.02023186),
        (3, 100, 5, 0.050453680086, 0.31068989),
        (5, 10, 5, 0.261677038637, 0.51749628),
        (5, 10, 20, 0.034295053686, -0.06592657),
    ],
)
def test_loss_and_minority_cosine(majority, ratio, energy, loss, cosine):
    program = Program(energy=energy, majority=majority, ratio=ratio)
    assert solve(program).loss == pytest.approx(loss, abs=1e-9)
    assert measured(program)["minority_cosine_w"] == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize(
    ("majority", "ratio", "losses", "cosines", "nc2"),
    [
        (3, 10, (0.26905, 0.032406, 7.9e-11), (-0.020, -0.088, -0.108), (0.554, 0.220, 0.041)),
        (5, 100, (0.091299, 0.010884, 2.9e-11), (1, 0.040, -0.098), (0.789, 0.482, 0.090)),
        (7, 10, (0.32185, 0.040762, 1.0e-10), (math.nan, -0.031, -0.102), (0.606, 0.237, 0.041)),
    ],
)
def test_gain_of_a_deq(majority, ratio, losses, cosines, nc2):
    for rho, loss, cosine, distance in zip((0, 0.5, 0.9), losses, cosines, nc2, strict=True):
        program = Program(energy=5 / (1 - rho) ** 2, majority=majority, ratio=ratio)
        assert solve(program).loss == pytest.approx(loss, rel=0.02 if rho == 0.9 else 1e-4)
        found = measured(program)
        assert found["minority_cosine_w"] == pytest.approx(cosine, abs=6e-4, nan_ok=True)
        assert found["nc2_w"] == pytest.approx(distance, abs=6e-4)


@pytest.mark.parametrize(
    ("budget", "energy", "ratios"),
    [
        ("class", 1, (4.1359084, 1.7354156, 1.3695296)),
        ("class", 5, (245.49693, 12.192447, 4.0004667)),
        ("sample", 1, (4.1299536, 2.30455, 1.7626317)),
        ("sample", 5, (88.224269, 18.290192, 8.4337622)),
    ],
)
def test_minorities_merge(budget, energy, ratios):
    for majority, ratio in zip((3, 5, 7), ratios, strict=True):
        program = Program(energy=energy, majority=majority, budget=budget)
        assert merge_ratio(program) == pytest.approx(ratio, rel=1e-5)
        phases = [solve(replace(program, ratio=ratio * factor)).phase for factor in (0.999, 1.001)]
        assert phases == ["distinct", "merged"]


def test_growth_of_the_merge_ratio():
    for majority, slope in ((3, 3.525), (5, 2.124), (7, 1.527)):
        program = Program(energy=500, majority=majority)
        assert merge_growth(program) == pytest.approx(slope, abs=6e-4)
        rise = math.log(merge_ratio(replace(program, energy=2000)) / merge_ratio(program))
        assert rise / (math.sqrt(2000) - math.sqrt(500)) == pytest.approx(slope, rel=2e-3)
    assert merge_ratio(Program(energy=1e6)) == math.inf  # above what float64 holds


def test_minorities_vanish():
    program = Program(energy=5, majority=7)
    assert vanish_ratio(program) == pytest.approx(5.70533, rel=1e-4)
    a = program.radius / 6
    e1, e2 = math.exp(-a), math.exp(-a * 6 / 7)
    Z = 1 + 6 * e1 + 3 * e2
    closed_form = math.sqrt(0.7 / (((7 * e1 + 3 * e2) / Z) ** 2 - 30 * (e2 / Z) ** 2))
    assert vanish_ratio(program) == pytest.approx(closed_form, rel=1e-12)
    at, below = (solve(replace(program, ratio=ratio)) for ratio in (5.8, 5.6))
    assert (at.phase, below.phase) == ("vanished", "merged")
    assert at.losses[1] == pytest.approx(math.log(10), abs=1e-12)
    assert math.isnan(measured(at.program)["minority_cosine_w"])
    for energy in (0.01, 0.1):  # just above, where a descent comes to 1e-9 and not to 0
        small = Program(energy=energy, majority=3)
        assert solve(replace(small, ratio=vanish_ratio(small) * (1 + 1e-9))).phase == "vanished"
    assert vanish_ratio(replace(program, majority=3)) == math.inf


@pytest.mark.parametrize("majority", [3, 5, 7])
def test_minorities_merge_under_weight_decay(majority):
    program = Program(energy=1, majority=majority, ratio=10, budget="sample")
    n_B = 10
    N = n_B * (10 * majority + 10 - majority)
    threshold = merge_decay(program, n_B)
    assert n_B == pytest.approx((N * threshold) ** 2)
    below, above = (solve_penalised(program, factor * threshold * math.sqrt(N / 10)) for factor in (0.98, 1.02))
    assert below.g > 0.1 and above.g == 0


@pytest.mark.parametrize("budget", ["class", "sample"])
@pytest.mark.parametrize("majority", [2, 5, 8])
def test_every_optimum_is_certified(majority, budget):
    """The duality gap over all logits, which does not know of the four numbers, is small at every answer."""
    for ratio in (1, 1.0001, 3, 100, 1e6):
        for energy in (1e-3, 0.1, 5, 400):
            optimum = solve(Program(energy=energy, majority=majority, ratio=ratio, budget=budget))
            assert optimum.relative_gap < 1e-5


def test_the_gap_bounds_the_excess():
    best = solve(Program(energy=5, budget="sample"))
    worse = Optimum(best.program, 0.9 * best.a, 0.9 * best.g, best.p, 0.9 * best.q, 0.0)
    worse = replace(worse, log_loss=cross_entropy(worse.program, worse.logits)[0])
    excess = 1 - best.loss / worse.loss
    assert 0.01 < excess < worse.relative_gap < 1


def test_cross_entropy_is_that_of_torch():
    program = Program(energy=5, majority=2, classes=5, ratio=4)
    logits = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.tensor([4.0, 4, 1, 1, 1], dtype=torch.float64)
    # The mean over samples: columns are classes, of which torch wants one a row.
    loss = torch.nn.functional.cross_entropy(logits.T, torch.arange(5), weight)
    (gradient,) = torch.autograd.grad(loss, logits)
    log_loss, relative = cross_entropy(program, logits.detach().numpy())
    assert math.exp(log_loss) == pytest.approx(loss.item(), rel=1e-12)
    np.testing.assert_allclose(relative * loss.item(), gradient.numpy(), atol=1e-15)


def test_measures_are_those_of_nc_probe():
    program = Program(energy=5, budget="sample")
    W, Z = geometry.factors(solve(program).logits, program.per_class(program.scales))
    np.testing.assert_allclose(W @ Z.T, solve(program).logits, atol=1e-12)
    features = torch.tensor(Z - Z.mean(0))
    etf = nc_probe.simplex_etf(10)
    found = geometry.measures(W, Z, 3)
    assert found["nc2_w"] == pytest.approx(gram_distance(torch.tensor(W), etf), abs=1e-12)
    assert found["nc2_h"] == pytest.approx(gram_distance(features, etf), abs=1e-12)
    assert found["minority_cosine_w"] == pytest.approx(mean_cosine(torch.tensor(W[3:])), abs=1e-12)
    assert found["minority_cosine_h"] == pytest.approx(mean_cosine(features[3:]), abs=1e-12)


def test_large_gain_is_seli_where_samples_count():
    program = Program(energy=1e6, budget="sample")
    scales = program.per_class(program.scales)
    limit = geometry.large_gain_limit(scales, 3)
    assert (limit["nc2_w"], limit["nc2_h"]) == pytest.approx((0.5138, 0.3815), abs=1e-3)
    W, Z = geometry.factors(np.eye(10) - 0.1, scales)
    for rows, gram in zip((W, Z), nc_probe.seli([100] * 3 + [10] * 7), strict=True):
        assert gram_distance(torch.tensor(rows), gram) < 1e-10
    assert measured(program)["nc2_w"] == pytest.approx(limit["nc2_w"], abs=2e-3)
    assert geometry.large_gain_limit(np.ones(10), 3)["nc2_w"] < 1e-12
    assert measured(replace(program, budget="class"))["nc2_w"] < 2e-3


@pytest.mark.parametrize("budget", ["class", "sample"])
def test_a_deq_at_rho_times_identity_is_the_explicit_program(budget):
    program = Program(energy=5, ratio=100, budget=budget)
    found = list(checks._spectral(program, "", Settings(rho=(0, 0.5, 0.9), seeds=1)))
    assert [check.most for check in found].count(1e-12) == 2
    assert all(check.holds for check in found)


def test_gains_are_what_the_maps_reach_and_no_more():
    rng = np.random.default_rng(0)
    identity = np.eye(6)

    def maps(V, steps):
        unrolled = sum(np.linalg.matrix_power(V, t) for t in range(steps))
        return [np.linalg.inv(identity - V), unrolled, identity + V, V]

    gains = equilibria.gains(0.7, [4])
    assert list(gains) == ["equilibrium", "4 steps", "residual layer", "plain layer"]
    reached = [np.linalg.norm(A, 2) ** 2 for A in maps(0.7 * identity, 4)]
    assert reached == pytest.approx(list(gains.values()), rel=1e-12)
    for _ in range(20):
        V = rng.standard_normal((6, 6))
        V *= 0.7 / np.linalg.norm(V, 2)
        assert all(np.linalg.norm(A, 2) ** 2 <= gain + 1e-9 for A, gain in zip(maps(V, 4), gains.values(), strict=True))


def test_random_starts_find_no_lower_loss():
    for program in (Program(energy=5), Program(energy=5, majority=5, ratio=100, budget="sample")):
        optimum = solve(program)
        explicit = min(descend(program, bounds="explicit", seed=seed).loss for seed in range(2))
        assert explicit == pytest.approx(optimum.loss, abs=1e-9)
        deq = min(descend(program, bounds="spectral", size=0.5, seed=seed).loss for seed in range(4))
        gained = solve(replace(program, energy=4 * program.energy)).loss
        assert gained - 1e-9 <= deq < optimum.loss


def test_frobenius_is_no_simplex_etf_even_when_balanced():
    program = Program(energy=1, ratio=1)
    found = [descend(program, bounds="frobenius", size=0.25, seed=seed) for seed in range(4)]
    best = min(found, key=lambda each: each.loss)
    etf = equilibria.frobenius_etf_loss(10, 1, 0.25)
    assert best.loss == pytest.approx(1.188647, abs=1e-6)
    assert best.rank == 5
    assert etf == pytest.approx(1.215617, abs=1e-6)
    assert best.loss < etf - 0.02
    for each in found:  # whatever a descent ends with obeys the formula
        assert equilibria.frobenius_radius(each.logits, np.ones(10), 0.25) <= program.radius + 1e-6
    m = 10 / (9 - math.sqrt(0.25 * 9))
    assert equilibria.frobenius_radius(m * (np.eye(10) - 0.1), np.ones(10), 0.25) == pytest.approx(10, rel=1e-12)


def test_penalty_has_no_minimum():
    polygon, simplex = equilibria.polygon(10), equilibria.simplex(10)
    np.testing.assert_allclose(simplex @ simplex.T, (np.eye(10) - 0.1) / 0.9, atol=1e-12)
    for weight in (0.003, 0.01):
        objectives = [equilibria.penalty_objective(polygon, gap, weight) / weight for gap in (1e-2, 1e-4, 1e-6, 1e-8)]
        assert objectives == sorted(objectives, reverse=True)
        assert objectives[-1] == pytest.approx(1, abs=1e-3) and objectives[-1] > 1
        assert equilibria.penalty_objective(simplex, 1e-8, weight) / weight == pytest.approx(4.5, abs=1e-3)


def test_penalty_objective_is_the_least_of_its_definition():
    U, gap, weight = equilibria.polygon(10), 0.1, 0.01
    V = (1 - gap) * np.eye(2)

    def by_definition(t):
        W, h0 = math.sqrt(gap * t) * U, math.sqrt(gap * t) * U.T
        logits = torch.tensor(W @ np.linalg.solve(np.eye(2) - V, h0))
        loss = torch.nn.functional.cross_entropy(logits.T, torch.arange(10)).item()
        return loss + weight / 2 * sum(np.square(x).sum() for x in (W, h0, V))

    least = min(map(by_definition, np.logspace(-3, 3, 2000)))
    assert equilibria.penalty_objective(U, gap, weight) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize(("majority", "budget"), [(3, "class"), (7, "sample")])
def test_a_convex_solver_agrees(majority, budget):
    program = Program(energy=5, majority=majority, ratio=10, budget=budget)
    assert convex_loss(program) == pytest.approx(solve(program).loss, abs=1e-7)


def test_figure_shows_what_coincides_and_what_does_not():
    figure = theory_figure(Settings(rho=(0, 0.5), seeds=2))
    budgets, norms, gains, values = figure.axes
    (explicit, deq), marks = budgets.lines[0:3:2], budgets.lines[1:4:2]
    assert np.nanmax(np.abs(np.interp(10, *explicit.get_data()) - np.interp(10, *deq.get_data()))) > 0.1
    for mark, energy in zip(marks, (5, 20), strict=True):
        assert mark.get_xdata()[0] == pytest.approx(merge_ratio(Program(energy=energy, majority=5)))
    np.testing.assert_allclose(norms.lines[0].get_ydata(), norms.lines[1].get_ydata(), atol=1e-6)
    assert gains.lines[0].get_ydata()[-1] < 0.01 < gains.lines[1].get_ydata()[-1]
    assert len(values.lines) == 5
    assert "R* = 12.2" in budgets.get_legend().get_texts()[0].get_text()


SMALL = "--majority 3 --ratio 1 10 --energy_h 5 --rho 0 .5 --steps 2 --seeds 2".split()


def test_command(tmp_path, capsys):
    folder = tmp_path / "theory"
    assert main(["--output", str(folder), "--verify", *SMALL]) == 0
    page = (folder / "theory.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    assert "| 3 | 10 | 5 | 0.2691 / -0.020 / 0.554 | 0.03241 / -0.088 / 0.220 |" in page
    assert sorted(path.name for path in folder.iterdir()) == ["theory.json", "theory.md", "theory.png"]
    results = json.loads((folder / "theory.json").read_text())
    assert results["settings"]["ratio"] == [1, 10] and results["settings"]["budget"] == ["class", "sample"]
    assert len(results["optima"]) == 2 * 2 * 5  # budgets, ratios, and explicit beside four maps
    steps = [row for row in results["optima"] if row["map"] == "2 steps" and row["ratio"] == 10]
    assert [row["mean_z2"] for row in steps] == [5 * 1.5**2] * 2
    assert steps[0]["loss"] == pytest.approx(solve(Program(energy=5 * 1.5**2)).loss, abs=1e-12)
    assert len(results["frobenius"]) == 4 and len(results["penalty"]) == 6
    assert results["checks"] and all(check["holds"] for check in results["checks"])
    # What exists is left alone.
    assert main(["--output", str(folder), *SMALL]) == 2
    assert "exists" in capsys.readouterr().err


def test_conventions_and_budgets_that_are_not_asked_for_are_left_out(tmp_path):
    folder = tmp_path / "theory"
    assert main(["--output", str(folder), *SMALL, "--convention", "z", "--budget", "sample"]) == 0
    results = json.loads((folder / "theory.json").read_text())
    assert [row["map"] for row in results["optima"]] == ["explicit"] * 2
    assert {row["budget"] for row in results["optima"]} == {"sample"}
    assert results["frobenius"] == results["penalty"] == []


def test_a_failed_check_is_an_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.results.theory.search.require_cvxpy", lambda: None)
    monkeypatch.setattr("recipes.results.theory.checks.convex_loss", lambda program: 0.3)
    flags = "--majority 3 --ratio 10 --energy_h 5 --rho 0 --seeds 1 --convention z --budget class".split()
    assert main(["--output", str(tmp_path / "theory"), "--verify", *flags]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "failed: convex solver minus reduced loss is 0.0309" in error
    assert (tmp_path / "theory" / "theory.md").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--output"),
        ("--output x --seed 3", "--seed"),
        ("--output x --classes 3", "classes is 3; allowed: 4 to 200"),
        ("--output x --majority 3 9", "majority is 9; allowed: 2 to 8"),
        ("--output x --majority 1", "majority is 1; allowed: 2 to 8"),
        ("--output x --majority 3 3", "majority is [3, 3]; allowed: each value once"),
        ("--output x --ratio 0.5", "ratio is 0.5; allowed: 1 to"),
        ("--output x --ratio nan", "ratio is nan; allowed: 1 to"),
        ("--output x --energy_h 0", "energy_h is 0.0; allowed: 0.0001 to"),
        ("--output x --energy_h 9999 --energy_w 100", "energy_h is [9999.0]; allowed: at most 1e6"),
        ("--output x --rho 1", "rho is 1.0; allowed: 0 to 0.99"),
        ("--output x --steps 0", "steps is 0; allowed: 1 to"),
        ("--output x --budget classes", "invalid choice: 'classes'"),
        ("--output x --energy_v 1", "energy_v is 1.0; allowed: 0 to 0.98"),
        ("--output x --seeds 0", "seeds is 0; allowed: 1 to"),
        ("--output x --classes 21 --verify", "classes is 21; allowed: at most 20 with verify"),
    ],
)
def test_bad_input(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_verify_names_the_package_that_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    assert main(["--output", str(tmp_path / "theory"), "--verify"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'timm-deq[theory]'" in error and error.count("\n") == 1


def test_defaults_are_those_of_the_settings():
    assert read_flags(["--output", "x"]) == ("x", False, Settings())


@pytest.mark.slow
def test_everything_holds_at_the_defaults(tmp_path, capsys):
    """All numbers and all checks of the command as it is documented: a minute."""
    assert main(["--output", str(tmp_path / "theory"), "--verify"]) == 0
    results = json.loads((tmp_path / "theory" / "theory.json").read_text())
    assert len(results["checks"]) > 200
    assert max(row["relative_gap"] for row in results["optima"]) < 1e-4
