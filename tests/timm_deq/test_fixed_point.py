import sys

import pytest
import torch
from problems import Linear
from stubs import Counted, Scripted
from torch.overrides import TorchFunctionMode

from timm_deq import Anderson, Broyden, Picard, ReversibleIteration, Status, fixed_point

SOLVERS = [Picard, Anderson, Broyden, ReversibleIteration]


def one(z):
    """f(z) = 1, so that the residual at z is |z - 1|."""
    return torch.ones_like(z)


def test_residual_is_relative_to_f_and_per_sample():
    solution = fixed_point(lambda z: 2 * torch.ones_like(z), torch.tensor([[1.0], [2.5], [2.0]]), Picard(1e-3, 1))
    torch.testing.assert_close(solution.residual, torch.tensor([0.5, 0.25, 0.0]))
    assert solution.status.tolist() == [Status.MAX_STEPS, Status.MAX_STEPS, Status.CONVERGED]
    assert solution.steps.tolist() == [1, 1, 1]


def test_the_residual_is_not_the_damped_step():
    f = Linear(batch=1)
    solution = fixed_point(f, f.z0, Picard(1e-2, 500, damping=0.05))
    z = solution.value
    true = (f(z) - z).norm() / f(z).norm()
    torch.testing.assert_close(solution.residual[0], true)
    assert solution.status.item() == Status.CONVERGED and true <= 1e-2


def test_returns_the_best_iterate_not_the_last():
    solver = Scripted(1e-3, 4, points=((1.5, 1.1, 3.0),))
    solution = fixed_point(one, torch.zeros(1, 2), solver)
    torch.testing.assert_close(solution.value, torch.full((1, 2), 1.1))
    torch.testing.assert_close(solution.residual, torch.tensor([0.1]))
    assert solution.steps.item() == 4 and solution.status.item() == Status.MAX_STEPS


def test_a_converged_sample_is_frozen():
    solver = Scripted(0.2, 5, points=((1.1, 1.0, 1.0), (5.0, 4.0, 3.0)))
    f = Counted(one)
    solution = fixed_point(f, torch.zeros(2, 1), solver)
    torch.testing.assert_close(solution.value[0], torch.tensor([1.1]))  # not the better 1.0 that came later
    assert solution.steps.tolist() == [2, 5]
    assert all(z[0].item() == pytest.approx(1.1) for z in f.inputs[1:])


def test_a_nonfinite_evaluation_keeps_the_best_iterate():
    solver = Scripted(1e-6, 6, points=((0.5, 0.9, 7.0, 1.0),))
    solution = fixed_point(lambda z: torch.where(z > 5, torch.nan, 1.0), torch.zeros(1, 1), solver)
    assert solution.status.item() == Status.NONFINITE and solution.steps.item() == 4
    torch.testing.assert_close(solution.value, torch.full((1, 1), 0.9))


def test_nonfinite_at_once_returns_the_start():
    solution = fixed_point(lambda z: z * torch.nan, torch.ones(2, 3), Anderson())
    assert torch.equal(solution.value, torch.ones(2, 3))
    assert solution.residual.isinf().all() and (solution.status == Status.NONFINITE).all()


def test_every_status_explains_itself():
    assert all(status.sentence.endswith(".") for status in Status)


