import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Linear, cell_and_input, generator

from timm_deq import (
    Anderson,
    Broyden,
    Equilibrium,
    JacobianPenalty,
    Neumann,
    Phantom,
    Picard,
    ReversibleIteration,
    Shine,
    SolveLog,
    Status,
    VariationalDropout,
    fixed_point,
)
from timm_deq.solvers.anderson import _restart, _solve
from timm_deq.solvers.broyden import BroydenState

ALL = torch.tensor([True])

SOLVERS = [Picard, Anderson, Broyden, ReversibleIteration]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("radius", [0.3, 0.9])
def test_linear_problem_against_a_direct_solve(solver, radius):
    f = Linear(radius=radius)
    solution = fixed_point(f, f.z0, solver(1e-12, 500))
    torch.testing.assert_close(solution.value, f.solution, rtol=1e-9, atol=1e-9)
    assert (solution.status == Status.CONVERGED).all()


@pytest.mark.parametrize(("solver", "most"), [(Anderson(1e-9, 50, memory=7, ridge=0), 9), (Broyden(1e-9, 50), 14)])
def test_a_linear_problem_of_size_6_ends_in_theory_s_number_of_steps(solver, most):
    # Anderson with full memory is GMRES (Walker & Ni 2011): exact after 6 residuals, then an evaluation to see it.
    # Broyden's method is exact after 2 * 6 steps (Gay 1979).
    f = Linear(size=6, batch=1)
    assert fixed_point(f, f.z0, solver).steps.item() <= most


def test_picard_follows_its_formula():
    f = Linear(batch=1)
    z = f.z0
    for _ in range(7):
        z = 0.7 * f(z) + 0.3 * z
    solution = fixed_point(f, f.z0, Picard(1e-30, 8, damping=0.7))
    torch.testing.assert_close(solution.value, z)


