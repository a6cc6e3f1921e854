import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import implicit_gradients, relative_error
from problems import generator
from torch import nn

from timm_deq import Anderson, Equilibrium, Implicit, Picard, SolveLog, Status
from timm_deq.monotone import ForwardBackward, Monotone, PeacemanRachford, Resolvent

N = 6
TIGHT = Picard(1e-12, 2000)


class Direct(nn.Module):
    """`relu(W z + x)` with W written out, on given A, B."""

    def __init__(self, A, B, m):
        super().__init__()
        self.A, self.B, self.m = nn.Parameter(A.clone()), nn.Parameter(B.clone()), m

    @property
    def W(self):
        return torch.stack(
            [
                (1 - self.m) * row - self.A.T @ (self.A @ row) + (self.B - self.B.T).T @ row
                for row in torch.eye(len(self.A), dtype=self.A.dtype)
            ],
            dim=1,
        ).T

    def forward(self, z, x):
        return F.relu(z @ self.W.T + x)


def originals(m=0.5, scale=0.5):
    A, B = scale * torch.randn(2, N, N, generator=generator(), dtype=torch.float64)
    return A, B, m


def cell_of(kind, direct, step):
    cell = kind(N, monotonicity=direct.m, step=step, dtype=torch.float64)
    values = (direct.A.detach(), direct.B.detach())
    cell.load_state_dict(dict(zip(cell.state_dict(), values, strict=True)))
    return cell


def layer_of(kind, direct, *, step=None, solver=TIGHT):
    """A layer whose output is z*, and its cell."""
    L = torch.linalg.matrix_norm(torch.eye(N) - direct.W.detach(), 2).item()
    cell = cell_of(kind, direct, step or direct.m / L**2)
    solve = Equilibrium(cell, solver=solver, gradient=Implicit(Anderson(1e-12, 300)))
    return nn.Sequential(solve, nn.ReLU()) if kind is PeacemanRachford else solve, cell