@pytest.mark.parametrize("solver", SOLVERS)
def test_leaving_early_and_running_on_give_the_same_numbers(solver):
    f = Linear(batch=5, radius=0.6)
    early = fixed_point(f, f.z0, solver(1e-4, 40, check_every=1))
    late = fixed_point(counted := Counted(f), f.z0, solver(1e-4, 40, check_every=1000))
    assert len(counted.inputs) == 40 and early.steps.max() < 40
    assert all(torch.equal(a, b) for a, b in zip(early[:4], late[:4], strict=True))
    assert early.evaluations.tolist() == [early.steps.max()] * 5 and late.evaluations.tolist() == [40] * 5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_company(solver):
    everyone = Linear(size=8, batch=64, radius=0.9, seed=3)
    diverging = torch.zeros(64, 1, dtype=torch.float64)
    diverging[5] = 1
    alone = Linear(size=8, batch=64, radius=0.9, seed=3)
    alone.b, alone.z0 = alone.b[:1], alone.z0[:1]

    def beside_a_diverging_sample(z):
        return everyone(z) + diverging * (z * z * 1e3 + 1e30)

    settings = solver(1e-6, 300)
    reference = fixed_point(alone, alone.z0, settings)
    for f in (everyone, beside_a_diverging_sample):
        solution = fixed_point(f, everyone.z0, settings)
        torch.testing.assert_close(solution.value[:1], reference.value, rtol=1e-6, atol=1e-12)
        assert solution.steps[0] == reference.steps[0]
        assert solution.value.isfinite().all()
    assert (reference.status == Status.CONVERGED).all() and solution.status[5] != Status.CONVERGED


