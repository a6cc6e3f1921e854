import pytest
import torch
from problems import cell_and_input
from torch import nn
from torch.nn.utils import parametrize

from timm_deq import Anderson, Equilibrium, Implicit, Phantom, Picard, SolveLog, Unrolled
from timm_deq.correction import FixedPointCorrection
from timm_deq.spectral import JacobianPenalty


class Affine(nn.Module):
    """`f(z, x) = a z + x`: from zero, Picard's k-th iterate is `x (1 - a^k) / (1 - a)`."""

    def __init__(self, a=0.5):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, z, x):
        return self.a * z + x


def iterate(k, a=0.5):
    return (1 - a**k) / (1 - a)


@pytest.mark.parametrize("gradient", [Implicit(Picard(1e-6, 50)), Phantom(), Unrolled()])
def test_iterates_and_their_one_step_gradients(gradient):
    layer = Equilibrium(Affine(), solver=Picard(1e-6, 50), gradient=gradient)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    with FixedPointCorrection(layer, at=(1, 3)) as correction:
        for _ in range(2):  # the second time as the first
            first, third, last = correction.split(layer(x))
    for part, value in ((first, iterate(1)), (third, iterate(3)), (last, 2)):
        torch.testing.assert_close(part, value * x)
    # The value is z_k, the derivative that of a z + x with z held at z_k.
    for part, k in ((first, 1), (third, 3)):
        grad_x, grad_a = torch.autograd.grad(part.sum(), [x, layer.cell.a], retain_graph=True)
        torch.testing.assert_close(grad_x, torch.ones(2, 2))
        torch.testing.assert_close(grad_a, torch.tensor(iterate(k) * 10))
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(last.sum(), x)[0], expected)


def test_a_gradient_of_choice():
    layer = Equilibrium(Affine(), solver=Picard(1e-6, 50))
    x = torch.ones(1, 1, requires_grad=True)
    with FixedPointCorrection(layer, at=[2], gradient=Phantom(3, damping=0.5)) as correction:
        early, _ = correction.split(layer(x))
    torch.testing.assert_close(early, torch.tensor([[1.5]]))
    # damping * sum_i (1 - damping + damping a)^i = 0.5 (1 + 0.75 + 0.75^2)
    torch.testing.assert_close(torch.autograd.grad(early.sum(), x)[0], torch.tensor([[0.5 * (1 + 0.75 + 0.75**2)]]))


def test_the_equilibrium_stands_in_for_what_was_not_reached():
    """What a gradient evaluates after the solve, here at 1.5, 1.625 and 1.72, is no iterate."""
    layer = Equilibrium(Affine(), solver=Picard(0.3, 50), gradient=Phantom(3))  # z = 0, 1, 1.5 and stop
    with FixedPointCorrection(layer, at=(1, 2, 4, 90)) as correction:
        parts = correction.split(layer(torch.ones(2, 1)))
    assert [part[0].item() for part in parts] == [1, 1.5, 1.5, 1.5, 1.5]
    with FixedPointCorrection(layer, at=[9]):
        assert layer(torch.ones(2, 1)).flatten().tolist() == [1.5, 1.5, 1.5, 1.5]


def test_samples_that_finish_early_stand_still():
    layer = Equilibrium(Affine(), solver=Picard(1e-6, 50))
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    z0 = torch.tensor([[2.0], [4.0], [0.0], [8.0]])  # all but the third are there
    with FixedPointCorrection(layer, at=(1, 2)) as correction, SolveLog(layer) as log:
        first, second, last = correction.split(layer(x, z0=z0))
    assert log.steps.tolist()[:2] == [1, 1] and log.steps[2] > 9
    torch.testing.assert_close(first, torch.tensor([[2.0], [4.0], [3.0], [8.0]]))
    torch.testing.assert_close(second, torch.tensor([[2.0], [4.0], [4.5], [8.0]]))
    torch.testing.assert_close(last, 2 * x)