def test_damping_tames_a_flip():
    def flip(z):  # eigenvalue -1.5: the plain iteration diverges
        return -1.5 * z + 1

    assert fixed_point(flip, torch.zeros(1, 2), Picard(1e-5, 50)).status.item() == Status.MAX_STEPS
    damped = fixed_point(flip, torch.zeros(1, 2), Picard(1e-5, 50, damping=0.5))
    torch.testing.assert_close(damped.value, torch.full((1, 2), 0.4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mixing", [1.0, 0.6])
def test_anderson_against_the_constrained_least_squares(mixing):
    """One update against the minimiser of `||sum a_i F_i||` on `sum a_i = 1`, by elimination and lstsq."""
    rng = generator(1)
    z = torch.randn(4, 1, 9, generator=rng, dtype=torch.float64)
    fz = torch.randn(4, 1, 9, generator=rng, dtype=torch.float64)
    solver = Anderson(memory=3, ridge=0.0, mixing=mixing)
    state = solver.init(z[0])
    for i in range(4):  # the window of three has moved on by one
        z_next, state = solver.update(z[i], fz[i], state, ALL)
    F = (fz - z)[1:, 0]
    differences = (F[1:] - F[0]).T
    gamma = torch.linalg.lstsq(differences, -F[0].unsqueeze(1)).solution.squeeze(1)
    alpha = torch.cat([1 - gamma.sum(keepdim=True, dim=0), gamma])
    expected = alpha @ (z[1:, 0] + mixing * F)
    torch.testing.assert_close(z_next[0], expected)


def test_anderson_does_not_depend_on_scale():
    f = Linear(batch=2)
    runs = [fixed_point(lambda z, s=s: s * f(z / s), f.z0, Anderson(1e-8, 40)) for s in (1.0, 2.0**-40, 2.0**40)]
    for scale, run in zip((1.0, 2.0**-40, 2.0**40), runs, strict=True):
        assert torch.equal(run.steps, runs[0].steps)
        torch.testing.assert_close(run.value / scale, runs[0].value)


def test_anderson_falls_back_to_a_picard_step():
    solver = Anderson(memory=2, ridge=0.0)
    z = torch.zeros(2, 3)
    state = solver.init(z)
    fz = torch.ones(2, 3)
    _, state = solver.update(z, fz, state, ALL)
    z_next, _ = solver.update(z, fz, state, ALL)  # the same residual twice: a singular Gram matrix
    torch.testing.assert_close(z_next, fz)


def test_anderson_starts_the_memory_of_a_sample_anew_where_its_gram_matrix_is_bad():
    rng = generator(2)
    z, fz = torch.randn(2, 7, 2, 5, generator=rng, dtype=torch.float64)
    fz[1, 0] = z[1, 0]  # sample 0: a residual of no length, which no scaling brings to unit diagonal
    solver = Anderson(memory=4, ridge=0.0)
    fresh, state = solver.init(z[0]), solver.init(z[0])
    for i in range(7):
        z_next, state = solver.update(z[i], fz[i], state, ALL)
        if i in (1, 2):  # the second time the useless residual itself is forgotten
            torch.testing.assert_close(z_next[0], fz[i, 0])
        if i > 1:  # what the memory would be that begins here
            expected, fresh = solver.update(z[i], fz[i], fresh, ALL)
            torch.testing.assert_close(z_next[0], expected[0])
            assert torch.allclose(z_next[1], expected[1]) == (i >= 5)  # the other's reaches further back


@pytest.mark.parametrize("recorded", [False, True], ids=["in place", "recorded"])
def test_a_memory_that_starts_anew_keeps_its_newest_residual(recorded):
    rng, slot = generator(), 1
    alpha, gram = torch.randn(2, 3, generator=rng), torch.randn(2, 4, 4, generator=rng)
    weights, products = _restart(torch.tensor([True, False]), slot, alpha.clone(), gram.clone(), recorded)
    assert weights[0].tolist() == [0, 1, 0] and torch.equal(weights[1], alpha[1])
    for i in (0, 2, 3):
        gram[0, i, i] = torch.finfo(torch.float32).max
    assert torch.equal(products, gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anderson_refuses_weights_that_cancel_more_than_half_of_the_digits(dtype, monkeypatch):
    """Weights of 1 / sqrt(eps) in sum of moduli: three quarters of that are taken, five quarters are not."""
    limit = torch.finfo(dtype).eps ** -0.5
    w = torch.tensor([0.75 * limit, 1.25 * limit], dtype=dtype) / 2
    monkeypatch.setattr(Anderson, "_mixture", lambda self, gram, filled: torch.stack([1 + w, -w], dim=1))
    z, fz = torch.randn(2, 2, 2, 3, generator=generator(), dtype=torch.float64).to(dtype)
    solver = Anderson(memory=2)
    _, state = solver.update(z[0], fz[0], solver.init(z[0]), ALL)
    z_next, _ = solver.update(z[1], fz[1], state, ALL)
    taken = fz[0, 0].double() + w[0].double() * (fz[0, 0].double() - fz[1, 0].double())
    torch.testing.assert_close(z_next[0].double(), taken, rtol=1e-3, atol=1e-3 * limit)
    assert torch.equal(z_next[1], fz[1, 1])


@pytest.mark.parametrize("compiled", [False, True])
def test_fewer_bits_for_products_put_no_floor_under_the_residual(compiled, monkeypatch):
    """With products as any processor that has bf16 may take them once the user allows it."""
    bmm, f = torch.bmm, Linear(size=4, batch=3, dtype=torch.float32)

    def rounded(a, b):
        return bmm(a.bfloat16().float(), b.bfloat16().float())

    def solve(z):
        return fixed_point(lambda z: (z.unsqueeze(1) * f.A).sum(2) + f.b, z, Anderson(1e-6, 8, ridge=0.0)).residual

    monkeypatch.setattr(torch, "bmm", rounded)
    assert solve(f.z0).max() > 1e-4  # what such a product does
    torch.set_float32_matmul_precision("medium")
    try:
        residual = (torch.compile(solve, fullgraph=True, backend="eager") if compiled else solve)(f.z0)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert residual.max() <= 1e-6


def test_the_spelt_out_solve_equals_the_library_s(monkeypatch):
    rng = generator()
    F = torch.randn(3, 5, 20, generator=rng, dtype=torch.float64)
    matrix, rhs = F @ F.mT, torch.rand(3, 5, generator=rng, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, rhs)
    torch.testing.assert_close(_solve(matrix, rhs, 5), expected)
    monkeypatch.setattr("timm_deq.solvers.anderson.is_tracing", lambda z: True)
    torch.testing.assert_close(_solve(matrix, rhs, 5), expected)


def test_broyden_satisfies_the_secant_condition():
    """`B dg = dz` for the newest pair, also after the memory has wrapped; B rebuilt densely from the state."""
    f = Linear(size=5, batch=1, radius=0.9)
    solver = Broyden(memory=3)
    previous, z, state = None, f.z0, solver.init(f.z0)
    for _ in range(8):
        z_next, state = solver.update(z, f(z), state, ALL)
        if previous is not None:
            us, vs = state[0][0], state[1][0]
            B = us.T @ vs - torch.eye(5, dtype=z.dtype)
            dg = (f(z) - z) - (f(previous) - previous)
            torch.testing.assert_close(B @ dg[0], (z - previous)[0])
        previous, z = z, z_next


def test_broyden_restarts_when_its_memory_is_full():
    """Every `memory` pairs it goes on as if begun at the present iterate, from where a Picard step is due."""
    f = Linear(size=7, batch=1, radius=0.9)
    solver = Broyden(memory=3)
    z, state = f.z0, solver.init(f.z0)
    for _ in range(4):
        z, state = solver.update(z, f(z), state, ALL)
    # Begun at the last iterate but one, whose step has been taken: one secant pair on top of -I.
    last, g_last = state.z, state.g
    z_next, state = solver.update(z, f(z), state, ALL)
    g, dz = f(z) - z, z - last
    dg = g - g_last
    u = (dz + dg) / -(dz * dg).sum()
    torch.testing.assert_close(z_next, z + g - u * -(dz * g).sum())


def test_broyden_keeps_the_inverse_of_a_finished_sample():
    f = Linear(size=6, batch=2, radius=0.9)
    solver = Broyden(memory=3)
    z, state = f.z0, solver.init(f.z0)
    for _ in range(3):
        z, state = solver.update(z, f(z), state, ALL)
    kept = state.us[0].clone(), state.vs[0].clone()
    for _ in range(9):
        z_next, state = solver.update(z, f(z), state, torch.tensor([False, True]))
        z = torch.stack([z[0], z_next[1]])
    assert torch.equal(state.us[0], kept[0]) and torch.equal(state.vs[0], kept[1])
    assert kept[0].any() and not torch.equal(state.us[1], kept[0])


def test_the_reversible_iteration_is_two_coupled_states():
    f = Linear(batch=2)
    beta, x, y = 0.7, f.z0, f.z0
    for _ in range(5):
        y = (1 - beta) * y + beta * f(x)
        x = (1 - beta) * x + beta * f(y)
    solver = ReversibleIteration(damping=beta)
    z, state = f.z0, solver.init(f.z0)
    for _ in range(10):
        z, state = solver.update(z, f(z), state, ALL)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(state.previous, y)
    assert torch.equal(state.last, z) and state.index.tolist() == [10, 10]


def test_broyden_falls_back_to_a_picard_step():
    z, fz = torch.zeros(1, 3), torch.ones(1, 3)
    infinite = torch.full((1, 2, 3), torch.inf)
    z_next, _ = Broyden(memory=2).update(z, fz, BroydenState(infinite, infinite, z - 1, fz, fz, 2), ALL)
    assert torch.equal(z_next, fz)


@pytest.mark.parametrize("solver", [Anderson(memory=4), Broyden(memory=4)])
def test_memory_does_not_grow(solver):
    f = Linear()
    sizes = []
    z, state = f.z0, solver.init(f.z0)
    for _ in range(12):
        z, state = solver.update(z, f(z), state, ALL)
        sizes.append(sum(t.numel() for t in state if isinstance(t, torch.Tensor)))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("solver", [Anderson(memory=4), Broyden(memory=4)], ids=["anderson", "broyden"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_histories_are_copied_only_for_autograd(solver, requires_grad):
    """With gradients enabled in both cases: what counts is whether anything requires them."""
    f = Linear()
    f.b.requires_grad_(requires_grad)
    z, state = f.z0, solver.init(f.z0)
    places = []
    for _ in range(7):
        z, state = solver.update(z, f(z), state, ALL)
        places.append(state[0].data_ptr())
    assert (len(set(places)) == 1) != requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Picard(tol=0), "tol must be above 0, got 0"),
        (lambda: Picard(tol=float("nan")), "tol must be above 0, got nan"),
        (lambda: Picard(atol=-1), "atol must be at least 0, got -1"),
        (lambda: Anderson(max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda: Anderson(memory=0), "memory must be at least 1, got 0"),
        (lambda: Anderson(ridge=-1), "ridge must be at least 0, got -1"),
        (lambda: Anderson(mixing=2), r"mixing must be in \(0, 2\), got 2"),
        (lambda: Broyden(memory=0), "memory must be at least 1, got 0"),
        (lambda: Picard(damping=0), r"damping must be in \(0, 2\), got 0"),
        (lambda: ReversibleIteration(damping=1), r"damping must be in \(0, 1\), got 1"),
        (lambda: Picard(check_every=0), "check_every must be at least 1, got 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


INTEGERS = {
    "max_steps": lambda value: Picard(max_steps=value),
    "check_every": lambda value: Picard(check_every=value),
    "memory of anderson": lambda value: Anderson(memory=value),
    "memory of broyden": lambda value: Broyden(memory=value),
    "steps": Phantom,
    "terms": Neumann,
    "refine": Shine,
    "min_steps": lambda value: Equilibrium(torch.nn.Identity(), min_steps=value),
    "samples": lambda value: JacobianPenalty(torch.nn.Identity(), samples=value),
    "spectral_steps": lambda value: SolveLog(torch.nn.Identity(), spectral_steps=value),
    "max_steps of a call": lambda value: fixed_point(torch.cos, torch.zeros(1, 1), Picard(), max_steps=value),
}
NUMBERS = {
    "tol": lambda value: Picard(value),
    "atol": lambda value: Picard(atol=value),
    "ridge": lambda value: Anderson(ridge=value),
    "mixing": lambda value: Anderson(mixing=value),
    "damping": lambda value: Picard(damping=value),
    "damping of reversible": lambda value: ReversibleIteration(damping=value),
    "damping of phantom": lambda value: Phantom(damping=value),
    "p": VariationalDropout,
}


@pytest.mark.parametrize("value", [20.0, "20", True, np.int64(20), torch.tensor(20)], ids=repr)
@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_setting_of_another_type(name, value):
    with pytest.raises(ValueError, match=f"{name.split()[0]} must be an int, got .* of type {type(value).__name__}"):
        INTEGERS[name](value)


@pytest.mark.parametrize("value", ["1e-3", True, [0.1], np.float32(0.1)], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_another_type(name, value):
    with pytest.raises(ValueError, match=f"{name.split()[0]} must be a number, got .* of type {type(value).__name__}"):
        NUMBERS[name](value)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("while_loop", lambda: Picard(while_loop="no")),
        ("gather", lambda: Equilibrium(torch.nn.Identity(), gather="no")),
    ],
)
def test_a_bool_of_another_type(name, make):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        make()


def _family(name, batch, dtype, seed):
    """A map and its start; whether it must converge."""
    rng = generator(seed)
    b = torch.randn(batch, 5, generator=rng).to(dtype)
    z0 = torch.zeros_like(b)
    if name in ("contracting", "barely", "diverging"):  # random rotations, scaled
        radius = {"contracting": 0.7, "barely": 0.94, "diverging": 3.0}[name]
        A = Linear(size=5, radius=radius, seed=seed, dtype=dtype).A
        return (lambda z: z @ A.T + b), z0
    if name in ("flip", "shear"):  # all eigenvalues at -0.9; all at 0.6, and far from normal
        A = (
            -0.9 * torch.eye(5, dtype=dtype)
            if name == "flip"
            else (0.6 * torch.eye(5) + torch.ones(5, 5).triu(1)).to(dtype)
        )
        return (lambda z: z @ A.T + b), z0
    if name == "conv":
        cell, x = cell_and_input("conv", batch=batch, dtype=dtype)
        return (lambda z: cell(z, x.detach())), torch.zeros_like(x)
    if name == "attention":
        cell, x = cell_and_input("attention", batch=batch, dtype=dtype)
        return (lambda z: cell(z, x.detach())), torch.zeros_like(x)
    return {
        "constant": lambda z: b,
        "identity": lambda z: z.clone(),
        "nan_far_out": lambda z: torch.where(z.abs() > 2, torch.nan, 2 * z + b),
        "squaring": lambda z: z * z * 10 + b,
        "steps": lambda z: torch.sign(z) + b,
        "zero": lambda z: z * 0,
    }[name], z0


@pytest.mark.filterwarnings("error")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(
        "contracting barely flip shear diverging conv attention".split()
        + "constant identity nan_far_out squaring steps zero".split()
    ),
    solver=st.sampled_from(SOLVERS),
    batch=st.sampled_from([0, 1, 3]),
    precision=st.sampled_from(["float64", "float32", "bfloat16", "autocast"]),
    max_steps=st.sampled_from([1, 2, 7, 300]),
    seed=st.integers(0, 1000),
)
def test_any_map(name, solver, batch, precision, max_steps, seed):
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    f, z0 = _family(name, batch, dtype, seed)
    tol = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 5e-2, "autocast": 5e-2}[precision]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        solution = fixed_point(f, z0, solver(tol, max_steps))
        value, residual, steps, status, _, _ = solution
        assert value.isfinite().all() and value.shape == z0.shape
        assert ((1 <= steps) & (steps <= max_steps)).all()
        # The residual is the true one at the value returned, measured here in float64.
        fz = f(value.to(dtype)).double().flatten(1)
        true = (fz - value.double().flatten(1)).norm(dim=1) / fz.norm(dim=1).clamp_min(1e-38)
    known = residual.isfinite()
    rounding = 10 * torch.finfo(torch.bfloat16 if precision == "autocast" else dtype).eps
    torch.testing.assert_close(residual[known].double(), true[known], rtol=1e-3, atol=rounding)
    assert torch.equal(status == Status.CONVERGED, residual <= tol)
    assert (status[~known] == Status.NONFINITE).all()
    radius_is_small = "contracting barely flip shear conv attention constant identity zero".split()
    if name in radius_is_small and max_steps == 300:
        assert (status == Status.CONVERGED).all()
