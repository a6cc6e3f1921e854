import pytest
import torch
from oracles import implicit_gradients, newton, phantom_gradients, relative_error
from problems import cell_and_input, generator
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from timm_deq import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    ReversibleIteration,
    Shine,
    Solution,
    SolveLog,
    Unrolled,
    fixed_point,
)
from timm_deq.solvers.broyden import BroydenState

TIGHT = Anderson(1e-13, 300)
CELLS = ["conv", "attention"]


def gradients(layer, x, g, *, scale=1.0):
    """The equilibrium and the gradients of `scale * <z*, g>` in x and the parameters, divided by the scale."""
    z_star = layer(x)
    grads = torch.autograd.grad((z_star * g).sum() * scale, [x, *layer.cell.parameters()])
    return z_star.detach(), [grad / scale for grad in grads]


def cotangent(x):
    return torch.randn(x.shape, generator=generator(7), dtype=x.dtype)


@pytest.mark.parametrize("cell_name", CELLS)
def test_the_equilibrium_against_newton(cell_name):
    cell, x = cell_and_input(cell_name)
    z_star = Equilibrium(cell, solver=TIGHT)(x)
    torch.testing.assert_close(z_star, newton(lambda z: cell(z, x), z_star + 0.01), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
@pytest.mark.parametrize("cell_name", CELLS)
def test_implicit_against_the_dense_solve(cell_name, solver, scale):
    cell, x = cell_and_input(cell_name)
    layer = Equilibrium(cell, solver=TIGHT, gradient=Implicit(solver(1e-10, 500)))
    g = cotangent(x)
    z_star, grads = gradients(layer, x, g, scale=scale)
    assert relative_error(grads, implicit_gradients(cell, x, z_star, g)) < 1e-6


def test_implicit_in_float32_does_not_depend_on_the_scale_of_the_loss():
    cell, x = cell_and_input("conv", dtype=torch.float32)
    layer = Equilibrium(cell)
    g = cotangent(x)
    _, reference = gradients(layer, x, g)
    for scale in (2.0**-100, 2.0**80):  # squares of such gradients leave the range of float32
        assert relative_error(gradients(layer, x, g, scale=scale)[1], reference) < 1e-6


def test_implicit_stops_at_its_relative_tolerance():
    cell, x = cell_and_input("conv")
    g = cotangent(x)
    errors = []
    for tol in (1e-2, 1e-4, 1e-8):
        layer = Equilibrium(cell, solver=TIGHT, gradient=Implicit(Picard(tol, 500)))
        z_star, grads = gradients(layer, x, g)
        errors.append(relative_error(grads, implicit_gradients(cell, x, z_star, g)))
    assert errors[0] < 3e-1 and errors[1] < 3e-3 and errors[2] < 1e-7
    assert errors[0] > 1e-6  # it did stop


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (3, 0.5), (5, 0.7)])
@pytest.mark.parametrize("cell_name", CELLS)
def test_phantom_against_its_truncated_series(cell_name, steps, damping):
    cell, x = cell_and_input(cell_name)
    layer = Equilibrium(cell, solver=TIGHT, gradient=Phantom(steps, damping=damping))
    g = cotangent(x)
    z_star, grads = gradients(layer, x, g)
    expected = phantom_gradients(cell, x, z_star, g, steps=steps, damping=damping)
    assert relative_error(grads, expected) < 1e-9


def test_phantom_tends_to_implicit():
    cell, x = cell_and_input("conv")
    g = cotangent(x)
    errors = []
    for steps in (1, 4, 16, 64):
        z_star, grads = gradients(Equilibrium(cell, solver=TIGHT, gradient=Phantom(steps, damping=0.8)), x, g)
        errors.append(relative_error(grads, implicit_gradients(cell, x, z_star, g)))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-5


