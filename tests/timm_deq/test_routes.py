"""Every way to differentiate an equilibrium, for every gradient: right, the derivative of its steps, or one line.

The oracle is the dense derivative in float64: with J and K the Jacobians of f in z and x, `(I - J)^-1 K`, and with the
second derivatives of f by autograd through one dense Newton step.
"""

import pytest
import torch
from oracles import dense_jacobian, relative_error
from problems import cell_and_input, generator
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations

from timm_deq import (
    Anderson,
    Broyden,
    Equilibrium,
    FixedPointCorrection,
    Gradient,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    ReversibleIteration,
    Shine,
    SolveLog,
    Unrolled,
    VariationalDropout,
    WarmStart,
)

# Forward mode loads decompositions that torch itself still scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

TIGHT = Anderson(1e-13, 60)
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
EVERY_ORDER = ["phantom", *STEPS]
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


def hessian_vector(equilibrium, x, v):
    """`(d/dx)^2 l v` for a loss l of the equilibrium and of x itself: one that is not linear in either."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(equilibrium, x), x, create_graph=True)
    return torch.autograd.grad((g * v).sum(), x)[0]


WEIGHTS = torch.linspace(-1, 2, 32, dtype=torch.float64)


def loss_of(equilibrium, x):
    return (equilibrium(x).square().flatten() * WEIGHTS[: x.numel()]).sum() + x.pow(3).sum()


def autograd_over_jvp(loss, x, v):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(torch.func.jvp(loss, (x,), (v,))[1], x)[0]


def autograd_over_dual(loss, x, v):
    x = x.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, v))).tangent
        return torch.autograd.grad(tangent, x)[0]


def grad_over_jvp(loss, x, v):
    return torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (v,))[1])(x)


def jvp_over_grad(loss, x, v):
    return torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1]


def dual_over_autograd(loss, x, v):
    x = x.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        return forward_ad.unpack_dual(torch.autograd.grad(loss(dual), dual)[0]).tangent


def grad_over_grad(loss, x, v):
    return torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(x)


def hessian(loss, x, v):
    return (torch.func.hessian(loss)(x).reshape(v.numel(), -1) @ v.flatten()).view_as(x)


def autograd_over_vjp(loss, x, v):
    x = x.clone().requires_grad_()
    (g,) = torch.func.vjp(loss, x)[1](torch.ones((), dtype=x.dtype))
    return torch.autograd.grad((g * v).sum(), x)[0]


def jvp_over_jvp(loss, x, v):
    columns = [
        torch.func.jvp(lambda x: torch.func.jvp(loss, (x,), (v,))[1], (x,), (e.view_as(x),))[1]
        for e in torch.eye(x.numel(), dtype=x.dtype)
    ]
    return torch.stack(columns).view_as(x)


SECOND = [autograd_over_jvp, autograd_over_dual, grad_over_jvp, jvp_over_grad, dual_over_autograd]
SECOND += [grad_over_grad, hessian, autograd_over_vjp, jvp_over_jvp]


@pytest.mark.parametrize(
    ("route", "frozen"), [*((r, False) for r in SECOND), (autograd_over_jvp, True), (grad_over_jvp, True)]
)
def test_one_mode_over_another(small, gradient, route, frozen):
    """Right, or one line, also where x alone is differentiated, by a transform other than the innermost."""
    cell, x, z, _ = small
    cell.requires_grad_(not frozen)
    layer, v = layer_of(gradient, cell), direction(x)
    if gradient in ADJOINT:
        with pytest.raises(RuntimeError, match="use the gradient Unrolled"):
            route(lambda x: loss_of(layer, x), x, v)
    else:
        found = route(lambda x: loss_of(layer, x), x, v)
        assert relative_error([found.detach()], [hessian_vector(newton_step(cell, z), x, v)]) < 1e-4
    cell.requires_grad_()


@pytest.mark.parametrize("gradient", ADJOINT)
def test_the_tangent_alone_is_not_differentiated_in_silence(gradient):
    """A loss that is linear in the equilibrium, beside which something else has a derivative."""
    layer, x = layer_of(gradient, Tanh().requires_grad_(False)), torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="tangent of an equilibrium cannot be differentiated .* Unrolled"):
        autograd_over_jvp(lambda x: layer(x).sum() + x.pow(3).sum(), x, direction(x))


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
    """The equilibrium `z + (I - J)^-1 (f(z) - z)`, J in the graph: applied twice, right up to third derivatives."""

    def equilibrium(x):
        found = z
        for _ in range(2):
            J = torch.autograd.functional.jacobian(lambda z: cell(z, x), found, create_graph=True)
            matrix = torch.eye(z.numel(), dtype=z.dtype) - J.reshape(z.numel(), z.numel())
            found = found + torch.linalg.solve(matrix, (cell(found, x) - found).flatten()).view_as(z)
        return found

    return equilibrium


@pytest.mark.parametrize(
    ("gradient", "scale"),
    [
        ("implicit", 1e-6),
        ("implicit", 1e6),
        ("phantom", 1e-6),
        ("phantom", 1e6),
        ("reversible", 1e6),
        ("unrolled", 1e-6),
    ],
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


def third_derivative(equilibrium, x, scale=1.0):
    x, v, w = x.clone().requires_grad_(), direction(x, 7), direction(x, 8)
    (first,) = torch.autograd.grad(scale * loss_of(equilibrium, x), x, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), x, create_graph=True)
    return torch.autograd.grad((second * w).sum(), x)[0] / scale


def test_third_derivatives(problem, gradient):
    cell, x, z, _ = problem
    if gradient in ADJOINT:
        line = "second derivative of an equilibrium needs" if gradient == "implicit" else "has no second derivative"
        with pytest.raises(RuntimeError, match=f"{line}.* Unrolled"):
            third_derivative(layer_of(gradient, cell), x)
        return
    expected = third_derivative(newton_step(cell, z), x)
    for scale in (1e-6, 1e6):
        found = third_derivative(layer_of(gradient, cell), x, scale)
        assert relative_error([found], [expected]) < 1e-4


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
        with pytest.raises(RuntimeError, match="is_grads_batched=True .* use torch.func.jacrev or the gradient Unr"):
            torch.autograd.grad(output, x, eye, is_grads_batched=True)
        return
    (found,) = torch.autograd.grad(output, x, eye, is_grads_batched=True)
    assert relative_error([found.reshape(derivative.shape)], [derivative]) < PRECISION


def test_batched_tangents(small, gradient):
    cell, x, z, derivative = small
    layer = layer_of(gradient, cell)
    if gradient in ADJOINT:
        with pytest.raises(RuntimeError, match='strategy="forward-mode" does .* torch.func.jacfwd or the gradient Unr'):
            torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy="forward-mode")
        return
    found = torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy="forward-mode")
    assert relative_error([found.reshape(derivative.shape)], [derivative]) < 10 * PRECISION


@pytest.mark.parametrize(("training", "scale"), [(True, 1e-6), (False, 1e6)], ids=["train", "eval"])
def test_torch_func_in_reverse_mode(small, gradient, training, scale):
    cell, x, z, derivative = small
    layer, g = layer_of(gradient, cell).train(training), direction(x)
    (found,) = torch.func.vjp(layer, x)[1](scale * g)
    assert relative_error([found.detach().flatten() / scale], [derivative.T @ g.flatten()]) < 10 * PRECISION
    found = torch.func.grad(lambda x: (layer(x) * g).sum())(x)
    assert relative_error([found.flatten()], [derivative.T @ g.flatten()]) < 10 * PRECISION
    jacobian = torch.func.jacrev(layer)(x)
    assert relative_error([jacobian.reshape(derivative.shape)], [derivative]) < 10 * PRECISION


def loss_in(layer):
    """A loss as a function of parameters and input, and the parameters."""

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    return loss, {name: p.detach() for name, p in layer.named_parameters()}


def gradients_at(gradient, scale, x):
    """The gradients in input and parameters by autograd, of a cell whose parameters are scaled."""
    cell, x = Tanh(), x.clone().requires_grad_()
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(scale)
    return torch.autograd.grad(layer_of(gradient, cell)(x).square().sum(), [x, *cell.parameters()])


def test_torch_func_in_other_parameters_than_those_of_the_module(small, gradient):
    """The backward pass of a vjp comes when the module has its own again."""
    _, x, _, _ = small
    loss, parameters = loss_in(layer_of(gradient, Tanh()))
    pull = torch.func.vjp(loss, {name: 0.9 * p for name, p in parameters.items()}, x)[1]
    found, in_x = pull(torch.ones((), dtype=x.dtype))
    assert relative_error([in_x, *found.values()], list(gradients_at(gradient, 0.9, x))) < 10 * PRECISION


def test_per_sample_gradients(small, gradient):
    """vmap(grad) over samples, against one sample at a time."""
    _, x, _, _ = small
    loss, parameters = loss_in(layer_of(gradient, Tanh()))
    found = torch.func.vmap(torch.func.grad(lambda p, x: loss(p, x.unsqueeze(0))), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        expected = gradients_at(gradient, 1.0, x[i : i + 1])[1:]
        assert relative_error([found[name][i] for name in parameters], list(expected)) < 10 * PRECISION


def test_gradients_of_an_ensemble(small, gradient):
    """vmap(grad) over parameters."""
    _, x, _, _ = small
    loss, parameters = loss_in(layer_of(gradient, Tanh()))
    scales = [0.8, 1.1]
    stacked = {name: torch.stack([scale * p for scale in scales]) for name, p in parameters.items()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(stacked, x)
    for i, scale in enumerate(scales):
        expected = gradients_at(gradient, scale, x)[1:]
        assert relative_error([found[name][i] for name in parameters], list(expected)) < 10 * PRECISION


def autograd_of_vmap(layer, x, g):
    x = x.clone().requires_grad_()
    return torch.autograd.grad((torch.func.vmap(lambda x: layer(x[None])[0])(x) * g).sum(), x)[0]


def grad_of_vmap(layer, x, g):
    return torch.func.grad(lambda x: (torch.func.vmap(lambda x: layer(x[None])[0])(x) * g).sum())(x)


def autograd_of_vmapped_vjp(layer, x, g):
    """Of its value, not of its derivative."""
    x = x.clone().requires_grad_()
    value = torch.func.vmap(lambda x: torch.func.vjp(lambda x: layer(x[None])[0], x)[0])(x)
    return torch.autograd.grad((value * g).sum(), x)[0]


@pytest.mark.parametrize(
    ("route", "frozen"), [(autograd_of_vmap, True), (grad_of_vmap, True), (autograd_of_vmapped_vjp, False)]
)
def test_reverse_mode_over_vmap(small, gradient, route, frozen):
    cell, x, _, derivative = small
    cell.requires_grad_(not frozen)
    layer, g = layer_of(gradient, cell), direction(x)
    if gradient in ADJOINT:
        with pytest.raises(RuntimeError, match="vmap: use the gradient Unrolled"):
            route(layer, x, g)
    else:
        assert relative_error([route(layer, x, g).flatten()], [derivative.T @ g.flatten()]) < 10 * PRECISION
    cell.requires_grad_()


def test_the_value_of_a_vjp_has_a_gradient_too(small, gradient):
    cell, x, _, derivative = small
    x, g = x.clone().requires_grad_(), direction(x)
    value, _ = torch.func.vjp(layer_of(gradient, cell), x)
    (found,) = torch.autograd.grad(value, x, g)
    assert relative_error([found.flatten()], [derivative.T @ g.flatten()]) < 10 * PRECISION


def test_vmap_of_a_solve(problem, gradient):
    cell, x, z, _ = problem
    layer = layer_of(gradient, cell)
    with torch.no_grad():
        batched = torch.func.vmap(lambda x: layer(x.unsqueeze(0)).squeeze(0))(x)
    torch.testing.assert_close(batched, z)


def test_a_log_inside_transforms(small):
    """A solve inside torch.func.grad is recorded; of one inside vmap nothing could be read afterwards."""
    cell, x, _, _ = small
    layer = layer_of("implicit", cell)
    with SolveLog(layer) as log:
        layer(x).sum().backward()
    with SolveLog(layer) as inside:
        torch.func.grad(lambda x: layer(x).sum())(x)
    assert log.summary() == inside.summary()
    for watch in (SolveLog, WarmStart, lambda layer: FixedPointCorrection(layer, at=(1,))):
        with watch(layer), pytest.raises(RuntimeError, match="must not be open inside torch.func.vmap"):
            torch.func.vmap(lambda x: layer(x.unsqueeze(0)))(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch, of constants it folds
@pytest.mark.parametrize("gradient", ["implicit", "phantom", "unrolled"])
def test_programs_recorded_by_proxies(small, gradient):
    """`make_fx`, and `torch.func.linearize`, which rests on it."""
    cell, x, _, derivative = small
    solver, v = Picard(1e-12, 25), direction(x)
    chosen = {"implicit": Implicit(solver), "phantom": Phantom(25, damping=1.0), "unrolled": Unrolled()}[gradient]
    layer = Equilibrium(cell, solver=solver, gradient=chosen)
    _, push = torch.func.linearize(layer, x)
    assert relative_error([push(v).flatten()], [derivative @ v.flatten()]) < 1e-3

    def pull(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad((layer(x) * v).sum(), x)[0]

    assert relative_error([make_fx(pull)(x)(x).flatten()], [derivative.T @ v.flatten()]) < 1e-3


def test_what_per_sample_gradients_give_is_not_differentiated_in_silence(small):
    """Neither they nor the losses beside them, by a backward pass outside of vmap."""
    cell, x, _, _ = small
    layer = layer_of("implicit", cell)
    per_sample = torch.func.vmap(torch.func.grad_and_value(lambda x: layer(x[None]).pow(2).sum()))
    x = x.clone().requires_grad_()
    gradients, losses = per_sample(x)
    with pytest.raises(RuntimeError, match="no reverse mode over torch.func.vmap: use the gradient Unrolled"):
        torch.autograd.grad(losses.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative by torch.func: use the gradient Unrolled"):
        torch.autograd.grad(gradients.sum(), x)


class Wrapped(torch.nn.Module):
    """A model with an equilibrium as one of its layers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def traced_by_fx(model, x):
    traced = torch.fx.symbolic_trace(model)
    assert any(isinstance(module, Equilibrium) for module in traced.modules())
    return traced


def exported(model, x):
    return torch.export.export(model, (x,)).module()


def traced_by_jit(model, x):
    return torch.jit.trace(model, x)


# A program records every step that is allowed: few, that come as near.
RECORDED = {
    "shine": Broyden(1e-13, 16, memory=16),
    "reversible": ReversibleIteration(1e-14, 70, damping=0.5),
}
RECORDERS = [traced_by_fx, traced_by_jit, pytest.param(exported, marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
@pytest.mark.parametrize("record", RECORDERS)
def test_a_recorded_program(small, gradient, record):
    """Near enough to its limit, the derivative of the steps is that of the equilibrium too."""
    cell, x, z, derivative = small
    layer = Equilibrium(cell, solver=RECORDED.get(gradient, Picard(1e-13, 45)), gradient=GRADIENTS[gradient][1])
    program, x = record(Wrapped(layer), x), x.clone().requires_grad_()
    value, g = program(x), direction(z)
    torch.testing.assert_close(value.detach(), z, rtol=0, atol=PRECISION)
    for scale in (1e-6, 1.0, 1e6):
        (found,) = torch.autograd.grad(value, x, scale * g, retain_graph=True)
        assert relative_error([found.flatten() / scale], [g.flatten() @ derivative]) < PRECISION
