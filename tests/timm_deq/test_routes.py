"""Every way to differentiate an equilibrium, for every gradient: right, the derivative of its steps, or one line.

The oracle is the dense derivative in float64: with J and K the Jacobians of f in z and x, `(I - J)^-1 K`, and with the
second derivatives of f by autograd through one dense Newton step.
"""

import pytest
import torch
from oracles import dense_jacobian, relative_error
from problems import cell_and_input, generator
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations

from timm_deq import (
    Anderson,
    Broyden,
    Equilibrium,
    Gradient,
    Implicit,
    Neumann,
    Phantom,
    Reversible,
    ReversibleIteration,
    Shine,
    Unrolled,
    VariationalDropout,
)

# Forward mode loads decompositions that torch itself still scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")

TIGHT = Anderson(1e-13, 300)
# Each so close to its limit that it has the derivative of the equilibrium.
GRADIENTS = {
    "implicit": (TIGHT, Implicit(TIGHT)),
    "phantom": (TIGHT, Phantom(80, damping=0.8)),
    "neumann": (TIGHT, Neumann(60)),
    "shine": (Broyden(1e-13, 300, memory=60), Shine(40)),
    "reversible": (ReversibleIteration(1e-14, 70, damping=0.5), Reversible()),
    "unrolled": (TIGHT, Unrolled()),
}
STEPS = ["reversible", "unrolled"]  # whose derivatives of every order are those of the steps taken
ADJOINT = ["implicit", "neumann", "shine"]
PRECISION = 1e-6


@pytest.fixture(params=GRADIENTS)
def gradient(request):
    return request.param


@pytest.fixture(scope="module", params=["conv", "attention"])
def problem(request):
    """A cell, an input, the equilibrium, and the dense derivative of the equilibrium in the input."""
    return with_derivative(*cell_and_input(request.param, batch=2))


@pytest.fixture(scope="module")
def small():
    """As `problem`, of three elements, for the routes that run every step."""
    return with_derivative(Tanh(), torch.randn(2, 3, generator=generator(4), dtype=torch.float64))


def with_derivative(cell, x):
    z = Equilibrium(cell, solver=TIGHT)(x).detach()
    x = x.detach()
    J = dense_jacobian(lambda z: cell(z, x), z)
    K = dense_jacobian(lambda x: cell(z, x), x)
    return cell, x, z, torch.linalg.solve(torch.eye(len(J), dtype=J.dtype) - J, K).detach()


def layer_of(gradient, cell):
    solver, chosen = GRADIENTS[gradient]
    return Equilibrium(cell, solver=solver, gradient=chosen)


def direction(x, seed=7):
    return torch.randn(x.shape, generator=generator(seed), dtype=x.dtype)


class Tanh(torch.nn.Module):
    """`f(z, x) = tanh(W z + x)`."""

    def __init__(self):
        super().__init__()
        weight = torch.linalg.qr(torch.randn(3, 3, generator=generator(), dtype=torch.float64)).Q
        self.weight = torch.nn.Parameter(0.6 * weight)

    def forward(self, z, x):
        return torch.tanh(z @ self.weight.T + x)


def by_func(layer, x, v):
    return torch.func.jvp(layer, (x,), (v,))[1]


