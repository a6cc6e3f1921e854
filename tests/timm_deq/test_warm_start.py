import pytest
import torch
from problems import cell_and_input
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_deq import Broyden, Equilibrium, Implicit, Picard, Shine, SolveLog, Status, Unrolled, WarmStart


def layer_and_views():
    cell, x = cell_and_input("conv")
    layer = Equilibrium(cell, solver=Picard(1e-8, 200), gradient=Implicit(Picard(1e-8, 200)))
    return layer, x, (x + 1e-3 * torch.randn(x.shape, dtype=x.dtype)).detach()


def gradient(layer, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad((layer(x) * torch.arange(x.numel()).view_as(x)).sum(), x)[0]


def test_a_second_view_takes_fewer_evaluations_and_has_the_same_answer():
    layer, x, view = layer_and_views()
    cold = layer(view)
    with WarmStart(layer), SolveLog(layer) as log:
        layer(x)
        warm = layer(view)
        layer(view[:2])  # another shape: a cold start
    torch.testing.assert_close(warm, cold, rtol=1e-6, atol=1e-7)
    first, second, third = log.steps.split([3, 3, 2])
    assert (second < first - 3).all() and (third >= first[:2] - 1).all()
    with SolveLog(layer) as log:
        layer(view)
    assert torch.equal(log.steps, first) and not layer._solution_hooks and not layer._forward_pre_hooks


def test_a_checkpoint_repeats_all_steps():
    """Those of its backward pass, begun where the forward ended, would be none, and their derivative zero."""
    layer, x, _ = layer_and_views()
    layer.gradient = Unrolled()
    expected = gradient(layer, x)
    for reentrant in (False, True):
        x = x.detach().requires_grad_()
        with WarmStart(layer):
            (checkpoint(layer, x, use_reentrant=reentrant) * torch.arange(x.numel()).view_as(x)).sum().backward()
        torch.testing.assert_close(x.grad, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_a_traced_program_has_no_start_of_its_own():
    layer, x, view = layer_and_views()
    layer.solver = Picard(1e-8, 4)
    with WarmStart(layer), torch.no_grad():
        layer(x)
        traced = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(traced(view), layer(view))


def test_the_adjoint_starts_from_the_last_too():
    layer, x, view = layer_and_views()
    expected = gradient(layer, view)
    with WarmStart(layer), SolveLog(layer) as log:
        gradient(layer, x)
        found = gradient(layer, view)
    first, second = log.backward_steps.split([3, 3])
    assert second.sum() < 0.6 * first.sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_a_start_of_the_caller_s_own_and_forgetting():
    layer, x, view = layer_and_views()
    with WarmStart(layer) as warm, SolveLog(layer) as log:
        layer(x)
        layer(x, z0=torch.zeros_like(x))
        warm.forget()
        layer(x)
    first, given, forgotten = log.steps.split([3, 3, 3])
    assert torch.equal(first, given) and torch.equal(first, forgotten)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_the_exact_adjoint_as_a_start_is_found_at_once(scale):
    """Whatever the scale of the loss, which the solve divides out."""
    layer, x, _ = layer_and_views()
    reports = []
    handle = layer.register_solution_hook(lambda _, phase, solution, trace: reports.append((phase, solution)))
    g = scale * torch.arange(x.numel(), dtype=x.dtype).view_as(x)
    layer(x).backward(g)
    layer(x, u0=reports[-1][1].value).backward(g)
    handle.remove()
    assert [phase for phase, _ in reports] == ["forward", "backward"] * 2
    assert reports[1][1].steps.max() > 3 and reports[3][1].steps.max() == 1


@pytest.mark.parametrize("gradient", [Implicit(Picard(1e-8, 200)), Shine(60)], ids=["implicit", "shine"])
def test_a_batch_of_another_size_starts_cold_in_both_passes(gradient):
    cell, x = cell_and_input("conv")
    layer = Equilibrium(cell, solver=Broyden(1e-8, 200, memory=60), gradient=gradient)
    expected = layer_gradient(layer, x[:2])
    with WarmStart(layer):
        layer_gradient(layer, x)
        with torch.no_grad():
            layer(x[:2])  # from now on the equilibrium is of two samples, the adjoint still of three
        torch.testing.assert_close(layer_gradient(layer, x[:2]), expected, rtol=1e-6, atol=1e-7)
    other = x.new_ones(5, 4, 2, 2)
    (found,) = torch.autograd.grad(layer(x[:2], u0=other).sum(), x)
    torch.testing.assert_close(found[:2], expected)


def layer_gradient(layer, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x).sum(), x)[0]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("solver", [Picard(1e-8, 200), Broyden(1e-8, 200)], ids=["picard", "broyden"])
def test_a_step_that_is_not_finite_is_seen_and_leaves_nothing_behind(solver, bad):
    """Its gradient is not finite in that sample, and the next step has the gradients of one without it."""
    cell, x = cell_and_input("conv")
    layer = Equilibrium(cell, solver=solver, gradient=Implicit(solver))
    expected = gradient(layer, x)
    weights = torch.arange(x.numel()).view_as(x).to(x.dtype)
    with WarmStart(layer):
        gradient(layer, x)
        spoilt = weights.clone()
        spoilt[1] = bad
        (found,) = torch.autograd.grad((layer(x) * spoilt).sum(), x)
        assert not found[1].isfinite().all()
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient(layer, x), expected, rtol=1e-5, atol=1e-5)


def test_a_sample_whose_solve_failed_starts_cold():
    class Escaping(nn.Module):
        """Doubles, and leaves the range of finite numbers, for a negative x."""

        def forward(self, z, x):
            return torch.where(z.abs() > 100, torch.nan, torch.where(x < 0, 2 * z + x, z / 2 + x))

    layer = Equilibrium(Escaping(), solver=Picard(1e-4, 50)).eval()
    with WarmStart(layer), SolveLog(layer) as log:
        layer(torch.tensor([[1.0], [-1.0]]))
        layer(torch.tensor([[1.0], [1.0]]))
    assert log.status.view(2, 2).tolist() == [[0, Status.NONFINITE], [0, 0]]
    assert log.steps[2] == 1 and log.steps[3] == log.steps[0]  # warm, and as if for the first time
