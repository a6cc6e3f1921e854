"""An accelerator gives what the CPU gives, in every precision, and is waited for only where early exit needs it."""

import copy
import warnings

import pytest
import timm
import torch
from oracles import relative_error
from problems import Linear, cell_and_input, generator

from timm_deq import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    JacobianPenalty,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    ReversibleIteration,
    Shine,
    SolveLog,
    Unrolled,
    fixed_point,
    set_solver,
    spectral_radius,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TIGHT = Anderson(1e-13, 60)
GRADIENTS = {
    "implicit": (TIGHT, Implicit(TIGHT)),
    "phantom": (TIGHT, Phantom(5, damping=0.8)),
    "neumann": (TIGHT, Neumann(60)),
    "shine": (Broyden(1e-13, 300, memory=60), Shine(40)),
    "reversible": (ReversibleIteration(1e-14, 70, damping=0.5), Reversible()),
    "unrolled": (Picard(1e-13, 40), Unrolled()),
}


@pytest.fixture(autouse=True)
def full_float32():
    """Convolutions in float32 proper, not in TF32, which is the default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


def both(module, *tensors):
    """The module and what it is given, on the CPU and on the accelerator."""
    there = copy.deepcopy(module).to(DEVICE), *(t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors)
    return (module, *tensors), there


def together(tensors):
    """One vector of several gradients, some of which are rounding errors about zero."""
    return [torch.cat([t.flatten() for t in tensors])]


@pytest.mark.parametrize("kind", ["conv", "attention"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_equilibrium_and_its_gradients(kind, gradient):
    cell, x = cell_and_input(kind)
    solver, chosen = GRADIENTS[gradient]
    found = []
    for layer, given in both(Equilibrium(cell, solver=solver, gradient=chosen), x):
        z = layer(given)
        weights = torch.linspace(-1, 2, z.numel(), dtype=z.dtype, device=z.device).view_as(z)
        gradients = torch.autograd.grad((z * weights).sum(), [given, *layer.parameters()])
        found.append([t.detach().cpu() for t in (z, *gradients)])
    # What is run backwards multiplies its rounding errors by the damping at every step.
    assert relative_error(found[1], found[0]) < (1e-6 if gradient == "reversible" else 1e-9)


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_a_solve_reports_what_it_does_on_the_cpu(solver):
    problem = Linear(radius=0.6)
    here = fixed_point(problem, problem.z0, solver(1e-6, 60))
    problem.A, problem.b = problem.A.to(DEVICE), problem.b.to(DEVICE)
    there = fixed_point(problem, problem.z0.to(DEVICE), solver(1e-6, 60))
    torch.testing.assert_close(there.value.cpu(), here.value, rtol=1e-6, atol=1e-6)
    assert there.steps.tolist() == here.steps.tolist() and there.status.tolist() == here.status.tolist()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_model_in_float32(training, layout):
    torch.manual_seed(0)
    model = timm.create_model("deq_resnet8_cifar", num_classes=10)
    set_solver(model, tol=1e-6, max_steps=40)
    with torch.no_grad():  # statistics of features, without which a fresh model does not converge in evaluation mode
        for _ in range(30):
            model.train()(torch.randn(16, 3, 32, 32, generator=generator(1)))
    x = torch.randn(8, 3, 32, 32, generator=generator()).requires_grad_()
    found = []
    for net, given in both(model.train(training), x):
        logits = net.to(memory_format=layout)(given.to(memory_format=layout))
        gradients = torch.autograd.grad(logits.logsumexp(1).sum(), [given, *net.parameters()])
        found.append([t.detach().cpu() for t in (logits, *gradients)])
    assert relative_error(found[1][:1], found[0][:1]) < 1e-4
    assert relative_error(together(found[1][1:]), together(found[0][1:])) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    model = timm.create_model("deq_resnet8_cifar", num_classes=10).to(DEVICE).train()
    x = torch.randn(16, 3, 32, 32, device=DEVICE)
    found = []
    for enabled in (False, True):
        with SolveLog(model) as log, torch.autocast(DEVICE, dtype, enabled=enabled):
            logits = model(x)
        gradients = torch.autograd.grad(logits.float().logsumexp(1).sum(), list(model.parameters()))
        found.append([logits.detach().float(), *gradients])
        assert all(torch.isfinite(t).all() for t in found[-1]) and log.summary()["mean_residual"] < 3e-2
    assert relative_error(found[1][:1], found[0][:1]) < 5e-2
    assert relative_error(together(found[1][1:]), together(found[0][1:])) < 0.2


def count_waits(run):
    """How often a call waits for the accelerator."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_a_solve_waits_only_to_ask_whether_it_is_done(solver):
    steps, every = 12, 4
    cell = torch.nn.Linear(8, 8).to(DEVICE)
    z0 = torch.zeros(4, 8, device=DEVICE)

    def solve(f):
        with torch.no_grad():
            fixed_point(f, z0, solver(1e-30, steps))

    solve(cell)  # libraries wait when they begin
    assert count_waits(lambda: solve(cell)) <= (steps - 1) // every
    assert count_waits(lambda: solve(lambda z: cell(z) + z.sum().item())) >= steps  # which the count does see


