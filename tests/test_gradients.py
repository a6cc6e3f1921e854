import pytest
import torch
from oracles import implicit_gradients, newton, phantom_gradients, relative_error
from problems import cell_and_input, generator

from timm_deq import Anderson, Broyden, Equilibrium, Implicit, Phantom, Picard, SolveLog, Unrolled

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


@pytest.mark.parametrize("solver", [Picard(1e-13, 300), Anderson(1e-13, 100), Broyden(1e-13, 100)])
@pytest.mark.parametrize("cell_name", CELLS)
def test_unrolled_to_convergence_is_implicit(cell_name, solver):
    cell, x = cell_and_input(cell_name)
    g = cotangent(x)
    z_star, grads = gradients(Equilibrium(cell, solver=solver, gradient=Unrolled()), x, g)
    assert relative_error(grads, implicit_gradients(cell, x, z_star, g)) < 1e-6


def test_unrolled_is_the_derivative_of_the_truncated_iteration():
    cell, x = cell_and_input("attention", batch=1)
    layer = Equilibrium(cell, solver=Anderson(1e-30, 4, memory=3), gradient=Unrolled())
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_second_derivative_is_right_or_refused():
    cell, x = cell_and_input("attention", batch=1)
    unrolled = Equilibrium(cell, solver=Picard(1e-10, 30), gradient=Unrolled())
    assert torch.autograd.gradgradcheck(unrolled, (x,))
    # The sum has a constant gradient: nothing in it shows that the pull-back depends on x.
    for loss in (lambda z: z.sum(), lambda z: z.square().sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss(Equilibrium(cell)(x)), x, create_graph=True)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(), Unrolled()])
@pytest.mark.parametrize("training", [True, False])
def test_the_value_is_the_equilibrium_in_every_mode(gradient, training):
    cell, x = cell_and_input("conv", dtype=torch.float32)
    layer = Equilibrium(cell, gradient=gradient).train(training)
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


def test_backward_twice_through_one_forward():
    cell, x = cell_and_input("conv")
    z_star = Equilibrium(cell)(x)
    (first,) = torch.autograd.grad(z_star.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(z_star.sum(), x)
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
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
