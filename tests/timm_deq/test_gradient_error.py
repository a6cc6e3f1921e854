"""The error of a gradient: what the log says of it, and how it is made small. The oracle is the dense solve."""

import copy

import pytest
import timm
import torch
from oracles import implicit_gradients, newton
from problems import cell_and_input
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations

from timm_deq import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    JacobianPenalty,
    Phantom,
    Picard,
    Shine,
    SolveLog,
    Unrolled,
    VariationalDropout,
    set_solver,
)

LOOSE = Anderson(0.05, 20)
GRADIENTS = {
    "implicit": (LOOSE, Implicit(LOOSE)),
    "phantom": (LOOSE, Phantom(2)),
    "shine": (Broyden(0.05, 20, memory=20), Shine()),
    "unrolled": (Picard(0.05, 20), Unrolled()),
}


def errors(gradient, exact):
    """The relative error in norm of each sample."""
    return (gradient - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


@pytest.fixture(scope="module", params=["conv", "attention"])
def problem(request):
    """A cell, an input, a cotangent, and the derivative of the equilibrium in the input by dense matrices."""
    cell, x = cell_and_input(request.param)
    z_star = newton(lambda z: cell(z, x), torch.zeros_like(x))
    g = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    return cell, x, g, implicit_gradients(cell, x, z_star, g)[0]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_in_the_log_is_that_of_the_gradient(gradient, dtype, problem):
    cell, x, g, exact = problem
    solver, chosen = GRADIENTS[gradient]
    layer = Equilibrium(copy.deepcopy(cell).to(dtype), solver=solver, gradient=chosen)
    x = x.detach().to(dtype).requires_grad_()
    with SolveLog(layer, gradient_error=True) as log:
        z_star = layer(x)
        z_star.backward(g.to(dtype))
    expected = errors(x.grad.double(), exact)
    assert expected.min() > 1e-5  # a loose solve
    torch.testing.assert_close(log.gradient_error, expected, rtol=1e-2, atol=1e-6)
    assert log.summary()["max_gradient_error"] == pytest.approx(expected.max().item(), rel=1e-2)
    assert log.summary()["median_gradient_error"] == pytest.approx(expected.median().item(), rel=1e-2)


def test_the_error_of_a_gradient_under_autocast(problem):
    cell, x, g, exact = problem
    tight = Anderson(1e-4, 60)
    layer = Equilibrium(copy.deepcopy(cell).float(), solver=tight, gradient=Implicit(tight))
    x = x.detach().float().requires_grad_()
    with SolveLog(layer, gradient_error=True) as log, torch.autocast("cpu", torch.bfloat16):
        layer(x).backward(g.float())
    torch.testing.assert_close(log.gradient_error, errors(x.grad.double(), exact), rtol=1e-2, atol=1e-6)
    assert 1e-4 < log.gradient_error.max() < 1


def test_a_log_that_compares_changes_no_gradient_and_leaves_no_hook(problem):
    cell, x, g, _ = problem
    layer, found = Equilibrium(cell, solver=LOOSE), []
    for compares in (False, True):
        with SolveLog(layer, gradient_error=compares) as log:
            found.append(torch.autograd.grad(layer(x=x), [x, *cell.parameters()], g))
            assert len(log.gradient_error) == compares * len(x)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not layer._forward_hooks and not layer._forward_pre_hooks and not layer._solution_hooks


def test_only_the_first_backward_pass_after_a_forward_is_compared(problem):
    cell, x, g, _ = problem
    layer = Equilibrium(cell, solver=LOOSE)
    with SolveLog(layer, gradient_error=True) as log:
        z = layer(x)
        (first,) = torch.autograd.grad(z, x, g, create_graph=True)
        first.square().sum().backward()
        with torch.no_grad():
            layer(x)
        late = layer(x)
        layer(x).backward(g)
    late.backward(g)  # the log is closed
    assert len(log.gradient_error) == 2 * len(x) and len(log) == 4


def test_a_frozen_encoder_and_two_uses_of_one_input(problem):
    cell, x, g, exact = problem
    layer = Equilibrium(cell, solver=LOOSE)
    with SolveLog(layer, gradient_error=True) as log:
        layer(x.detach()).backward(g)
        (layer(x) + 3 * x).backward(g)  # the gradient of another path is none of the layer's
    assert len(log.gradient_error) == 2 * len(x)
    torch.testing.assert_close(*log.gradient_error.chunk(2))
    assert log.gradient_error.max() < 0.3


class Affine(nn.Module):
    """`f(z, x) = a z + x`, by a parametrised weight."""

    def __init__(self, a):
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            self.linear.weight = torch.full((1, 1), a)

    def forward(self, z, x):
        return self.linear(z) + x


def test_by_hand():
    """u = a u + g: of the two terms that one step adds, 1 + a, against 1 / (1 - a)."""
    layer = Equilibrium(Affine(0.5), solver=Picard(1e-6, 40), gradient=Implicit(Picard(1e-9, 2)))
    with SolveLog(layer, gradient_error=True) as log:
        layer(torch.ones(3, 1, requires_grad=True)).sum().backward()
    torch.testing.assert_close(log.gradient_error, torch.full((3,), 0.25, dtype=torch.float64))


def of_a_functional_call(layer, x, g):
    """In parameters that lead to others."""
    own = {name: 0.5 * p for name, p in layer.named_parameters()}
    torch.func.functional_call(layer, own, (x,)).backward(g)


def after_a_change(layer, x, g):
    """In parameters that autograd does not need, as that of a sum."""
    z = layer(x)
    with torch.no_grad():
        layer.cell.offset.add_(1)
    z.backward(g)


def before_a_second_solve(layer, x, g):
    """In training, when the spectral norm of a weight moves."""
    z = layer.train()(x)
    layer(x)
    z.backward(g)


@pytest.mark.parametrize("route", [of_a_functional_call, after_a_change, before_a_second_solve])
def test_the_error_is_that_of_the_cell_as_it_was(route):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = parametrizations.spectral_norm(nn.Linear(4, 4, bias=False, dtype=torch.float64))
            self.offset = nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def forward(self, z, x):
            return torch.tanh(self.linear(z) / 2 + x + self.offset)

    torch.manual_seed(0)
    x, g = torch.randn(2, 3, 4, dtype=torch.float64)
    layer = Equilibrium(Cell().eval(), solver=Anderson(1e-12, 60), gradient=Implicit(Anderson(1e-12, 60)))
    with torch.no_grad():
        layer.cell.offset.add_(1)
        layer.cell.linear.parametrizations.weight.original.add_(torch.diag(x[0]))  # its norm is not found at once
    with SolveLog(layer, gradient_error=True) as log:
        route(layer, x.requires_grad_(), g)
    assert log.gradient_error[:3].max() < 1e-7


# Forward mode loads decompositions that torch itself still scripts.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_beside_a_log_that_compares(problem):
    """Where there is nothing to compare."""
    cell, x, g, _ = problem
    layer, found = Equilibrium(cell, solver=LOOSE), []
    for compares in (False, True):
        with SolveLog(layer, gradient_error=compares) as log, forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), g))).tangent)
    assert torch.equal(*found) and len(log.gradient_error) == 0


