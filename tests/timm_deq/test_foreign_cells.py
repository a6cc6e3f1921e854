"""Cells as others write them: in place, of other types, on other inputs. Each gives the right answer or one line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    Unrolled,
    fixed_point,
)

SOLVERS = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden(), "reversible": ReversibleIteration()}
GRADIENTS = {
    "implicit": ("anderson", Implicit()),
    "phantom": ("anderson", Phantom()),
    "neumann": ("anderson", Neumann()),
    "shine": ("broyden", Shine()),
    "reversible": ("reversible", Reversible()),
    "unrolled": ("picard", Unrolled()),
}


class Cell(nn.Module):
    """`f(z, x) = relu(W relu(z) + x) / 2`, written by `how`."""

    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)  # the precision of every solver's state: no copy of it
        self.how = how

    def forward(self, z, x):
        return self.how(self.linear, z, x)


def out_of_place(linear, z, x):
    return F.relu(linear(F.relu(z)) / 2 + x)


def on_copies(linear, z, x):  # in place on tensors of its own
    return linear(z.clone().relu_()).div_(2).add_(x).relu_()


def on_the_state(linear, z, x):
    return F.relu(linear(z.relu_()) / 2 + x)


def on_a_view_of_the_state(linear, z, x):
    z[:, 0].relu_()
    return out_of_place(linear, z, x)


def on_the_input(linear, z, x):
    return F.relu(x.add_(linear(F.relu(z)) / 2))


IN_PLACE = {
    on_the_state: "f must not change its input in place",
    on_a_view_of_the_state: "f must not change its input in place",
    on_the_input: "cell must not change its input in place",
}
MODES = {"enabled": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def solve(how, mode, solver="anderson", gradient=None, training=True, requires_grad=False):
    torch.manual_seed(0)
    layer = Equilibrium(Cell(how), solver=SOLVERS[solver], gradient=gradient).train(training)
    with MODES[mode]():
        x = (torch.randn(6, 3, dtype=torch.float64) + 1).requires_grad_(requires_grad and mode == "enabled")
        return layer(1 * x)


@pytest.mark.parametrize("how", IN_PLACE, ids=lambda how: how.__name__)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_cell_that_changes_its_input_is_refused(how, mode, solver, training):
    with pytest.raises(ValueError, match=IN_PLACE[how]):
        solve(how, mode, solver, training=training)


@pytest.mark.parametrize("how", IN_PLACE, ids=lambda how: how.__name__)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_so_it_is_with_every_gradient(how, gradient):
    solver, chosen = GRADIENTS[gradient]
    with pytest.raises(ValueError, match="must not change its input in place"):
        solve(how, "enabled", solver, chosen, requires_grad=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_cell_may_work_in_place_on_what_is_its_own(mode):
    torch.testing.assert_close(solve(on_copies, mode), solve(out_of_place, mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_bare_map_that_changes_its_input_is_refused(mode):
    with MODES[mode](), pytest.raises(ValueError, match="f must not change its input in place"):
        fixed_point(lambda z: z.mul_(0.5) + 1, torch.ones(2, 3), Picard())


def test_the_input_of_an_inference_is_left_alone():
    with torch.inference_mode():
        x = torch.ones(2, 3, dtype=torch.float64)
        z = Equilibrium(Cell(out_of_place)).eval()(x)
    assert torch.equal(x, torch.ones_like(x)) and not z.requires_grad


class Returning(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, z, x):
        return self.change(z / 2 + x)


@pytest.mark.parametrize(
    ("change", "kind"), [(lambda z: (z, z), "tuple"), (lambda z: {"z": z}, "dict"), (lambda z: None, "NoneType")]
)
def test_a_cell_that_returns_no_tensor(change, kind):
    with pytest.raises(ValueError, match=f"f must return a tensor, got {kind}"):
        Equilibrium(Returning(change))(torch.ones(2, 3))


class Embedding(nn.Module):
    """A cell on tokens: `f(z, x) = tanh(z / 2 + E[x])`."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4, dtype=torch.float64)

    def initial_state(self, x):
        return torch.zeros(*x.shape, 4, dtype=torch.float64)

    def forward(self, z, x):
        return torch.tanh(z / 2 + self.table(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_integer_input(gradient, training):
    torch.manual_seed(0)
    solver, chosen = GRADIENTS[gradient]
    tokens = torch.tensor([[0, 1], [2, 3], [4, 4]])
    layer = Equilibrium(Embedding(), solver=SOLVERS[solver], gradient=chosen).train(training)
    z = layer(tokens)
    torch.testing.assert_close(layer.cell(z, tokens), z, rtol=5e-3, atol=1e-3)
    z.sum().backward()
    assert layer.cell.table.weight.grad.abs().min() > 0
    with torch.no_grad():
        torch.testing.assert_close(layer(tokens), z)


def test_an_integer_input_without_a_state_of_its_own():
    with pytest.raises(ValueError, match="z0 must be a floating-point tensor .* got torch.int64"):
        Equilibrium(Returning(lambda z: z))(torch.ones(2, 3, dtype=torch.long))
