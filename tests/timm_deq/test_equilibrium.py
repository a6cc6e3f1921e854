import copy
import gc

import pytest
import torch
from problems import cell_and_input
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from timm_deq import (
    Anderson,
    Equilibrium,
    Implicit,
    NonFiniteInputError,
    Phantom,
    Picard,
    SolveLog,
    Status,
    Unrolled,
)


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
    assert counted.calls == 1  # for the solve and for the gradient
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


def test_spectral_normalisation_is_the_same_map_for_the_solve_and_its_gradient():
    """Each computation of the weight takes a power step in training: one more would be another map."""
    cell, x = cell_and_input("attention")
    parametrizations.spectral_norm(cell.qkv)
    seen = []
    cell.register_forward_pre_hook(lambda *_: seen.append(cell.qkv.weight), with_kwargs=True)
    z = Equilibrium(cell, solver=Anderson(1e-10, 100))(x)
    assert len(seen) > 3 and all(weight is seen[0] for weight in seen) and seen[0].requires_grad
    z.square().sum().backward()
    assert cell.qkv.parametrizations.weight.original.grad.abs().sum() > 0


def test_autocast_computes_parametrised_weights_in_float32():
    cell, x = cell_and_input("attention", dtype=torch.float32)
    parametrizations.orthogonal(cell.qkv)
    seen = []
    cell.register_forward_pre_hook(lambda *_: seen.append(cell.qkv.weight.dtype), with_kwargs=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Equilibrium(cell)(x).sum().backward()
    assert set(seen) == {torch.float32}


def test_autocast_reaches_the_weights():
    """The casts that autocast keeps from the solve, which is off the tape, may not cut the gradient off."""
    cell, x = cell_and_input("conv", dtype=torch.float32)
    g, grads = torch.randn(x.shape), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            z = Equilibrium(cell)(x)
        grads.append(torch.autograd.grad((z * g).sum(), cell.branch[0].weight)[0].flatten())
    assert torch.cosine_similarity(*grads, dim=0) > 0.98


class Slowing(nn.Module):
    """`f(z, x) = a tanh(z) + x / 10`, which contracts the less, the smaller x: samples differ in their evaluations."""

    def forward(self, z, x):
        return 0.95 * z.tanh() + x / 10


def test_evaluation_sets_finished_samples_aside():
    x = torch.logspace(-2, 2, 16, dtype=torch.float64).unsqueeze(1).expand(16, 3)
    logs, values = [], []
    for gather, training in ((True, False), (False, False), (True, True)):
        layer = Equilibrium(Slowing(), solver=Picard(1e-6, 400), gather=gather).train(training)
        with SolveLog(layer) as log:
            values.append(layer(x))
        logs.append(log)
    gathered, waited, training = logs
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    assert torch.equal(gathered.steps, waited.steps)
    assert gathered.evaluations.sum() < 0.7 * waited.evaluations.sum()
    assert torch.equal(training.evaluations, waited.evaluations)  # masks and tapes are for the whole batch


def test_a_gradient_in_evaluation_is_of_the_whole_batch():
    cell, x = cell_and_input("conv")
    layer = Equilibrium(cell).eval()
    with SolveLog(layer) as log:
        layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and len(set(log.evaluations.tolist())) == 1


def test_a_random_budget_in_training():
    x = torch.ones(2, 3)
    layer = Equilibrium(Affine(0.99), solver=Picard(1e-12, 9), min_steps=4)
    with SolveLog(layer) as log:
        for _ in range(60):
            with torch.device("meta"):  # where numbers that are drawn could not be read
                layer(x)
        layer.eval()(x)
    drawn = log.steps.view(-1, 2)
    assert set(drawn[:-1, 0].tolist()) == {4, 5, 6, 7, 8, 9} and torch.equal(drawn[:, 0], drawn[:, 1])
    assert drawn[-1, 0] == 9
    with pytest.raises(ValueError, match="min_steps must be at least 1, got 0"):
        Equilibrium(Affine(), min_steps=0)


class Changing(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def forward(self, z, x):
        return self.change(z)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z[:, :1], r"f must keep the shape of its input, \(2, 3\), got \(2, 1\)"),
        (lambda z: z.double(), "f must keep the dtype of its input, torch.float32, got torch.float64"),
        (lambda z: z.to("meta"), "f must keep the device of its input, cpu, got meta"),
    ],
)
def test_a_cell_that_changes_the_state(change, message):
    with pytest.raises(ValueError, match=message):
        Equilibrium(Changing(change))(torch.ones(2, 3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_is_not_finite(bad, training):
    x = torch.ones(4, 3)
    x[1, 2] = x[3, 0] = bad
    layer = Equilibrium(Affine()).train(training)
    with pytest.raises(NonFiniteInputError, match="x must be finite, got NaN or infinity in 2 of 4 samples"):
        layer(x)
    assert layer(torch.full((1, 3), 1e30)).isfinite().all() and layer(torch.ones(0, 3)).shape == (0, 3)


def test_a_warm_start_may_be_the_answer():
    """No step leads to it, and yet the gradient of the steps taken is known: none."""
    layer = Equilibrium(Affine(), solver=Picard(), gradient=Unrolled())
    layer(torch.ones(1, 2), z0=torch.full((1, 2), 2.0)).sum().backward()
    assert layer.cell.a.grad == 0


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


def test_the_histories_of_a_solver_do_not_wait_for_the_backward_pass():
    cell, x = cell_and_input("conv")
    z = Equilibrium(cell, solver=Anderson(memory=7))(x)
    shapes = {tuple(t.shape) for t in gc.get_objects() if type(t) is torch.Tensor}
    assert z.requires_grad and tuple(x.shape) in shapes and (3, 7, 16) not in shapes


def test_the_map_of_a_forward_is_public():
    cell, x = cell_and_input("attention")
    parametrize.register_parametrization(cell.qkv, "weight", counted := Doubled())
    layer = Equilibrium(cell, solver=Anderson(1e-10, 100))
    z_star = layer(x)
    counted.calls = 0
    with layer.bind(x) as f:
        torch.testing.assert_close(f(z_star), z_star)
        f(z_star).sum().backward()
    assert counted.calls == 1 and cell.qkv.parametrizations.weight.original.grad.abs().sum() > 0
    assert not parametrize._cache_enabled


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