def by_dual_numbers(layer, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent


@pytest.mark.parametrize(("push", "scale"), [(by_func, 1e-6), (by_dual_numbers, 1e6)], ids=["func", "dual"])
@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
def test_forward_mode(problem, gradient, push, recorded, scale):
    cell, x, z, derivative = problem
    layer, v = layer_of(gradient, cell).train(recorded), direction(x)
    with torch.set_grad_enabled(recorded):
        tangent = push(layer, x, scale * v) / scale
    assert relative_error([tangent.detach().flatten()], [derivative @ v.flatten()]) < PRECISION


def test_forward_mode_in_the_parameters(problem, gradient):
    cell, x, z, _ = problem
    layer = layer_of(gradient, cell)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    directions = {name: direction(p) for name, p in parameters.items()}

    def call(parameters):
        return torch.func.functional_call(layer, parameters, (x,))

    with torch.no_grad():
        value, tangent = torch.func.jvp(call, (parameters,), (directions,))
    # The derivative of the equilibrium along the line, by differences of equilibria on either side of it.
    h = 1e-5
    sides = [call({n: p + s * h * directions[n] for n, p in parameters.items()}).detach() for s in (1, -1)]
    torch.testing.assert_close(value, z)
    assert relative_error([tangent], [(sides[0] - sides[1]) / (2 * h)]) < 1e-5


def test_forward_mode_of_what_has_no_tangent(problem, gradient):
    cell, x, z, _ = problem
    with forward_ad.dual_level():
        output = layer_of(gradient, cell)(x)
        torch.testing.assert_close(output.detach(), z)
        assert forward_ad.unpack_dual(output).tangent is None or gradient in STEPS


def test_forward_mode_of_a_gradient_of_the_user_s_own_is_refused(problem):
    class Straight(Gradient):
        def attach(self, f, z_star, **_):
            return z_star + 0 * f(z_star)

    cell, x, _, _ = problem
    layer = Equilibrium(cell, gradient=Straight())
    with torch.no_grad(), pytest.raises(RuntimeError, match="Straight has no forward mode: .* the gradient Implicit"):
        torch.func.jvp(layer, (x,), (direction(x),))


def test_jacfwd(small, gradient):
    """All directions at once, by vmap."""
    cell, x, z, derivative = small
    with torch.no_grad():
        jacobian = torch.func.jacfwd(layer_of(gradient, cell))(x)
    assert relative_error([jacobian.reshape(derivative.shape)], [derivative]) < 10 * PRECISION


def test_the_tangent_is_not_differentiated_in_silence(gradient):
    """Reverse mode over forward mode; torch itself has none for softmax and GroupNorm."""
    cell = Tanh()
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    v = direction(x)
    with forward_ad.dual_level():
        output = layer_of(gradient, cell)(forward_ad.make_dual(x, v))
        tangent = forward_ad.unpack_dual(output).tangent
        if gradient in STEPS:
            (found,) = torch.autograd.grad(tangent.sum(), x, retain_graph=True)
        else:
            with pytest.raises(RuntimeError, match="tangent of an equilibrium cannot be differentiated .* Unrolled"):
                torch.autograd.grad(tangent.sum(), x, retain_graph=True)
            return
    h = 1e-5
    plain = [tangent_at(gradient, cell, x.detach() + s * h * direction(x, 8), v).sum() for s in (1, -1)]
    torch.testing.assert_close((found * direction(x, 8)).sum(), (plain[0] - plain[1]) / (2 * h), rtol=1e-4, atol=1e-6)


def tangent_at(gradient, cell, x, v):
    with torch.no_grad():
        return by_func(layer_of(gradient, cell), x, v)


@pytest.mark.parametrize("gradient", ADJOINT)
def test_forward_mode_over_reverse_mode_is_refused(problem, gradient):
    cell, x, z, _ = problem
    x = x.clone().requires_grad_()
    with forward_ad.dual_level():
        output = layer_of(gradient, cell)(forward_ad.make_dual(x, direction(x)))
        with pytest.raises(RuntimeError, match="no forward mode over its reverse mode: use the gradient Unrolled"):
            torch.autograd.grad(output.sum(), x)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_reverse_mode(problem, gradient, scale):
    cell, x, z, derivative = problem
    x, g = x.clone().requires_grad_(), direction(x)
    (found,) = torch.autograd.grad(layer_of(gradient, cell)(x), x, scale * g)
    assert relative_error([found.flatten() / scale], [derivative.T @ g.flatten()]) < PRECISION


def second_derivatives(equilibrium, cell, x, scale=1.0):
    """The gradient, in x and all parameters, of the squared gradients of a loss of the equilibrium."""
    inputs = [x, *cell.parameters()]
    loss = scale * (equilibrium(x).square() * direction(x)).sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return list(torch.autograd.grad(sum((g / scale).square().sum() for g in first), inputs))


def newton_step(cell, z):
    """The equilibrium `z + (I - J)^-1 (f(z) - z)`, J on the graph: right in value, first and second derivatives of z,
    where it is applied twice."""

    def equilibrium(x):
        found = z
        for _ in range(2):
            J = torch.autograd.functional.jacobian(lambda z: cell(z, x), found, create_graph=True)
            matrix = torch.eye(z.numel(), dtype=z.dtype) - J.reshape(z.numel(), z.numel())
            found = found + torch.linalg.solve(matrix, (cell(found, x) - found).flatten()).view_as(z)
        return found

    return equilibrium


@pytest.mark.parametrize(
    ("gradient", "scale"), [("implicit", 1e-6), ("implicit", 1e6), *((gradient, 1.0) for gradient in STEPS)]
)
def test_second_derivatives(problem, gradient, scale):
    cell, x, z, _ = problem
    x = x.clone().requires_grad_()
    found = second_derivatives(layer_of(gradient, cell), cell, x, scale)
    expected = second_derivatives(newton_step(cell, z), cell, x)
    assert relative_error(found, expected) < (1e-4 if gradient == "reversible" else 1e-5)  # its steps are rounded


@pytest.mark.parametrize("gradient", ["neumann", "shine"])
def test_a_second_derivative_of_an_approximation_is_refused(problem, gradient):
    cell, x, z, _ = problem
    with pytest.raises(RuntimeError, match=f"gradient {gradient.title()} has no second derivative.* Use Implicit"):
        second_derivatives(layer_of(gradient, cell), cell, x.clone().requires_grad_())


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_second_derivatives_in_parametrised_weights(norm):
    """Computed once for the solve: a power step more would be another map."""
    cell, x = cell_and_input("attention", batch=1)
    getattr(parametrizations, norm)(cell.qkv)
    cell.eval()
    found, expected = (second_derivatives(layer_of(g, cell), cell, x) for g in ("implicit", "unrolled"))
    assert relative_error(found, expected) < 1e-6


def test_second_derivatives_under_a_mask():
    cell, x = cell_and_input("conv", batch=1)
    cell.drop = VariationalDropout(0.5)
    results = []
    for gradient in ("implicit", "unrolled"):
        torch.manual_seed(1)
        results.append(second_derivatives(layer_of(gradient, cell), cell, x))
    assert relative_error(*results) < 1e-5


def test_third_derivatives_are_refused(problem):
    cell, x, z, _ = problem
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer_of("implicit", cell)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of an equilibrium needs"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


def test_second_derivatives_in_a_tensor_that_is_no_parameter():
    cell, x = cell_and_input("attention", batch=1)
    cell.requires_grad_(False)
    scale = torch.ones((), dtype=x.dtype, requires_grad=True)
    cell.register_forward_hook(lambda cell, args, output: output * scale / 2)
    z = layer_of("implicit", cell)(x)
    assert torch.autograd.grad(z.sum(), scale, retain_graph=True)[0].abs() > 0
    with pytest.raises(RuntimeError, match="needs the tensors that the cell depends on to be its input and its param"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_second_derivatives_where_the_input_depends_on_the_cell():
    """A cell used twice: its parameters lead to the input of the second solve."""
    cell, x = cell_and_input("attention", batch=1)
    layer = layer_of("implicit", cell)
    with pytest.raises(RuntimeError, match="none of which leads to another"):
        second_derivatives(lambda x: layer(layer(x)), cell, x)


def test_the_jacobian_with_a_graph(problem):
    cell, x, z, derivative = problem
    layer = layer_of("implicit", cell)
    jacobian = torch.autograd.functional.jacobian(layer, x, create_graph=True)
    assert relative_error([jacobian.detach().reshape(derivative.shape)], [derivative]) < PRECISION


def test_batched_cotangents(problem, gradient):
    cell, x, z, derivative = problem
    x = x.clone().requires_grad_()
    eye = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    output = layer_of(gradient, cell)(x)
    if gradient in ADJOINT:
        with pytest.raises(RuntimeError, match="is_grads_batched=True .* use torch.func.jacfwd or the gradient Unr"):
            torch.autograd.grad(output, x, eye, is_grads_batched=True)
        return
    (found,) = torch.autograd.grad(output, x, eye, is_grads_batched=True)
    assert relative_error([found.reshape(derivative.shape)], [derivative]) < PRECISION


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torch_func_in_reverse_mode(small, gradient, training):
    cell, x, z, derivative = small
    layer, g = layer_of(gradient, cell).train(training), direction(x)
    if gradient in ADJOINT:
        for route in (torch.func.grad(lambda x: layer(x).sum()), torch.func.jacrev(layer)):
            with pytest.raises(RuntimeError, match="does not serve torch.func.grad, vjp and jacrev: use .* Unrolled"):
                route(x)
        return
    (found,) = torch.func.vjp(layer, x)[1](g)
    assert relative_error([found.flatten()], [derivative.T @ g.flatten()]) < 10 * PRECISION
    jacobian = torch.func.jacrev(layer)(x)
    assert relative_error([jacobian.reshape(derivative.shape)], [derivative]) < 10 * PRECISION


def test_per_sample_gradients(small, gradient):
    """vmap(grad) in the parameters, against one sample at a time."""
    cell, x, z, _ = small
    layer = layer_of(gradient, cell)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x.unsqueeze(0),)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    if gradient in ADJOINT:
        with pytest.raises(RuntimeError, match="does not serve torch.func.grad"):
            per_sample(parameters, x)
        return
    found = per_sample(parameters, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(layer(x[i : i + 1]).square().sum(), list(layer.parameters()))
        assert relative_error([found[name][i] for name in parameters], list(expected)) < 10 * PRECISION


def test_vmap_of_a_solve(problem, gradient):
    cell, x, z, _ = problem
    layer = layer_of(gradient, cell)
    with torch.no_grad():
        batched = torch.func.vmap(lambda x: layer(x.unsqueeze(0)).squeeze(0))(x)
    torch.testing.assert_close(batched, z)
