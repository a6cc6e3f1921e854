import pytest
import torch
from torch import nn

from timm_deq import Anderson, Equilibrium, Implicit, Reversible, ReversibleIteration, Unrolled, VariationalDropout
from timm_deq.dropout import one_mask_per_solve


class DroppingCell(nn.Module):
    """`f(z, x) = tanh(dropout(dropout(W z)) / 2 + x)`, one dropout used twice in an evaluation."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, dtype=torch.float64)
        self.drop = VariationalDropout(0.3)

    def forward(self, z, x):
        return (self.drop(self.drop(self.linear(z))) / 2 + x).tanh()


def layer_and_input(**kwargs):
    torch.manual_seed(0)
    return Equilibrium(DroppingCell(), **kwargs), torch.randn(4, 8, dtype=torch.float64)


def test_a_solve_has_one_mask_and_the_next_solve_another():
    layer, x = layer_and_input(solver=Anderson(1e-10, 200))
    masks = []
    layer.cell.drop.register_forward_hook(lambda _, args, out: masks.append(out == 0))
    first = layer(x)  # the hook sees two dropouts of each evaluation, those of the gradient's included
    assert len(masks) > 8 and all(torch.equal(m, masks[0]) for m in masks[::2])
    assert all(torch.equal(m, masks[1]) for m in masks[1::2]) and not torch.equal(masks[0], masks[1])
    assert not torch.allclose(layer(x), first)
    assert not torch.equal(layer.cell.drop(x), layer.cell.drop(x))  # an ordinary one outside of solves


def test_the_mask_keeps_the_mean_and_is_drawn_per_element():
    drop = VariationalDropout(0.25)
    dropped = one_mask_per_solve(drop, drop)(torch.ones(200, 100))
    assert set(dropped.unique().tolist()) == {0, torch.tensor(4 / 3).item()}
    assert dropped.mean() == pytest.approx(1, abs=0.02) and dropped.mean(1).std() == pytest.approx(0.058, abs=0.01)


def test_evaluation_drops_nothing():
    layer, x = layer_and_input(solver=Anderson(1e-10, 200))
    z = layer.eval()(x)
    torch.testing.assert_close((layer.cell.linear(z) / 2 + x).tanh(), z)


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        (Anderson(1e-12, 200), Implicit(Anderson(1e-12, 200))),
        (ReversibleIteration(1e-6, 40, damping=0.5), Reversible()),
    ],
)
def test_the_gradient_is_taken_under_the_mask_of_its_solve(solver, gradient):
    """Two solves before one backward pass, so that a stale mask would show."""
    grads = []
    for chosen in (gradient, Unrolled()):
        layer, x = layer_and_input(solver=solver, gradient=chosen)
        torch.manual_seed(1)
        loss = layer(x).square().sum() + layer(x).sum()
        grads.append(torch.autograd.grad(loss, layer.cell.linear.weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_outside_an_equilibrium_it_is_ordinary_dropout():
    drop, x = VariationalDropout(0.5), torch.ones(100)
    assert not torch.equal(drop(x), drop(x)) and torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_bad_probability(p):
    with pytest.raises(ValueError, match=rf"p must be in \[0, 1\), got {p}"):
        VariationalDropout(p)