@pytest.mark.parametrize("check_every", [1, 3])
def test_the_host_is_asked_every_check_every_steps(check_every, monkeypatch):
    for module in (
        "timm_deq.fixed_point",
        "timm_deq.solvers.base",
        "timm_deq.solvers.anderson",
    ):  # as if the values were on an accelerator
        monkeypatch.setattr(sys.modules[module], "can_read_without_sync", lambda z: False)

    class CountQuestions(TorchFunctionMode):
        asked = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.asked += func.__name__ in ("__bool__", "__int__", "item", "tolist")
            return func(*args, **(kwargs or {}))

    f = Linear(radius=0.99)
    with CountQuestions() as mode:
        fixed_point(f, f.z0, Anderson(1e-12, 12, check_every=check_every, memory=2))
    assert mode.asked == 11 // check_every


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_algebra_stays_in_float32_under_autocast(solver):
    f = Linear(batch=3, dtype=torch.float32)
    A = f.A.clone()

    def elementwise(z):  # a product that autocast does not touch
        return (z.unsqueeze(1) * A).sum(-1) + f.b

    expected = fixed_point(elementwise, f.z0, solver(1e-6, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = fixed_point(elementwise, f.z0, solver(1e-6, 30))
    assert torch.equal(solution.value, expected.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    seen = []

    def f(z):
        seen.append(z.dtype)
        return 0.5 * z + 1

    solution = fixed_point(f, torch.zeros(2, 3, dtype=dtype), Anderson(1e-2))
    assert set(seen) == {dtype}
    assert solution.value.dtype == torch.promote_types(dtype, torch.float32)
    assert (solution.status == Status.CONVERGED).all()


def test_zero_is_a_fixed_point():
    solution = fixed_point(lambda z: z / 2, torch.zeros(1, 4), Anderson())
    assert solution.residual.item() == 0 and solution.steps.item() == 1


@pytest.mark.parametrize("slope", [0.5, 0.9])
@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_a_state_that_tends_to_zero(solver, slope):
    """Its relative residual is constant: the newest iterate is taken, and an absolute tolerance ends the solve."""

    def f(z):
        return slope * z

    z0 = torch.ones(2, 3)
    without = fixed_point(f, z0, Picard(1e-3, 60))
    torch.testing.assert_close(without.value, z0 * slope**59, rtol=1e-5, atol=0)
    assert (without.status == Status.MAX_STEPS).all()
    solution = fixed_point(f, z0, solver(1e-3, 200, atol=1e-6))
    assert (solution.status == Status.CONVERGED).all() and (solution.steps < 200).all()
    assert ((f(solution.value) - solution.value).norm(dim=1) <= 1e-6).all()


def test_the_absolute_tolerance_stands_beside_the_relative_one():
    """f(z) = 100, and the residuals at 0, 101, 100.5 are 100, 1 and 0.5; either tolerance ends the solve."""

    def steps(tol, atol):
        solver = Scripted(tol, 9, atol=atol, points=((101.0, 100.5, 99.9999),))
        solution = fixed_point(lambda z: torch.full_like(z, 100.0), torch.zeros(1, 1), solver)
        return solution.steps.item(), solution.status.item()

    assert steps(1e-2, 0.0) == (2, Status.CONVERGED) == steps(1e-9, 1.0)
    assert steps(1e-9, 0.6) == (3, Status.CONVERGED) == steps(5e-3, 0.2)
    assert steps(1e-9, 1e-9) == (9, Status.MAX_STEPS)


def test_a_call_may_override_tolerance_and_budget():
    f = Linear()
    loose, tight = Picard(1e-2, 500), Picard(1e-8, 500)
    overridden, expected = fixed_point(f, f.z0, loose, tol=1e-8), fixed_point(f, f.z0, tight)
    assert all(torch.equal(a, b) for a, b in zip(overridden[:5], expected[:5], strict=True))
    assert fixed_point(f, f.z0, tight, max_steps=3).steps.tolist() == [3] * 4
    never = fixed_point(lambda z: z / 2 + 1, torch.zeros(1, 1), Picard(0.1, 5), tol=0)
    assert never.steps.item() == 5 and never.status.item() == Status.MAX_STEPS
    for override, message in (({"tol": -1}, "tol must be at least 0, got -1"), ({"max_steps": 0}, "max_steps must be")):
        with pytest.raises(ValueError, match=message):
            fixed_point(f, f.z0, loose, **override)


def test_an_empty_batch():
    for solver in SOLVERS:
        solution = fixed_point(lambda z: z / 2, torch.zeros(0, 3, 2), solver())
        assert solution.value.shape == (0, 3, 2) and solution.steps.shape == (0,)


class Mixed(Linear):
    """Samples of different speed: the map of sample i contracts by `radii[i]`."""

    def __init__(self, rows=None):
        super().__init__(batch=8, size=5)
        self.radii = torch.tensor([0.3, 0.9, 0.5, 0.1, 0.95, 0.3, 0.8, 0.2], dtype=torch.float64).unsqueeze(1)
        if rows is not None:
            self.radii, self.b = self.radii[rows], self.b[rows]

    def __call__(self, z):
        return self.radii / self.radius * (z @ self.A.T) + self.b


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("settings", [{}, {"check_every": 3}, {"max_steps": 30}])
def test_samples_that_have_finished_are_set_aside(solver, settings):
    solver = solver(**{"tol": 1e-6, "max_steps": 60, **settings})
    f = Mixed()
    trace, gathered_trace, sizes = [], [], []
    expected = fixed_point(f, f.z0, solver, residual_history=trace)

    def restrict(rows):
        sizes.append(len(rows))
        return Mixed(rows)

    solution = fixed_point(f, f.z0, solver, subset_map=restrict, residual_history=gathered_trace)
    torch.testing.assert_close(solution.value, expected.value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.residual, expected.residual, rtol=1e-4, atol=0)
    assert torch.equal(solution.steps, expected.steps) and torch.equal(solution.status, expected.status)
    torch.testing.assert_close(torch.stack(gathered_trace), torch.stack(trace), rtol=1e-4, atol=1e-12)
    # Never more than three quarters of what was there before; and the work is what it says.
    assert all(after <= 0.75 * before for before, after in zip([8, *sizes], sizes, strict=False)) and sizes
    assert (solution.evaluations >= solution.steps).all()
    assert solution.evaluations.sum() < expected.evaluations.sum()


def test_a_map_that_does_not_follow_the_samples_that_are_left_is_refused():
    """As one that holds a tensor with a row for each: beside a single sample it is broadcast."""
    rates = torch.tensor([[0.0], [0.0], [0.9]])

    def f(z):
        return rates * z + 1

    z = torch.zeros(3, 2)
    assert fixed_point(f, z, Picard(1e-6, 200)).status.tolist() == [Status.CONVERGED] * 3
    with pytest.raises(ValueError, match=r"^f must keep the shape of its input, \(1, 2\), got \(3, 2\)"):
        fixed_point(f, z, Picard(1e-6, 200), subset_map=lambda rows: f)


def test_the_evaluations_spent_are_counted():
    f, calls = Mixed(), []

    def counted(g):
        return lambda z: calls.append(len(z)) or g(z)

    solution = fixed_point(counted(f), f.z0, Picard(1e-6, 60), subset_map=lambda rows: counted(Mixed(rows)))
    assert solution.evaluations.sum() == sum(calls) and len(set(calls)) > 2


def test_trace_is_the_residual_after_each_evaluation():
    trace = []
    fixed_point(one, torch.zeros(1, 1), Scripted(0.2, 5, points=((1.5, 0.9, 7.0),)), residual_history=trace)
    torch.testing.assert_close(torch.cat(trace), torch.tensor([1.0, 0.5, 0.1]))  # leaves after the third


def test_no_nan_enters_the_trace():
    trace = []
    fixed_point(
        lambda z: torch.where(z > 5, torch.nan, 1.0),
        torch.zeros(1, 1),
        Scripted(1e-6, 3, points=((7.0,),)),
        residual_history=trace,
    )
    torch.testing.assert_close(torch.cat(trace), torch.tensor([1.0, 1.0]))


class Escaping:
    """`f(z) = r z + 1` for samples of three kinds; the first leaves the range where f is finite."""

    def __init__(self, rows=slice(None)):
        self.slope = torch.tensor([[2.0], [0.0], [0.0], [0.5]])[rows]

    def __call__(self, z):
        return torch.where(z > 5, torch.nan, self.slope * z + 1)


@pytest.mark.parametrize("gathered", [False, True])
def test_the_iterates_shown_of_a_sample_that_failed_are_its_best(gathered):
    """z = 0, 1, 3, 7 has residuals 1, 2/3, 4/7 and then none: what is shown from then on is 3, and never a NaN."""
    shown, sizes = [], []

    def restrict(rows):
        sizes.append(len(rows))
        return Escaping(rows)

    solution = fixed_point(
        Escaping(),
        torch.zeros(4, 1),
        Picard(1e-3, 9),
        subset_map=restrict if gathered else None,
        callback=lambda step, z: shown.append(z.clone()),
    )
    assert solution.status.tolist() == [Status.NONFINITE] + [Status.CONVERGED] * 2 + [Status.MAX_STEPS]
    assert (len(sizes) == 2) == gathered  # the second and third are dropped first, then the failed one
    expected = [[0.0, 1, 3, 7] + [3] * 5, [0.0] + [1] * 8, [0.0] + [1] * 8, [2 - 2 * 0.5**k for k in range(9)]]
    torch.testing.assert_close(torch.stack(shown).squeeze(2), torch.tensor(expected).T)


@pytest.mark.parametrize(
    ("f", "z0", "message"),
    [
        (one, torch.zeros(3), r"z0 must be a floating-point tensor .* got torch.float32 \(3,\)"),
        (one, torch.zeros(3, 2, dtype=torch.long), "z0 must be .* got torch.int64"),
        (lambda z: z[:, :1], torch.zeros(3, 2), r"f must keep the shape of its input, \(3, 2\), got \(3, 1\)"),
        (
            lambda z: z.double(),
            torch.zeros(3, 2),
            "f must keep the dtype of its input, .*32, got torch.float64",
        ),
        (lambda z: z.to("meta"), torch.zeros(3, 2), "f must keep the device of its input, cpu, got meta"),
    ],
)
def test_bad_input(f, z0, message):
    with pytest.raises(ValueError, match=message):
        fixed_point(f, z0, Picard())