def test_tf32_puts_no_floor_under_the_residual():
    """The map is of float64: what is left of TF32 would be in the solver's own products."""
    W = 0.9 * torch.linalg.qr(torch.randn(256, 256, generator=generator(), dtype=torch.float64))[0].to(DEVICE)
    x = torch.randn(16, 256, generator=generator(1)).to(DEVICE)
    torch.set_float32_matmul_precision("high")
    try:
        solution = fixed_point(lambda z: ((z.double() @ W).tanh() + x).float(), x, Anderson(1e-6, 60))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert solution.residual.max() <= 1e-6


def test_training_waits_only_to_ask_whether_it_is_done():
    model = timm.create_model("deq_resnet8_cifar", num_classes=10).to(DEVICE).train()
    set_solver(model, max_steps=12, tol=1e-9)
    x = torch.randn(4, 3, 32, 32, device=DEVICE)

    def update():
        torch.autograd.grad(model(x).sum(), list(model.parameters()))

    update()
    assert count_waits(update) <= 2 * (11 // 4) + 2  # there and back, and two looks at the input and the gradient


# Forward mode loads decompositions that torch itself still scripts.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_derivatives_of_other_orders():
    cell, x = cell_and_input("attention")
    v, found = torch.randn(x.shape, generator=generator(3), dtype=x.dtype), []
    for layer, a, b in both(Equilibrium(cell, solver=TIGHT, gradient=Implicit(TIGHT)), x, v):
        with torch.no_grad():
            _, tangent = torch.func.jvp(layer, (a.detach(),), (b,))
        (g,) = torch.autograd.grad(layer(a).pow(3).sum(), a, create_graph=True)
        (second,) = torch.autograd.grad((g * b).sum(), a)
        samples = torch.func.vmap(torch.func.grad(lambda x, layer=layer: layer(x[None]).pow(2).sum()))(a.detach())
        found.append([t.detach().cpu() for t in (tangent, second, samples)])
    assert relative_error(found[1], found[0]) < 1e-9


def test_spectral_radius_and_jacobian_penalty():
    problem = Linear(radius=0.7)
    A = problem.A.to(DEVICE)
    radius = spectral_radius(lambda z: z @ A.T, torch.zeros(4, 6, dtype=A.dtype, device=DEVICE))
    torch.testing.assert_close(radius.cpu(), torch.full((4,), 0.7, dtype=A.dtype), rtol=0.05, atol=0)
    cell, x = cell_and_input("conv")
    layer = Equilibrium(cell, solver=TIGHT).to(DEVICE).train()
    with JacobianPenalty(layer) as penalty:
        layer(x.detach().to(DEVICE))
        value = penalty.mean()
    (gradient,) = torch.autograd.grad(value, [next(iter(layer.parameters()))])
    assert value.is_cuda and value > 0 and torch.isfinite(gradient).all()


# After its one break, dynamo itself looks at `.grad` of the tensors that the second graph receives.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")  # by inductor itself
@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_a_compiled_model(gradient):
    torch.manual_seed(0)
    model = timm.create_model("deq_resnet8_cifar", num_classes=10, gradient=gradient, memory=2).to(DEVICE).train()
    x = torch.randn(8, 3, 32, 32, generator=generator()).to(DEVICE)
    found = []
    for call in (model, torch.compile(copy.deepcopy(model))):
        logits = call(x)
        module = getattr(call, "_orig_mod", call)
        gradients = torch.autograd.grad(logits.logsumexp(1).sum(), list(module.parameters()))
        found.append([logits.detach(), *gradients])
    assert relative_error(found[1][:1], found[0][:1]) < 1e-3
    assert relative_error(together(found[1][1:]), together(found[0][1:])) < 1e-2
