from functools import partial

import pytest
import torch
from oracles import dense_jacobian, f_of_sample
from problems import Linear, cell_and_input, generator
from stubs import Counted
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from timm_deq import Anderson, Equilibrium, Implicit, Phantom
from timm_deq.spectral import JacobianPenalty, jacobian_penalty, spectral_radius

CELLS = ["conv", "attention"]


def jacobians(f, z):
    """The dense Jacobian of each sample, written as a loop."""
    return [dense_jacobian(f_of_sample(f, i, z), z[i : i + 1]) for i in range(len(z))]


def radii(f, z):
    return torch.stack([torch.linalg.eigvals(J).abs().max() for J in jacobians(f, z)])


def cell_at_random(name):
    cell, x = cell_and_input(name)
    return partial(cell, x=x), torch.randn(x.shape, generator=generator(3), dtype=x.dtype), cell, x


@pytest.mark.parametrize("name", CELLS)
def test_the_penalty_estimates_the_frobenius_norm(name):
    f, z, _, _ = cell_at_random(name)
    draws = torch.stack([jacobian_penalty(f, z, samples=4) for _ in range(100)]).detach()
    expected = torch.stack([J.square().sum() / len(J) for J in jacobians(f, z)])
    assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / 10).all() and (draws.std(0) > 0).all()
    torch.testing.assert_close(draws.mean(0), expected, rtol=0.2, atol=0)


def test_the_penalty_of_a_diagonal_jacobian_is_exact():
    z = torch.rand(3, 5, generator=generator(), dtype=torch.float64)
    counted = Counted(torch.square)
    torch.testing.assert_close(jacobian_penalty(counted, z, samples=3), (2 * z).square().mean(1))
    assert len(counted.inputs) == 1


def test_the_derivative_of_the_penalty_against_the_dense_expression():
    _, z, cell, x = cell_at_random("attention")
    torch.manual_seed(5)
    penalty = jacobian_penalty(partial(cell, x=x), z)
    torch.manual_seed(5)
    v = (torch.randint_like(z, 2) * 2 - 1).flatten()
    J = torch.autograd.functional.jacobian(lambda z: cell(z, x), z, create_graph=True).view(z.numel(), -1)
    dense = ((v @ J).square().view(len(z), -1)).mean(1)
    torch.testing.assert_close(penalty, dense)
    inputs = [x, *cell.parameters()]
    got, expected = (torch.autograd.grad(p.sum(), inputs, materialize_grads=True) for p in (penalty, dense))
    assert all(g.abs().sum() > 0 for g in got[:2])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("measure", [jacobian_penalty, spectral_radius])
def test_constant_maps_empty_batches_low_precision_and_no_grad(measure):
    assert torch.equal(measure(torch.ones_like, torch.ones(2, 3)), torch.zeros(2))
    bias = torch.ones(3, requires_grad=True)
    assert torch.equal(measure(lambda z: bias.expand_as(z), torch.ones(2, 3)), torch.zeros(2))
    assert measure(torch.square, torch.ones(0, 3, 4)).shape == (0,)
    low = measure(lambda z: 0.5 * z, torch.ones(2, 3, dtype=torch.bfloat16))
    assert low.dtype == torch.float32
    with torch.no_grad():
        alone = measure(lambda z: bias * z / 2, torch.ones(2, 3))
    torch.testing.assert_close(low, alone, rtol=5e-3, atol=0)
    assert not alone.requires_grad


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_radius_of_a_rotation_is_exact(steps):
    problem = Linear(radius=0.9)
    torch.testing.assert_close(spectral_radius(problem, problem.z0, steps=steps), torch.full((4,), 0.9).double())


def test_the_radius_of_a_matrix_that_is_not_normal():
    """A complex pair that turns as an ellipse, so that the growth of single steps oscillates from 0.2 to 4."""
    pair = torch.tensor([[0.0, 4.0], [-0.2, 0.0]], dtype=torch.float64)
    jordan = torch.tensor([[0.7, 1.0], [0.0, 0.7]], dtype=torch.float64)
    for matrix, bound in ((pair, 0.01), (torch.block_diag(pair, jordan), 0.05)):
        z = torch.zeros(3, len(matrix), dtype=torch.float64)
        expected = torch.linalg.eigvals(matrix).abs().max()
        errors = [
            (spectral_radius(lambda z, M=matrix: z @ M.T, z, steps=n) / expected - 1).abs().max() for n in (20, 100)
        ]
        assert errors[0] < 3 * bound and errors[1] < bound