class Fleeing(nn.Module):
    """A map without a fixed point."""

    def forward(self, z, x):
        return torch.where(z > 0, -x, x)


def test_where_there_is_no_equilibrium_the_error_is_infinite():
    layer = Equilibrium(Fleeing(), solver=Picard(1e-3, 4), gradient=Phantom(1))
    with SolveLog(layer, gradient_error=True) as log:
        layer(torch.ones(2, 1, requires_grad=True)).sum().backward()
    assert log.gradient_error.tolist() == [torch.inf] * 2
    assert log.summary()["max_gradient_error"] == torch.inf


def test_dropout_is_refused_in_training_alone():
    class Dropping(Affine):
        def __init__(self):
            super().__init__(0.5)
            self.drop = VariationalDropout(0.5)

        def forward(self, z, x):
            return super().forward(self.drop(z), x)

    layer, x = Equilibrium(Dropping()), torch.ones(2, 1)
    with SolveLog(layer, gradient_error=True) as log:
        with pytest.raises(ValueError, match="gradient_error must be False for a cell with dropout in training: call"):
            layer(x)
        layer.eval()(x).sum().backward()
    assert log.gradient_error.max() < 1e-2
    with pytest.raises(ValueError, match="gradient_error must be True or False, got 1"):
        SolveLog(layer, gradient_error=1)


