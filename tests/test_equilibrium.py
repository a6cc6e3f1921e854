import copy

import pytest
import torch
from problems import cell_and_input
from torch import nn
from torch.nn.utils import parametrize

from timm_deq import Anderson, Equilibrium, Implicit, Phantom, Picard, SolveLog, Status


class Affine(nn.Module):
    """`f(z, x) = a z + x`, whose equilibrium is `x / (1 - a)`."""

    def __init__(self, a: float = 0.5) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, z, x):
        return self.a * z + x


class PackedAffine(Affine):
    """A state of twice the input's size."""

    def initial_state(self, x):
        return torch.cat([x, x], dim=1)

    def forward(self, z, x):
        return self.a * z + torch.cat([x, -x], dim=1)


def test_closed_form_value_and_gradient():
    layer = Equilibrium(Affine(), solver=Anderson(1e-7))
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    z = layer(x)
    torch.testing.assert_close(z, 2 * x)
    z.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((1, 2), 2.0))
    torch.testing.assert_close(layer.cell.a.grad, torch.tensor(12.0))  # sum of x / (1 - a)^2


def test_the_cell_may_choose_its_state():
    x = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(Equilibrium(PackedAffine(), solver=Anderson(1e-7))(x), torch.tensor([[2.0, 4, -2, -4]]))


def test_a_warm_start_saves_evaluations():
    layer = Equilibrium(Affine(0.9), solver=Picard(1e-4, 200))
    x = torch.ones(2, 3)
    with SolveLog(layer) as log:
        z = layer(x)
        layer(x, z0=z)
    assert log.steps.tolist()[2:] == [1, 1] and log.steps[0] > 10


@pytest.mark.parametrize("gradient", [Implicit(Anderson(1e-10, 100)), Phantom(5)])
def test_weights_are_computed_once_per_solve_and_keep_their_gradient(gradient):
    cell, x = cell_and_input("attention")
    parametrize.register_parametrization(cell.qkv, "weight", counted := Doubled())
    layer = Equilibrium(cell, gradient=gradient)
    counted.calls = 0
    layer(x).sum().backward()
    assert counted.calls == 2  # off the tape for the solve, on it for the gradient
    assert cell.qkv.parametrizations.weight.original.grad.abs().sum() > 0


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 2

    def right_inverse(self, weight):
        return weight / 2


def test_autocast_keeps_the_state_in_float32():
    cell, x = cell_and_input("conv", dtype=torch.float32)
    seen = []
    cell.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0].dtype), with_kwargs=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = Equilibrium(cell)(x.bfloat16())
        assert z.dtype == torch.float32 and set(seen) == {torch.float32}
        z.sum().backward()
    assert x.grad.isfinite().all()


def test_low_precision_in_low_precision_out():
    cell, x = cell_and_input("conv", dtype=torch.bfloat16)
    z = Equilibrium(cell, solver=Anderson(5e-2))(x)
    assert z.dtype == torch.bfloat16
    z.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


def test_a_frozen_model_leaves_no_tape():
    layer = Equilibrium(Affine()).requires_grad_(False)
    assert not layer(torch.ones(1, 2)).requires_grad
    assert layer(torch.ones(1, 2, requires_grad=True)).requires_grad


def test_deepcopy_and_state_dict():
    layer = Equilibrium(Affine(0.3), solver=Picard(), gradient=Phantom())
    x = torch.ones(1, 2)
    with SolveLog(layer):
        layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.solver == layer.solver
    assert list(layer.state_dict()) == ["cell.a"] and [n for n, _ in layer.named_parameters()] == ["cell.a"]


def test_the_log():
    layer = Equilibrium(Affine(), solver=Picard(0.3, 4))
    with SolveLog(nn.Sequential(layer)) as log:
        assert log.summary() == {} and len(log) == 0
        layer(torch.ones(2, 1)).sum().backward()
        layer(torch.ones(1, 1))
    layer(torch.ones(1, 1))  # closed: not recorded
    # z = 0, 1, 1.5 with residuals 1, 1/3, 1/7
    assert len(log) == 2 and log.steps.tolist() == [3, 3, 3]
    torch.testing.assert_close(log.residual, torch.full((3,), 1 / 7))
    torch.testing.assert_close(log.trace[:, 0], torch.tensor([1, 1 / 3, 1 / 7]))
    assert log.trace.shape == (3, 3) and (log.status == Status.CONVERGED).all()
    summary = log.summary()
    assert summary["samples"] == 3 and summary["mean_steps"] == 3 and summary["converged"] == 1
    assert summary["mean_residual"] == pytest.approx(1 / 7) and summary["backward_converged"] == 1
    # u = u / 2 + 1 from u = 1, 1.5, 1.75: residuals 1/3, 1/7
    assert summary["backward_mean_steps"] == 2
    assert not layer._solution_hooks


def test_a_model_without_equilibrium_has_an_empty_log():
    with SolveLog(nn.Linear(2, 2)) as log:
        pass
    assert log.summary() == {} and log.steps.shape == (0,) and log.trace.shape == (0, 0)


def test_traces_of_different_length_are_padded_with_their_last():
    layer = Equilibrium(Affine(), solver=Picard(0.3, 9))
    with SolveLog(layer) as log:
        layer(torch.ones(1, 1))
        layer(torch.ones(1, 1), z0=torch.full((1, 1), 2.0))
    torch.testing.assert_close(log.trace, torch.tensor([[1, 0], [1 / 3, 0], [1 / 7, 0]]))
