"""What the backward pass evaluates again is the map that was solved, whatever has become of the cell since."""

import copy
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from oracles import relative_error
from problems import generator
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations

from timm_deq import (
    Anderson,
    Equilibrium,
    Implicit,
    Picard,
    Reversible,
    ReversibleIteration,
    Unrolled,
    VariationalDropout,
)

TIGHT = Anderson(1e-13, 60)
GRADIENTS = {
    "implicit": (TIGHT, Implicit(TIGHT)),
    "reversible": (ReversibleIteration(1e-14, 40, damping=0.5), Reversible()),
    "unrolled": (TIGHT, Unrolled()),
}
PRECISION = {"implicit": 1e-9, "reversible": 1e-3, "unrolled": 1e-7}  # steps that are reversed are rounded
SLOW_BUT_IMPLICIT = ["implicit", *(pytest.param(g, marks=pytest.mark.slow) for g in GRADIENTS if g != "implicit")]
AGAIN = ["implicit", "reversible"]  # the first for second derivatives


class Cell(nn.Module):
    """`f(z, x) = tanh(s * dropout(W z) + x + b)`: autograd needs neither x nor b of it, s is a tensor or a number."""

    def __init__(self, p=0.0, dtype=torch.float64):
        super().__init__()
        weight = torch.empty(4, 4, dtype=dtype)
        self.weight = nn.Parameter(nn.init.orthogonal_(weight, 0.5, generator=generator()))
        self.bias = nn.Parameter(torch.randn(4, generator=generator(1), dtype=dtype))
        self.drop, self.scale = VariationalDropout(p), 1.0

    def forward(self, z, x):
        return torch.tanh(self.scale * self.drop(nn.functional.linear(z, self.weight)) + x + self.bias)


def layer_and_input(gradient, **kwargs):
    solver, chosen = GRADIENTS[gradient]
    x = torch.randn(3, 4, generator=generator(2), dtype=torch.float64, requires_grad=True)
    return Equilibrium(Cell(**kwargs), solver=solver, gradient=chosen), x


def derivatives(loss, inputs):
    """First and second ones."""
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    return [*first, *(g for g in second if g is not None)]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_parameters_of_a_functional_call(gradient):
    """As in meta-learning: its own are back in the cell when the backward pass comes."""
    layer, x = layer_and_input(gradient)
    own = {name: (0.8 * p.detach()).requires_grad_() for name, p in layer.named_parameters()}
    found = derivatives(functional_call(layer, own, (x,)).square().sum(), [x, *own.values()])
    z = torch.zeros_like(x)
    for _ in range(60):
        z = torch.tanh(z @ own["cell.weight"].T + x + own["cell.bias"])
    assert relative_error(found, derivatives(z.square().sum(), [x, *own.values()])) < PRECISION[gradient]


@pytest.mark.parametrize("gradient", SLOW_BUT_IMPLICIT)
def test_steps_of_meta_learning(gradient):
    """Two steps of gradient descent, differentiated in where they began."""

    def after_two_steps(layer, x):
        own = start = dict(layer.named_parameters())
        for _ in range(2):
            loss = functional_call(layer, own, (x,)).square().sum()
            slopes = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            own = {name: p - 0.05 * slope for (name, p), slope in zip(own.items(), slopes, strict=True)}
        return torch.autograd.grad(functional_call(layer, own, (x,)).square().sum(), list(start.values()))

    layer, x = layer_and_input(gradient)
    x = x.detach()
    plain = copy.deepcopy(layer)
    plain.forward = lambda x: steps_of(plain.cell, x)
    assert relative_error(list(after_two_steps(layer, x)), list(after_two_steps(plain, x))) < PRECISION[gradient]


def steps_of(cell, x):
    z = torch.zeros_like(x)
    for _ in range(60):
        z = cell(z, x)
    return z


