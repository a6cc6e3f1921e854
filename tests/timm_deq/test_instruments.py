"""Hooks and modes of others around a solve: counters, attributions, offloading, checkpoints, anomaly detection."""

import contextlib

import pytest
import timm
import torch
import torchinfo
from captum.attr import DeepLift, IntegratedGradients
from oracles import implicit_gradients, relative_error
from problems import cell_and_input, generator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

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
)

GRADIENTS = {
    "implicit": (Anderson(), Implicit()),
    "phantom": (Anderson(), Phantom()),
    "neumann": (Anderson(), Neumann()),
    "shine": (Broyden(), Shine(2)),
    "reversible": (ReversibleIteration(), Reversible()),
    "unrolled": (Anderson(), Unrolled()),
}
IMAGES = torch.randn(2, 3, 32, 32, generator=generator())
CONVOLUTIONS = 2 * (64 * 64 * 9) * (4 * 4)  # multiply-adds of the cell of deq_resnet8_cifar, per image


@pytest.fixture(params=GRADIENTS)
def gradient(request):
    return request.param


def model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("deq_resnet8_cifar", solver="picard", tol=1e-30, **kwargs).eval()


def flops_of(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def train_step(net, images=IMAGES):
    net(images).sum().backward()


def test_flops_are_those_of_every_evaluation_and_product():
    less, more, longer = (
        flops_of(lambda net=net: train_step(net))
        for net in (
            model(max_steps=2, backward_max_steps=2),
            model(max_steps=5, backward_max_steps=2),
            model(max_steps=5, backward_max_steps=6),
        )
    )
    one = 2 * CONVOLUTIONS * len(IMAGES)
    assert (more - less, longer - more) == (3 * one, 4 * one)


def test_flops_of_a_cell_that_hands_the_input_of_the_layer_on():
    """The counter hooks what a module receives, the leaf x among it."""
    cell, x = cell_and_input("conv")
    layer = Equilibrium(Nested(cell), solver=Picard(1e-30, 3)).double()
    assert flops_of(lambda: layer(x).sum().backward()) > 0


class Nested(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.inner = cell

    def forward(self, z, x):
        return self.inner(z, x)


@pytest.mark.parametrize("name", ["implicit", "phantom", "neumann", "unrolled"])
def test_flops_on_fake_tensors(name):
    """No value is read: all steps are counted, as where no sample converges."""
    net = model(max_steps=3, gradient=name)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        found = flops_of(lambda: train_step(net, fake.from_tensor(IMAGES)))
    assert found == flops_of(lambda: train_step(net))


def test_torchinfo_tells_the_cost_of_all_evaluations():
    costs = [
        torchinfo.summary(model(max_steps=steps), input_data=IMAGES, verbose=0).total_mult_adds for steps in (2, 5)
    ]
    cell = model().layer4.equilibrium.cell
    one = torchinfo.summary(cell, input_data=[torch.zeros(2, 64, 4, 4)] * 2, verbose=0).total_mult_adds
    assert costs[1] - costs[0] == 3 * one >= 3 * CONVOLUTIONS * len(IMAGES)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_fvcore_tells_the_cost_of_all_evaluations():
    import fvcore.nn  # scripts functions of its own, which torch warns of

    costs = [fvcore.nn.FlopCountAnalysis(model(max_steps=steps), IMAGES).by_operator()["conv"] for steps in (2, 5)]
    assert costs[1] - costs[0] == 3 * CONVOLUTIONS * len(IMAGES)


class Activated(nn.Module):
    """`f(z, x) = act(W z + x)`."""

    def __init__(self, act):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4, bias=False, dtype=torch.float64), act
        nn.init.orthogonal_(self.linear.weight, 0.5, generator=generator())

    def forward(self, z, x):
        return self.act(self.linear(z) + x)


def classifier(act, gradient):
    solvers = {"reversible": ReversibleIteration(1e-12, 60), "shine": Broyden(1e-12, 60, memory=60)}
    solver = solvers.get(gradient, Anderson(1e-12, 60))
    chosen = Implicit(solver) if gradient == "implicit" else GRADIENTS[gradient][1]
    torch.manual_seed(0)
    layer = Equilibrium(Activated(act), solver=solver, gradient=chosen)
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)).double().eval()