def inputs(batch=5):
    return torch.randn(batch, N, generator=generator(1), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("m", [0.1, 1.0, 3.0])
def test_monotone_is_the_formula_and_is_monotone(m):
    direct = Direct(*originals(m))
    W = Monotone(m)(direct.A, direct.B)
    torch.testing.assert_close(W, direct.W)
    symmetric = torch.eye(N) - (W + W.T) / 2
    assert torch.linalg.eigvalsh(symmetric).min() >= m - 1e-12
    torch.testing.assert_close(Monotone(m)(*Monotone(m).right_inverse(W)), W)


def test_a_weight_that_is_not_monotone_is_projected():
    W = torch.diag(torch.tensor([2.0, 0.5, -4.0])) + torch.tensor([[0.0, 3, 0], [-3, 0, 0], [0, 0, 0]])
    nearest = Monotone(0.25)(*Monotone(0.25).right_inverse(W))
    expected = torch.diag(torch.tensor([0.75, 0.5, -4.0])) + (W - W.T) / 2  # eigenvalues of W at most 1 - m
    torch.testing.assert_close(nearest, expected)


def test_the_resolvent_by_a_solve():
    W = Monotone(0.5)(*originals()[:2])
    rhs = torch.ones(N, dtype=torch.float64)
    y = Resolvent(0.7)(W) @ rhs
    torch.testing.assert_close(y + 0.7 * (y - W @ y), rhs)


@pytest.mark.parametrize("step", [0.05, 0.5, 5.0])
def test_peaceman_rachford_finds_the_equilibrium_for_every_step(step):
    direct, x = Direct(*originals()), inputs()
    z_star = layer_of(PeacemanRachford, direct, step=step)[0](x)
    assert z_star.any() and (z_star == 0).any()
    torch.testing.assert_close(direct(z_star, x), z_star, rtol=1e-9, atol=1e-9)


def test_both_splittings_agree():
    direct, x = Direct(*originals()), inputs()
    forward_backward, reflected = (layer_of(kind, direct)[0](x) for kind in (ForwardBackward, PeacemanRachford))
    torch.testing.assert_close(forward_backward, reflected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(direct(forward_backward, x), forward_backward, rtol=1e-9, atol=1e-9)


def test_forward_backward_contracts_below_the_step_stated():
    """Down to the rate sqrt(1 - 2 step m + step^2 L^2) of the theory, which is 1 at 2 m / L^2."""
    direct, x = Direct(*originals()), inputs(1)
    L = torch.linalg.matrix_norm(torch.eye(N) - direct.W.detach(), 2).item()
    for share in (0.1, 0.5, 0.9):
        step = share * 2 * direct.m / L**2
        cell = cell_of(ForwardBackward, direct, step)
        a, b = torch.randn(2, 1000, N, generator=generator(2), dtype=torch.float64)
        rates = (cell(a, x) - cell(b, x)).norm(dim=1) / (a - b).norm(dim=1)
        assert rates.max() <= (1 - 2 * step * direct.m + step**2 * L**2) ** 0.5 < 1


def test_peaceman_rachford_converges_where_the_plain_iteration_does_not():
    direct, x = Direct(*originals(scale=1.5)), inputs().abs()
    plain = Equilibrium(direct, solver=Picard(1e-6, 200))
    split, _ = layer_of(PeacemanRachford, direct, step=0.2, solver=Picard(1e-6, 200))
    with SolveLog(plain) as failing, SolveLog(split) as log, torch.no_grad():
        plain(x), split(x)
    assert (failing.status != Status.CONVERGED).all() and (log.status == Status.CONVERGED).all()


@pytest.mark.parametrize("kind", [ForwardBackward, PeacemanRachford])
def test_implicit_gradients_in_the_raw_parameters(kind):
    direct, x = Direct(*originals()), inputs()
    layer, cell = layer_of(kind, direct)
    g = torch.randn(x.shape, generator=generator(7), dtype=x.dtype)
    z_star = layer(x)
    grads = torch.autograd.grad((z_star * g).sum(), [x, *cell.parameters()])
    assert relative_error(list(grads), implicit_gradients(direct, x, z_star.detach(), g)) < 1e-6


def test_weights_move_between_cells_and_layers_are_copied():
    direct, x = Direct(*originals()), inputs()
    (_, first), (layer, second) = layer_of(ForwardBackward, direct), layer_of(PeacemanRachford, direct)
    assert list(first.state_dict()) == list(second.state_dict())
    assert [p.numel() for p in first.parameters()] == [N * N, N * N]
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("features", [8, 128])
@pytest.mark.parametrize("kind", [ForwardBackward, PeacemanRachford])
def test_the_defaults_contract_at_initialisation(kind, features):
    torch.manual_seed(0)
    cell = kind(features)
    a, b, x = torch.randn(3, 100, features)
    assert ((cell(a, x) - cell(b, x)).norm(dim=1) < 0.95 * (a - b).norm(dim=1)).all()
    with SolveLog(layer := Equilibrium(cell, solver=Picard(1e-3, 40))) as log:
        layer(x)
    assert (log.status == Status.CONVERGED).all()


@pytest.mark.parametrize("kind", [ForwardBackward, PeacemanRachford])
def test_low_precision_and_meta(kind):
    cell = kind(4, dtype=torch.bfloat16)
    z, x = torch.ones(2, 1, 4, dtype=torch.bfloat16)
    assert cell(z, x).dtype == torch.bfloat16
    assert kind(4, device="meta")(z.to("meta"), x.to("meta").float()).shape == (1, 4)


@pytest.mark.parametrize("kind", [ForwardBackward, PeacemanRachford])
def test_bad_settings(kind):
    with pytest.raises(ValueError, match="monotonicity must be above 0, got -1"):
        kind(4, monotonicity=-1)
    with pytest.raises(ValueError, match="step must be above 0, got 0"):
        kind(4, step=0)