@pytest.fixture(scope="module")
def stage():
    """The equilibrium of a model, an input and a cotangent in float64, and the gradients by dense matrices."""
    torch.manual_seed(0)
    net = timm.create_model("deq_resnet8_cifar", branch_gain=0.5).double()
    layer = net.layer4.equilibrium
    x = torch.randn(2, 64, 2, 2, dtype=torch.float64, requires_grad=True)
    z_star = newton(lambda z: layer.cell(z, x), layer(x), steps=4)
    g = torch.randn_like(x)
    return net, x, g, implicit_gradients(layer.cell, x, z_star, g)


def gradients(net, x, g):
    layer = net.layer4.equilibrium
    x = x.detach().to(next(net.parameters()).dtype).requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.cell.parameters()], g.to(x.dtype))


@pytest.mark.parametrize("solver", [None, "broyden"])
def test_exact_solves_give_exact_gradients(solver, stage):
    net, x, g, exact = stage
    worst = {}
    for name, precise in (("default", net), ("exact", copy.deepcopy(net)), ("single", copy.deepcopy(net).float())):
        if name != "default":
            set_solver(precise, solver, exact=True)
        found = gradients(precise, x, g)
        worst[name] = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))
    assert worst["default"] > 1e-3
    assert worst["exact"] < 1e-6
    assert worst["single"] < 2e-5


def test_what_exact_sets():
    net = timm.create_model("deq_resnet8_cifar", backward_tol=1e-2, memory=3)
    layer = net.layer4.equilibrium
    set_solver(net, exact=True, max_steps=90)
    assert layer.solver == Anderson(torch.finfo(torch.float32).eps, 90, memory=3)
    assert layer.gradient == Implicit(layer.solver)
    layer.gradient = Implicit(Picard(0.1, 7, damping=0.8))  # not one that keywords describe
    set_solver(net.double(), exact=True)
    assert layer.solver == Anderson(1e-9, 200, memory=3)
    assert layer.gradient == Implicit(Picard(1e-9, 200, damping=0.8))
    set_solver(net, max_steps=4)
    assert layer.solver == Anderson(1e-9, 4, memory=3)


@pytest.mark.parametrize("name", ["phantom", "unrolled"])
def test_exact_is_refused_where_the_tolerance_is_not_all(name):
    net = timm.create_model("deq_resnet8_cifar", gradient=name)
    with pytest.raises(ValueError, match=f'gradient must be "implicit" for exact=True, got {name.capitalize()}'):
        set_solver(net, exact=True)
    assert net.layer4.equilibrium.solver == Anderson()
    with pytest.raises(ValueError, match="exact must be True or False, got 'yes'"):
        set_solver(net, exact="yes")


def test_a_penalty_beside_a_log_that_compares(problem):
    cell, x, g, _ = problem
    layer = Equilibrium(cell, solver=LOOSE)
    with SolveLog(layer, gradient_error=True) as log, JacobianPenalty(layer) as penalty:
        layer(x).backward(g)
        penalty.mean()
    assert log.gradient_error.max() < 0.3
