import pytest
import torch
from oracles import dense_jacobian, f_of_sample
from problems import cell_and_input
from torch import nn

from timm_deq import Equilibrium, Implicit, Picard, SolveLog, Status


class Affine(nn.Module):
    """`f(z, x) = a z + x`, with the Jacobian a."""

    def __init__(self, a: float = 0.5) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, z, x):
        return self.a * z + x


def test_backward_solves():
    layer = Equilibrium(Affine(), solver=Picard(0.3, 4), gradient=Implicit(Picard(0.1, 9)))
    with SolveLog(layer) as log:
        assert log.backward_steps.shape == log.backward_residual.shape == log.backward_status.shape == (0,)
        layer(torch.ones(3, 1)).sum().backward()
    # u = u / 2 + 1 from u = 1, 1.5, 1.75: residuals 1/3, 1/7, 1/15; forward, from z = 0: 1, 1/3, 1/7
    assert log.backward_steps.tolist() == [3, 3, 3] and (log.backward_status == Status.CONVERGED).all()
    torch.testing.assert_close(log.backward_residual, torch.full((3,), 1 / 15))
    torch.testing.assert_close(log.residual, torch.full((3,), 1 / 7))
    assert log.summary()["backward_mean_residual"] == pytest.approx(1 / 15)
    assert log.summary()["backward_mean_steps"] == 3 and log.summary()["backward_converged"] == 1


def test_a_sample_that_waits_is_evaluated_along():
    layer = Equilibrium(Affine(), solver=Picard(0.3, 9))
    z0 = torch.zeros(8, 1)
    z0[0] = 2.0  # the equilibrium
    with SolveLog(layer) as log, torch.no_grad():
        layer(torch.ones(8, 1), z0=z0)
        layer(torch.ones(1, 1), z0=z0[:1])
    assert log.steps.tolist() == [1, *[3] * 7, 1] and log.evaluations.tolist() == [*[3] * 8, 1]
    assert log.summary()["mean_evaluations"] == pytest.approx(25 / 9)


def test_states_are_not_kept():
    with SolveLog(layer := Equilibrium(Affine())) as log:
        layer(torch.ones(2, 1)).sum().backward()
    kept = [tensor for solves in log._solves.values() for solve in solves for tensor in solve.values()]
    assert len(kept) == 2 * 4 and all(tensor.shape == (2,) for tensor in kept)  # a number of each sample


def test_failures_are_left_out_of_mean_residuals():
    class Partly(nn.Module):
        def forward(self, z, x):
            return torch.where(x > 1, torch.inf, z / 2 + x)

    layer = Equilibrium(Partly(), solver=Picard(0.3, 4))
    with SolveLog(layer) as log:
        layer(torch.tensor([[1.0], [2.0]]))
    assert log.summary()["mean_residual"] == pytest.approx(1 / 7) and log.summary()["nonfinite"] == 0.5


def test_the_median_counts_a_failed_sample_as_the_worst():
    layer = Equilibrium(Overflowing(), solver=Picard(0.3, 4))
    with SolveLog(layer) as log:
        x = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]).unsqueeze(1)
        layer(x, z0=torch.tensor([2.0, 1.8, 0.0, 1e30, 1e30]).unsqueeze(1))
    # f(1.8) = 1.9 and f(1.5) = 1.75, the third iterate from 0; the last two are infinite at once.
    torch.testing.assert_close(log.residual, torch.tensor([0.0, 1 / 19, 1 / 7, torch.inf, torch.inf]))
    assert log.summary()["median_residual"] == pytest.approx(1 / 7)


class Overflowing(nn.Module):
    """`f(z, x) = a z / 2 + x`; a is 1 for a positive x and overflows otherwise, in f and in its derivative."""

    def forward(self, z, x):
        scale = torch.where(x > 0, 1.0, 1e30)
        return z * scale * scale / 2 + x


def test_a_backward_solve_that_failed_is_left_out_of_the_mean_residual():
    layer = Equilibrium(Overflowing(), solver=Picard(0.3, 4), gradient=Implicit(Picard(0.1, 9)))
    with SolveLog(layer) as log:
        layer(torch.tensor([[1.0], [0.0]], requires_grad=True)).sum().backward()
    assert log.backward_status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    torch.testing.assert_close(log.backward_residual, torch.tensor([1 / 15, torch.inf]))
    summary = log.summary()
    assert summary["backward_mean_residual"] == pytest.approx(1 / 15)
    assert summary["backward_converged"] == 0.5 and summary["backward_mean_steps"] == 2  # 3 and 1


def test_a_trace_is_padded_with_its_own_last_residuals():
    layer = Equilibrium(Affine(), solver=Picard(0.3, 9))
    with SolveLog(layer) as log:
        layer(torch.ones(2, 1), z0=torch.tensor([[1.8], [1.0]]))
        layer(torch.ones(1, 1))
    # f(1) = 1.5 and f(1.5) = 1.75; from 0 it takes an evaluation more.
    expected = [[1 / 19, 1 / 3, 1], [1 / 19, 1 / 7, 1 / 3], [1 / 19, 1 / 7, 1 / 7]]
    torch.testing.assert_close(log.trace, torch.tensor(expected))


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_the_spectral_radius_at_the_equilibria(name):
    cell, x = cell_and_input(name)
    layer = Equilibrium(cell)
    with SolveLog(nn.Sequential(layer), spectral_steps=100) as log:
        z = layer(x).detach()
        with torch.no_grad():
            layer.eval()(x=x[:1])
    jacobians = [dense_jacobian(f_of_sample(lambda z: cell(z, x), i, z), z[i : i + 1]) for i in range(3)]
    expected = torch.stack([torch.linalg.eigvals(J).abs().max() for J in jacobians])
    torch.testing.assert_close(log.spectral_radius, torch.cat([expected, expected[:1]]), rtol=0.03, atol=0)
    assert log.summary()["spectral_radius"] == pytest.approx(log.spectral_radius.mean().item())
    assert not log.spectral_radius.requires_grad and not layer._forward_hooks and len(log) == 2


def test_the_spectral_radius_is_measured_only_if_asked_for():
    layer = Equilibrium(Affine())
    with SolveLog(layer) as log:
        layer(torch.ones(1, 1))
        assert not layer._forward_hooks
    assert log.spectral_radius.shape == (0,) and "spectral_radius" not in log.summary()
    with pytest.raises(ValueError, match="spectral_steps must be at least 0, got -1"):
        SolveLog(layer, spectral_steps=-1)