@pytest.mark.parametrize("gradient", AGAIN)
def test_what_was_changed_in_place_is_refused(gradient):
    for name in ("x", "cell.bias"):
        layer, x = layer_and_input(gradient)
        injected = x + 0.0
        loss = layer(injected).sum()
        with torch.no_grad():
            {"x": injected, "cell.bias": layer.cell.bias}[name].add_(1)
        with pytest.raises(RuntimeError, match=f"^{name} must not be changed in place between a solve and its back"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", AGAIN)
def test_another_mode(gradient, training):
    found = []
    for then in (training, not training):
        torch.manual_seed(1)
        layer, x = layer_and_input(gradient, p=0.5)
        loss = layer.train(training)(x).square().sum()
        layer.train(then)
        found.append(derivatives(loss, [x, *layer.parameters()]))
        assert layer.cell.drop.training is then
    assert relative_error(*found) == 0


@pytest.mark.parametrize("kind", [torch.tensor, pytest.param(float, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradient", AGAIN)
def test_another_number_that_the_cell_holds(gradient, kind):
    """As one that tells it of a second input, where two solves come before their backward passes."""
    layer, x = layer_and_input(gradient)
    apart, losses = [], []
    for scale in (0.5, 1.5):
        layer.cell.scale = kind(scale)
        apart.append(derivatives(layer(x).square().sum(), [x, *layer.parameters()]))
        losses.append(layer(x).square().sum())
    layer.cell.scale = 1.0
    found = [derivatives(loss, [x, *layer.parameters()]) for loss in losses]
    assert layer.cell.scale == 1.0
    assert [relative_error(a, b) for a, b in zip(found, apart, strict=True)] == [0, 0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by dynamo
@pytest.mark.parametrize(
    ("gradient", "compiled"),
    [*((gradient, False) for gradient in GRADIENTS), pytest.param("unrolled", True, marks=pytest.mark.slow)],
)
def test_a_frozen_cell_that_holds_what_is_trained(gradient, compiled):
    layer, x = layer_and_input(gradient)
    layer.requires_grad_(False)
    if compiled:
        layer.solver = Picard(1e-9, 30)
        layer.compile(backend="eager", fullgraph=True)
    x, scale = x.detach(), torch.full((), 0.5, dtype=x.dtype, requires_grad=True)
    found = []
    for equilibrium in (layer, partial(steps_of, layer.cell)):
        layer.cell.scale = 2 * scale
        found.append(list(torch.autograd.grad(equilibrium(x).square().sum(), scale)))
    assert relative_error(*found) < PRECISION[gradient]


def test_second_derivatives_after_autocast():
    """f is evaluated again as it was, where its input is of lower precision than its parameters."""

    class Cast(Cell):
        def forward(self, z, x):
            z, x = nn.functional.linear(z, self.weight), nn.functional.linear(x, self.weight, self.bias)
            return torch.tanh(z + x).float()

    layer = Equilibrium(Cast(dtype=torch.float32), solver=Anderson(1e-5, 40), gradient=Implicit(Anderson(1e-5, 40)))
    x = torch.randn(3, 4, generator=generator(2), requires_grad=True)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = layer(nn.functional.linear(x, torch.eye(4))).square().sum()
        found.append(derivatives(loss, [x, *layer.parameters()]))
    assert 0 < relative_error(*found) < 0.05


def test_threads_that_share_a_layer_have_masks_of_their_own():
    layer, x = Equilibrium(Cell(0.5), solver=Picard(1e-30, 6)), torch.ones(3, 4, dtype=torch.float64)
    together, seen = threading.Barrier(2, timeout=20), ([], [])

    def wait(cell, args):  # until both have set their masks, and neither has dropped anything
        together.wait()

    def see(drop, args, z):
        seen[int(threading.current_thread().name)].append(z == 0)

    layer.cell.register_forward_pre_hook(wait)
    layer.cell.drop.register_forward_hook(see)

    def solve():
        with torch.no_grad():
            layer(x, z0=x)

    threads = [threading.Thread(target=solve, name=str(i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(masks) for masks in seen] == [6, 6]
    assert all(torch.equal(mask, masks[0]) for masks in seen for mask in masks)


class DropsState(Cell):
    """`f(z, x) = tanh(W dropout(z) + x + b)`: its first state is one for all parameters."""

    def forward(self, z, x):
        return torch.tanh(nn.functional.linear(self.drop(z), self.weight) + x + self.bias)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_threads_that_share_a_layer_have_weights_of_their_own(gradient):
    """Torch has one cache of parametrised weights for all."""
    layer, x = layer_and_input(gradient)
    parametrizations.weight_norm(layer.cell, "weight")
    layer.solver = replace(layer.solver, tol=1e-30, max_steps=4)
    expected, found = gradients_of(layer, x), []
    entered = threading.Semaphore(0)

    def pause(*_):
        entered.release()
        entered.acquire(timeout=0.01)  # lets another thread go on, if it can
        entered.acquire(timeout=0.01)

    layer.cell.register_forward_pre_hook(pause)
    threads = [threading.Thread(target=lambda: found.append(gradients_of(layer, x))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [relative_error(g, expected) for g in found] == [0, 0]


def gradients_of(layer, x):
    return list(torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("around", [save_on_cpu, allow_mutation_on_saved_tensors])
def test_what_was_changed_in_place_is_refused_where_others_hook_what_is_saved(around):
    """Where torch has hooks, it checks no version."""
    layer, x = layer_and_input("implicit")
    with around():
        loss = layer(x).sum()
        with torch.no_grad():
            layer.cell.weight.mul_(0.5)
        with pytest.raises(RuntimeError, match="must not be changed in place between its solve and its backward pass"):
            torch.autograd.grad(loss, x)


def test_masks_of_an_ensemble():
    """Inside vmap, by its rule of randomness."""
    layer, x = Equilibrium(DropsState(0.5), solver=Picard(1e-10, 60)), torch.ones(3, 4, dtype=torch.float64)
    stacked, _ = stack_module_state([layer, layer])
    for randomness, same in (("same", True), ("different", False)):
        first, second = torch.func.vmap(lambda p: functional_call(layer, p, (x,)), randomness=randomness)(stacked)
        assert torch.equal(first, second) is same