def test_the_loss_is_the_weighted_mean():
    model = nn.Sequential(Equilibrium(Affine(), solver=Picard(1e-6, 50)), nn.Linear(2, 2))
    x, labels = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
    criterion = nn.CrossEntropyLoss()
    with FixedPointCorrection(model, at=(1, 3), decay=0.5) as correction:
        logits = model(x)
        loss = correction.loss(criterion, logits, labels)
        with pytest.raises(ValueError, match="logits must have 3 x 2 rows, as in training mode, got 2"):
            correction.loss(criterion, model.eval()(x), labels)
    assert logits.shape == (6, 2)
    losses = [criterion(model[1](value * x), labels) for value in (iterate(1), iterate(3), 2)]
    torch.testing.assert_close(loss, (0.25 * losses[0] + 0.5 * losses[1] + losses[2]) / 1.75)


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_nothing_changes_in_evaluation_or_afterwards(name):
    cell, x = cell_and_input(name)
    layer = Equilibrium(cell, solver=Anderson())
    plain = layer(x)
    with (
        FixedPointCorrection(layer, at=[1]),
        JacobianPenalty(layer) as penalty,
        SolveLog(layer, spectral_steps=1) as log,
    ):
        both = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), plain)
        assert torch.equal(layer.eval()(x), plain)
    assert both.shape == (6, *x.shape[1:]) and torch.equal(both[3:], plain) and not torch.equal(both[:3], plain)
    assert penalty.mean() > 0 and log.spectral_radius.shape == (9,)
    assert torch.equal(layer.train()(x), plain)
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._solution_hooks, cell._forward_pre_hooks)
    assert not any(hooks)


@pytest.mark.parametrize(
    ("layers", "settings", "message"),
    [
        (0, {"at": [1]}, "model must have exactly 1 Equilibrium, got 0"),
        (2, {"at": [1]}, "model must have exactly 1 Equilibrium, got 2"),
        (1, {"at": []}, r"at must be increasing integers of at least 1, got \[\]"),
        (1, {"at": [0, 1]}, r"at must be increasing integers of at least 1, got \[0, 1\]"),
        (1, {"at": (2, 2)}, r"at must be increasing integers of at least 1, got \(2, 2\)"),
        (1, {"at": [1], "decay": 0}, r"decay must be in \(0, 1\], got 0"),
        (1, {"at": [1], "decay": 1.5}, r"decay must be in \(0, 1\], got 1.5"),
        (1, {"at": [1], "gradient": Unrolled()}, "gradient must need no more than f and an iterate.* got Unrolled"),
    ],
)
def test_bad_settings(layers, settings, message):
    model = nn.ModuleList(Equilibrium(Affine()) for _ in range(layers))
    with pytest.raises(ValueError, match=message):
        FixedPointCorrection(model, **settings)


def test_parametrised_weights_are_computed_once_for_all_iterates():
    layer = Equilibrium(Affine())
    parametrize.register_parametrization(layer.cell, "a", halving := Halving())
    halving.calls = 0
    with FixedPointCorrection(layer, at=(1, 2, 3)):
        layer(torch.ones(1, 1)).sum().backward()
    assert halving.calls == 2  # for the solve with its gradient, and for the iterates
    assert layer.cell.parametrizations.a.original.grad > 0


class Halving(nn.Module):
    calls = 0

    def forward(self, a):
        self.calls += 1
        return a / 2


def test_an_output_that_cannot_be_split():
    correction = FixedPointCorrection(Equilibrium(Affine()), at=(1, 2))
    with pytest.raises(ValueError, match="logits must have a multiple of 3 rows"):
        correction.split(torch.zeros(4, 2))


def test_a_solve_that_failed_leaves_nothing_behind():
    def fail(cell, args):
        if args[0].max() > 1.9:
            raise RuntimeError("mine")

    layer = Equilibrium(Affine(), solver=Picard(1e-6, 50))
    with FixedPointCorrection(layer, at=[1]) as correction:
        handle = layer.cell.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="mine"):
            layer(torch.ones(1, 1))
        handle.remove()
        early, last = correction.split(layer(3 * torch.ones(1, 1)))
    assert early.item() == 3 and last.item() == pytest.approx(6, rel=1e-5)