def test_the_radius_of_a_nilpotent_matrix_is_zero():
    matrix = torch.diag(torch.ones(3), 1)
    assert not spectral_radius(lambda z: z @ matrix, torch.zeros(2, 4)).any()


@pytest.mark.parametrize("name", CELLS)
def test_the_radius_of_cells(name):
    f, z, _, _ = cell_at_random(name)
    counted = Counted(f)
    expected = radii(f, z)
    torch.testing.assert_close(spectral_radius(counted, z), expected, rtol=0.1, atol=0)
    torch.testing.assert_close(spectral_radius(f, z, steps=200), expected, rtol=0.01, atol=0)
    assert len(counted.inputs) == 1


def test_the_radius_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    spectral_radius(torch.square, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), before)


class Scaled(nn.Module):
    """`f(z, x) = a z + x^2 z / 2`: a diagonal Jacobian `a + x^2 / 2`, which depends on the injected input."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.25))

    def forward(self, z, x):
        return self.a * z + x.square() * z / 2


@pytest.mark.parametrize("gradient", [Implicit(Anderson()), Phantom()])
def test_the_penalty_of_a_model(gradient):
    layers = [Equilibrium(Scaled(), gradient=gradient) for _ in range(2)]
    model = nn.ModuleList(layers)
    x = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    with JacobianPenalty(model, samples=2) as penalty:
        layers[0](x)
        layers[1](x=x[:1])
        mean = penalty.mean()
        with pytest.raises(ValueError, match="needs a forward"):
            penalty.mean()
        model.eval()
        layers[0](x)
        with torch.no_grad():
            layers[0].train()(x)
        with pytest.raises(ValueError, match="needs a forward"):
            penalty.mean()
    mean.backward()
    torch.testing.assert_close(mean.detach(), torch.tensor([0.375, 0.75, 0.25, 0.375]).square().mean())
    # d/dx of (a + x^2/2)^2 is 2 (a + x^2/2) x, averaged over 2 elements and 4 rows
    torch.testing.assert_close(x.grad[1], torch.full((2,), 2 * 0.75 / 4 / 2))
    torch.testing.assert_close(layers[1].cell.a.grad, torch.tensor(2 * 0.375 / 4))
    assert not any(layer._forward_hooks for layer in layers)


def test_a_checkpoint_that_repeats_a_forward_adds_no_penalty():
    layer, x = Equilibrium(Scaled()), torch.ones(2, 3, requires_grad=True)
    with JacobianPenalty(layer) as penalty:
        (checkpoint(lambda x: layer(x).exp(), x, use_reentrant=False).sum() + penalty.mean()).backward()
        with pytest.raises(ValueError, match="needs a forward"):
            penalty.mean()
    # of 0 by the equilibrium, which is zero, and of (a + 1/2)^2 by the penalty
    torch.testing.assert_close(layer.cell.a.grad, torch.tensor(1.5))


class Counting(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight / 4


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        parametrize.register_parametrization(self.linear, "weight", Counting())

    def forward(self, z, x):
        return self.linear(self.linear(z)) + x


def test_parametrised_weights_are_computed_once_more_and_are_on_the_tape():
    torch.manual_seed(0)
    cell = Twice()
    counting, original = cell.linear.parametrizations.weight[0], cell.linear.parametrizations.weight.original
    counting.calls = 0
    with JacobianPenalty(layer := Equilibrium(cell)) as penalty:
        layer(torch.ones(2, 3))
    assert counting.calls == 2  # for the solve with its gradient, and for the penalty
    penalty.mean().backward()
    assert original.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jacobian_penalty(torch.square, torch.ones(1, 1), samples=0), "samples must be at least 1, got 0"),
        (lambda: spectral_radius(torch.square, torch.ones(1, 1), steps=0), "steps must be at least 1, got 0"),
        (lambda: JacobianPenalty(nn.Identity(), samples=0), "samples must be at least 1, got 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