def rescaled(net, x, x0):
    """DeepLift by its rescale rule, dense: multipliers `D = dz / d(W z + x)` between the equilibria of x and of x0."""
    before, layer, after = net
    with torch.no_grad():
        inputs = before(x), before(x0)
        states = [layer(i) for i in inputs]
        drives = [layer.cell.linear(z) + i for z, i in zip(states, inputs, strict=True)]
        D = torch.diag_embed((states[0] - states[1]) / (drives[0] - drives[1]))
        inverse = torch.linalg.inv(torch.eye(4, dtype=x.dtype) - D @ layer.cell.linear.weight)
        return torch.einsum("o,bop,pi->bi", after.weight[1], inverse @ D, before.weight) * (x - x0)


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")  # captum tells what it does
@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require:UserWarning")
def test_deeplift(gradient):
    net = classifier(nn.ReLU(), gradient)
    x, x0 = torch.randn(2, 5, 3, generator=generator(), dtype=torch.float64)
    if gradient == "reversible":
        assert relative_error([DeepLift(net).attribute(x, x0, target=1)], [rescaled(net, x, x0)]) < 1e-5
        return
    # Captum's own line where the steps are recorded: there, a module of the cell is used more than once.
    line = (
        "module is being used only once" if gradient == "unrolled" else "cell must not put hooks .* use .* Reversible"
    )
    with pytest.raises(RuntimeError, match=line):
        DeepLift(net).attribute(x, x0, target=1)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require:UserWarning")
def test_integrated_gradients_add_up():
    net = classifier(nn.Tanh(), "implicit")
    x, x0 = torch.randn(2, 5, 3, generator=generator(), dtype=torch.float64)
    attributions = IntegratedGradients(net).attribute(x, x0, target=1, n_steps=50)
    torch.testing.assert_close(attributions.sum(dim=1), (net(x) - net(x0))[:, 1].detach())


# torch, of a cell whose first state is a constant.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_full_backward_hooks_in_the_cell(gradient):
    """They see every product; the last one of an implicit gradient is that with the adjoint."""
    net, x = classifier(nn.Tanh(), gradient), torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    seen = []
    for module in net[1].modules():
        module.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append((module, grad_out[0])))
    net(x).sum().backward()
    assert relative_error([p.grad for p in net.parameters()], list(expected)) < 1e-12
    assert {module for module, _ in seen} == set(net[1].modules())
    if gradient == "implicit":
        cell, state = net[1].cell, net[1](net[0](x)).detach()
        g = net[2].weight.sum(dim=0).expand_as(state).detach()
        u = [u for module, u in seen if module is cell][-1]
        assert relative_error([u], [adjoint(cell, net[0](x).detach(), state, g)]) < 1e-9


def adjoint(cell, x, z, g):
    """`(I - J^T)^-1 g`, as the gradient of an offset added to f."""

    class Shifted(nn.Module):
        def forward(self, z, offset):
            return cell(z, x) + offset

    offset = torch.zeros_like(z).requires_grad_()
    return implicit_gradients(Shifted(), offset, z, g)[0]


def gradients_of(layer, x, around=contextlib.nullcontext):
    """The gradients of a loss, and the evaluations of the cell."""
    evaluations = []
    handle = layer.cell.register_forward_hook(lambda *_: evaluations.append(1))
    with around():
        loss = layer(x).square().sum()
    found = torch.autograd.grad(loss, [x, *layer.parameters()])
    handle.remove()
    return list(found), len(evaluations)


def layer_and_input(gradient):
    cell, x = cell_and_input("conv")
    solver, chosen = GRADIENTS[gradient]
    return Equilibrium(cell, solver=solver, gradient=chosen), x


def test_offloaded_activations(gradient):
    layer, x = layer_and_input(gradient)
    expected, evaluations = gradients_of(layer, x)
    found, again = gradients_of(layer, x, torch.autograd.graph.save_on_cpu)
    assert relative_error(found, expected) < 1e-12 and again == evaluations


def test_checkpoints(gradient):
    """What they cover is evaluated twice; the products of a backward solve go along one evaluation."""
    layer, x = layer_and_input(gradient)
    expected, evaluations = gradients_of(layer, x)

    class Checkpointed(nn.Module):
        cell = layer.cell

        def forward(self, x):
            return checkpoint(layer, x, use_reentrant=False)

        def parameters(self):
            return layer.parameters()

    found, again = gradients_of(Checkpointed(), x)
    assert relative_error(found, expected) < 1e-12 and again <= 2 * evaluations


def test_reentrant_checkpoints(gradient):
    layer, x = layer_and_input(gradient)
    expected, _ = gradients_of(layer, x)
    checkpoint(layer, x, use_reentrant=True).square().sum().backward()
    assert relative_error([t.grad for t in (x, *layer.parameters())], expected) < 1e-12


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_detection(gradient):
    """Nothing on the way is NaN either, though samples finish at different steps."""
    layer, x = layer_and_input(gradient)
    x = torch.cat([x, 100 * x]).detach().requires_grad_()
    expected, _ = gradients_of(layer, x)
    with torch.autograd.detect_anomaly():
        found, _ = gradients_of(layer, x)
    assert relative_error(found, expected) < 1e-12