@pytest.mark.parametrize("terms", [1, 2, 6])
@pytest.mark.parametrize("cell_name", CELLS)
def test_neumann_against_its_truncated_series(cell_name, terms):
    cell, x = cell_and_input(cell_name)
    g = cotangent(x)
    z_star, grads = gradients(Equilibrium(cell, solver=TIGHT, gradient=Neumann(terms)), x, g)
    assert relative_error(grads, phantom_gradients(cell, x, z_star, g, steps=terms, damping=1.0)) < 1e-9


def test_neumann_tends_to_implicit():
    cell, x = cell_and_input("conv")
    g = cotangent(x)
    errors = []
    for terms in (1, 4, 16, 64):
        z_star, grads = gradients(Equilibrium(cell, solver=TIGHT, gradient=Neumann(terms)), x, g)
        errors.append(relative_error(grads, implicit_gradients(cell, x, z_star, g)))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-12


class SmallAffine(nn.Module):
    """`f(z, x) = A z + x`, whose inverse Broyden's method knows exactly once it has met all directions."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        rng = generator(3)
        self.A = nn.Parameter(0.5 * torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64)).Q)

    def forward(self, z, x):
        return z @ self.A.T + x


def test_shine_is_implicit_where_the_inverse_is_exact():
    cell = SmallAffine(1)  # in one dimension, a secant of a line is the line
    x = torch.randn(3, 1, generator=generator(1), dtype=torch.float64).requires_grad_()
    g = cotangent(x)
    z_star, grads = gradients(Equilibrium(cell, solver=Broyden(1e-14, 40), gradient=Shine()), x, g)
    assert relative_error(grads, implicit_gradients(cell, x, z_star, g)) < 1e-12
    # In four, a state made by hand: (J - I)^-1 = -I + sum_i u_i e_i^T.
    J, eye = SmallAffine(4).A.detach(), torch.eye(4, dtype=torch.float64)
    us = (torch.linalg.inv(J - eye) + eye).T.unsqueeze(0)
    g = torch.randn(1, 4, generator=generator(1), dtype=torch.float64)
    state = BroydenState(us, eye.unsqueeze(0), g, g, g, 5)
    for refine in (0, 2):
        u = Shine(refine).solve(lambda u: u @ J + g, g, None, state, transposed=True)
        u = u.value if isinstance(u, Solution) else u
        torch.testing.assert_close(u, torch.linalg.solve(eye - J.T, g.T).T)
        t = Shine(refine).solve(lambda t: t @ J.T + g, g, None, state, transposed=False)
        t = t.value if isinstance(t, Solution) else t
        torch.testing.assert_close(t, torch.linalg.solve(eye - J, g.T).T)


@pytest.mark.parametrize("cell_name", CELLS)
def test_shine_is_biased_and_refining_mends_it(cell_name):
    cell, x = cell_and_input(cell_name)
    g = cotangent(x)
    errors = []
    for refine in (0, 1, 3, 10):
        layer = Equilibrium(cell, solver=Broyden(1e-13, 300, memory=40), gradient=Shine(refine))
        z_star, grads = gradients(layer, x, g)
        errors.append(relative_error(grads, implicit_gradients(cell, x, z_star, g)))
    jfb = gradients(Equilibrium(cell, solver=TIGHT, gradient=Neumann(1)), x, g)[1]
    assert 1e-3 < errors[0] < relative_error(jfb, implicit_gradients(cell, x, z_star, g))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-7
    assert errors[2] < {"conv": 1e-3, "attention": 2e-7}[cell_name]  # the shared inverse is built upon, not dropped


@pytest.mark.parametrize("push", [False, True])
def test_the_inverse_that_shine_shares_is_applied_in_float32_under_autocast(push):
    """Of a map that casts nothing; in either mode."""
    matrix = 0.6 * nn.init.orthogonal_(torch.empty(8, 8), generator=generator())
    x, v = torch.randn(2, 3, 8, generator=generator(1))
    solver, found = Broyden(1e-6, 40, memory=40), []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            state = fixed_point(lambda z: (z.unsqueeze(1) * matrix).sum(-1) + x, torch.zeros_like(x), solver).state
            found.append(Shine().solve(torch.clone, v, None, state, transposed=not push))  # asks for no product
    assert torch.equal(*found)


def test_shine_costs_no_product_and_refining_one_more_than_its_steps():
    cell, x = cell_and_input("conv")
    for refine, products in ((0, []), (3, [4, 4, 4])):
        layer = Equilibrium(cell, solver=Broyden(), gradient=Shine(refine))
        with SolveLog(layer) as log:
            (layer(x) * cotangent(x)).sum().backward()
        assert log.backward_steps.tolist() == products


@pytest.mark.parametrize("solver", [Broyden(1e-4, 60, memory=60), Broyden(1e-4, 60, memory=4)])
def test_the_inverse_that_shine_shares_does_not_depend_on_batch_mates(solver):
    cell, x = cell_and_input("conv")
    x = (x * torch.tensor([1.0, 1.0, 0.1]).view(3, 1, 1, 1)).detach()  # the third takes longer

    def adjoint(x):
        solution = fixed_point(lambda z: cell(z, x), torch.zeros_like(x), solver)
        g = torch.ones_like(x)
        return solution.steps, Shine().solve(lambda u: u, g, None, solution.state, transposed=True)

    steps, together = adjoint(x)
    _, alone = adjoint(x[:1])
    assert steps[2] > steps[0] + 5
    torch.testing.assert_close(together[:1], alone, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("damping", [0.5, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
@pytest.mark.parametrize("cell_name", CELLS)
def test_reversible_is_the_exact_gradient_of_its_steps(cell_name, steps, damping):
    cell, x = cell_and_input(cell_name)
    g = cotangent(x)
    solver = ReversibleIteration(1e-30, steps, damping=damping)
    value, grads = gradients(Equilibrium(cell, solver=solver, gradient=Reversible()), x, g)
    expected_value, expected = gradients(Equilibrium(cell, solver=solver, gradient=Unrolled()), x, g)
    assert torch.equal(value, expected_value)
    assert relative_error(grads, expected) < 1e-6


def test_reversible_makes_each_evaluation_once_more():
    cell, x = cell_and_input("conv")
    calls = []
    cell.register_forward_hook(lambda *_: calls.append(1))
    z = Equilibrium(cell, solver=ReversibleIteration(1e-30, 9), gradient=Reversible())(x)
    assert len(calls) == 9
    z.sum().backward()
    assert len(calls) == 9 + 8  # the last evaluation measured the residual and led nowhere


def test_reversible_in_float32_at_30_steps():
    cell, x = cell_and_input("attention", dtype=torch.float32)
    g = cotangent(x)
    solver = ReversibleIteration(1e-30, 30)
    _, grads = gradients(Equilibrium(cell, solver=solver, gradient=Reversible()), x, g)
    _, expected = gradients(Equilibrium(cell, solver=solver, gradient=Unrolled()), x, g)
    assert relative_error(grads, expected) < 1e-5


def test_reversible_tends_to_implicit():
    cell, x = cell_and_input("attention")
    g = cotangent(x)
    for steps, most in ((10, 1e-1), (20, 1e-3), (40, 1e-8)):
        layer = Equilibrium(cell, solver=ReversibleIteration(1e-30, steps, damping=0.8), gradient=Reversible())
        z_star, grads = gradients(layer, x, g)
        assert most / 1e4 < relative_error(grads, implicit_gradients(cell, x, z_star, g)) < most


def test_reversible_where_samples_end_at_different_steps_or_before_the_last():
    cell, x = cell_and_input("conv")
    g = cotangent(x)
    x = (x * torch.tensor([1.0, 1.0, 0.3]).view(3, 1, 1, 1)).detach().requires_grad_()
    solver = ReversibleIteration(1e-3, 25, damping=0.5)
    layer = Equilibrium(cell, solver=solver, gradient=Reversible())
    with SolveLog(layer) as log:
        _, grads = gradients(layer, x, g)
    assert len(set(log.steps.tolist())) > 1
    assert relative_error(grads, gradients(Equilibrium(cell, solver=solver, gradient=Unrolled()), x, g)[1]) < 1e-6

    class Escaping(SmallAffine):  # from near its fixed point it moves away: the first iterates are the best
        def forward(self, z, x):
            return super().forward(4 * z, x)

    cell, x = Escaping(), torch.randn(3, 4, generator=generator(2), dtype=torch.float64).requires_grad_()
    grads = []
    for gradient in (Reversible(), Unrolled()):
        layer = Equilibrium(cell, solver=ReversibleIteration(1e-30, 12), gradient=gradient)
        grads.append(gradients(layer, x, cotangent(x))[1])
    assert relative_error(*grads) < 1e-6


def test_reversible_backward_twice_and_with_parametrised_weights():
    cell, x = cell_and_input("attention")
    parametrizations.weight_norm(cell.qkv)
    g = cotangent(x)
    solver = ReversibleIteration(1e-30, 12)
    z = Equilibrium(cell, solver=solver, gradient=Reversible())(x)
    inputs = [x, *cell.parameters()]
    first, second = (torch.autograd.grad(z, inputs, g, retain_graph=True) for _ in range(2))
    expected = gradients(Equilibrium(cell, solver=solver, gradient=Unrolled()), x, g)[1]
    assert relative_error(list(first), expected) < 1e-9 and relative_error(list(second), expected) < 1e-9
    assert not parametrize._cache_enabled and not parametrize._cache


def test_reversible_stores_nothing_of_an_evaluation():
    """Bytes that the tape holds between forward and backward, whatever the number of steps."""
    cell, x = cell_and_input("conv")
    held = {}
    for gradient in (Reversible(), Unrolled()):
        for steps in (5, 10, 20):
            layer = Equilibrium(cell, solver=ReversibleIteration(1e-30, steps), gradient=gradient)
            storages = {}

            def pack(t, storages=storages):
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() if t.is_floating_point() else 0
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                layer(x)
            held[type(gradient).__name__, steps] = sum(storages.values())
    assert held["Reversible", 5] == held["Reversible", 20]
    assert held["Unrolled", 20] > 1.8 * held["Unrolled", 10]


@pytest.mark.parametrize("solver", [Picard(1e-13, 300), Anderson(1e-13, 100), Broyden(1e-13, 100)])
@pytest.mark.parametrize("cell_name", CELLS)
def test_unrolled_to_convergence_is_implicit(cell_name, solver):
    cell, x = cell_and_input(cell_name)
    g = cotangent(x)
    z_star, grads = gradients(Equilibrium(cell, solver=solver, gradient=Unrolled()), x, g)
    assert relative_error(grads, implicit_gradients(cell, x, z_star, g)) < 1e-6


@pytest.mark.parametrize(
    "solver", [Picard(1e-12, 99), Anderson(1e-12, 99), Broyden(1e-12, 99), ReversibleIteration(1e-12, 99)]
)
def test_unrolled_beside_a_sample_that_is_solved_at_once(solver):
    """Its residuals are zero, and what solvers divide by them is unused, but on the tape."""
    cell = SmallAffine()
    x = torch.stack([torch.zeros(4), torch.ones(4)]).double().requires_grad_()
    g = cotangent(x)
    z_star, grads = gradients(Equilibrium(cell, solver=solver, gradient=Unrolled()), x, g)
    J, eye = cell.A.detach(), torch.eye(4, dtype=torch.float64)
    u = torch.linalg.solve(eye - J.T, g[1])
    torch.testing.assert_close(grads[1], u.outer(z_star[1]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grads[0], torch.stack([torch.zeros_like(u), u]), rtol=1e-6, atol=1e-9)


def test_unrolled_is_the_derivative_of_the_truncated_iteration():
    cell, x = cell_and_input("attention", batch=1)
    layer = Equilibrium(cell, solver=Anderson(1e-30, 4, memory=3), gradient=Unrolled())
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_second_derivative_is_right_or_refused():
    cell, x = cell_and_input("attention", batch=1)
    unrolled = Equilibrium(cell, solver=Picard(1e-10, 30), gradient=Unrolled())
    assert torch.autograd.gradgradcheck(unrolled, (x,))
    reversible = Equilibrium(cell, solver=ReversibleIteration(1e-10, 12), gradient=Reversible())
    assert torch.autograd.gradgradcheck(reversible, (x,))
    implicit = Equilibrium(cell, solver=TIGHT, gradient=Implicit(TIGHT))
    assert torch.autograd.gradgradcheck(implicit, (x,))
    # The sum has a constant gradient: nothing in it shows that the pull-back depends on x.
    for solver, gradient in ((Anderson(), Neumann()), (Broyden(), Shine())):
        for loss in (lambda z: z.sum(), lambda z: z.square().sum()):
            layer = Equilibrium(cell, solver=solver, gradient=gradient)
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(loss(layer(x)), x, create_graph=True)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(), Neumann(), Shine(), Reversible(), Unrolled()])
@pytest.mark.parametrize("training", [True, False])
def test_the_value_is_the_equilibrium_in_every_mode(gradient, training):
    cell, x = cell_and_input("conv", dtype=torch.float32)
    solver = {Shine: Broyden(), Reversible: ReversibleIteration()}.get(type(gradient), Anderson())
    layer = Equilibrium(cell, solver=solver, gradient=gradient).train(training)
    tracked = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(tracked, layer(x), rtol=1e-5, atol=1e-6)
    tracked.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_implicit_evaluates_f_once_beyond_the_solve_and_never_backward():
    cell, x = cell_and_input("conv")
    calls = []
    cell.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    layer = Equilibrium(cell)
    with SolveLog(layer) as log:
        z_star = layer(x)
        forward_calls = len(calls)
        (z_star * cotangent(x)).sum().backward()
    assert calls.count(True) == 1 and forward_calls == log.steps.max() + 1
    assert len(calls) == forward_calls
    assert log.summary()["backward_mean_steps"] > 1


@pytest.mark.parametrize("gradient", [Implicit(), Shine(3)])
def test_backward_twice_through_one_forward(gradient):
    cell, x = cell_and_input("conv")
    z_star = Equilibrium(cell, solver=Broyden(memory=2), gradient=gradient)(x)
    (first,) = torch.autograd.grad(z_star, x, cotangent(x), retain_graph=True)
    (second,) = torch.autograd.grad(z_star, x, cotangent(x))
    assert torch.equal(first, second)


def test_an_infinite_gradient_reaches_the_parameters():
    """As a gradient scaler needs, which skips a step whose gradients overflowed."""
    cell, x = cell_and_input("conv", dtype=torch.float32)
    layer = Equilibrium(cell)
    (layer(x) * torch.inf).sum().backward()
    assert not all(p.grad.isfinite().all() for p in cell.parameters())


def test_a_zero_gradient_costs_one_evaluation():
    cell, x = cell_and_input("conv")
    layer = Equilibrium(cell)
    with SolveLog(layer) as log:
        (layer(x) * 0).sum().backward()
    assert not x.grad.any() and log.summary()["backward_mean_steps"] == 1


def test_a_constant_map_has_gradient_in_its_parameter_only():
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.ones(3))

        def forward(self, z, x):
            return self.bias.expand_as(z)

    cell = Constant()
    Equilibrium(cell)(torch.zeros(2, 3)).sum().backward()
    torch.testing.assert_close(cell.bias.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phantom(0), "steps must be at least 1, got 0"),
        (lambda: Phantom(damping=0), r"damping must be in \(0, 1\], got 0"),
        (lambda: Phantom(damping=1.5), r"damping must be in \(0, 1\], got 1.5"),
        (lambda: Neumann(0), "terms must be at least 1, got 0"),
        (lambda: Shine(-1), "refine must be at least 0, got -1"),
        (
            lambda: Equilibrium(SmallAffine(), solver=Anderson(), gradient=Shine()),
            "solver must be Broyden for the gradient Shine, got Anderson",
        ),
        (
            lambda: Equilibrium(SmallAffine(), solver=Picard(), gradient=Reversible()),
            "solver must be ReversibleIteration for the gradient Reversible, got Picard",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
