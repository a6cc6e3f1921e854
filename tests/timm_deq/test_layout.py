"""States that are not contiguous: the answers of contiguous ones, in their own layout, without copies."""

import pytest
import torch
from oracles import implicit_gradients, newton, relative_error
from problems import cell_and_input, conv_cell
from torch.utils._python_dispatch import TorchDispatchMode

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
    WarmStart,
    fixed_point,
)
from timm_deq.layout import Layout

# Forward mode loads decompositions that torch itself still scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

TIGHT = Anderson(1e-13, 300)
# Each so close to its limit that it has the derivative of the equilibrium.
GRADIENTS = {
    "implicit": (TIGHT, Implicit(TIGHT)),
    "phantom": (TIGHT, Phantom(80, damping=0.8)),
    "neumann": (TIGHT, Neumann(60)),
    "shine": (Broyden(1e-13, 300, memory=60), Shine()),
    "shine, refined": (Broyden(1e-13, 300, memory=60), Shine(40)),
    "reversible": (ReversibleIteration(1e-14, 70, damping=0.5), Reversible()),
    "unrolled": (TIGHT, Unrolled()),
}
SHAPE = (3, 4, 2, 5)


def channels_last(z):
    return z.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("z", "in_memory_order"),
    [
        (torch.randn(SHAPE), [0, 1, 2, 3]),
        (channels_last(torch.randn(SHAPE)), [0, 2, 3, 1]),
        (torch.randn(3, 2, 2, 2, 4).permute(0, 4, 1, 2, 3), [0, 2, 3, 4, 1]),  # channels_last_3d
        (torch.randn(3, 5, 4).transpose(1, 2), [0, 2, 1]),
        (channels_last(torch.randn(1, 4, 2, 5)), [0, 2, 3, 1]),
        (channels_last(torch.randn(3, 4, 1, 1)), [0, 1, 2, 3]),
        (channels_last(torch.randn(0, 4, 2, 2)), [0, 1, 2, 3]),
    ],
    ids=["contiguous", "channels_last", "channels_last_3d", "tokens", "one", "pixel", "empty"],
)
def test_rows_are_views_in_the_order_of_memory(z, in_memory_order):
    layout = Layout.of(z)
    rows = layout.rows(z)
    assert torch.equal(rows, z.permute(in_memory_order).reshape(len(z), rows.shape[1]))
    assert rows.data_ptr() == z.data_ptr() and rows.is_contiguous()
    state = layout.state(rows, z.shape)
    assert torch.equal(state, z) and state.data_ptr() == z.data_ptr()


@pytest.mark.parametrize(
    "z",
    [torch.randn(4, 3).T, torch.randn(3, 1, 5).expand(3, 4, 5), channels_last(torch.randn(SHAPE))[:, :2]],
    ids=["batch last", "expanded", "slice"],
)
def test_rows_of_what_is_not_dense_are_those_of_a_contiguous_copy(z):
    layout = Layout.of(z)
    assert layout == Layout(None)
    assert torch.equal(layout.rows(z), z.contiguous().flatten(1))
    assert torch.equal(layout.arranged(z), z)


@pytest.fixture(scope="module")
def problem():
    """A cell, an input in channels_last, its equilibrium, a cotangent and its gradients by dense matrices."""
    cell, x = cell_and_input("conv", batch=2)
    z_star = newton(lambda z: cell(z, x), torch.zeros_like(x))
    g = torch.randn_like(z_star)
    return cell, channels_last(x.detach()), z_star, g, implicit_gradients(cell, x, z_star, g)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("cotangent", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_the_gradient_of_a_state_in_channels_last(gradient, cotangent, problem):
    cell, x, z_star, g, expected = problem
    solver, chosen = GRADIENTS[gradient]
    layer, x = Equilibrium(cell, solver=solver, gradient=chosen), x.clone().requires_grad_()
    z = layer(x)
    assert z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous()
    assert relative_error([z], [z_star]) < 1e-6
    found = torch.autograd.grad(z, [x, *cell.parameters()], g.contiguous(memory_format=cotangent))
    assert relative_error(list(found), expected) < (0.3 if gradient == "shine" else 1e-5)


class ToContiguous(torch.nn.Module):
    """A cell that returns contiguous states, whatever it is given."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, z, x):
        return self.cell(z, x).contiguous()


# Forward mode of group_norm in torch 2.11 takes a view that channels_last does not have: an error, not a wrong number.
@pytest.mark.xfail(torch.__version__ < "2.14", raises=RuntimeError, reason="group_norm of torch 2.11 in forward mode")
def test_the_tangent_of_a_state_in_channels_last(problem):
    cell, x, _, _, _ = problem
    solver, gradient = GRADIENTS["shine"]  # whose inverse is in rows of the layout, as the tangent must be
    layer, tangents = Equilibrium(ToContiguous(cell), solver=solver, gradient=gradient), []
    for layout in (channels_last, torch.Tensor.contiguous):
        t = layout(torch.ones_like(x).cumsum(dim=1))
        with torch.no_grad():
            tangents.append(torch.func.jvp(layer, (layout(x),), (t,))[1])
    assert relative_error(tangents[:1], tangents[1:]) < 1e-4


class Copies(TorchDispatchMode):
    """Counts operations that copy as many elements as a batch of states has, or more."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.found = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "_to_copy", "cat") and isinstance(args[0], torch.Tensor):
            if args[0].numel() >= self.elements:
                self.found.append(name)
        return func(*args, **(kwargs or {}))


class Decay(torch.nn.Module):
    """`f(z, x) = tanh(z / 2 + x)`, which keeps every layout and copies nothing."""

    def forward(self, z, x):
        return (z / 2 + x).tanh()


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_channels_last_costs_no_more_copies(solver):
    counts = []
    for layout in (torch.Tensor.contiguous, channels_last):
        x = layout(torch.randn(SHAPE)).requires_grad_()
        layer = Equilibrium(Decay(), solver=solver(1e-12, 10))
        with Copies(x.numel()) as copies:
            z = layer(x)
            z.backward(torch.ones(SHAPE))
        counts.append(len(copies.found))
    # One more: the cotangent came in another layout.
    assert counts[1] <= counts[0] + 1


def test_f_and_callbacks_see_the_layout_and_the_dropped_samples_too():
    cell = conv_cell().double().requires_grad_(False)
    x = channels_last(torch.linspace(-4, 4, 8 * 16, dtype=torch.float64).reshape(8, 4, 2, 2))
    x *= torch.linspace(0.2, 1, 8, dtype=torch.float64)[:, None, None, None]
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, z, x):
            assert z.stride() == x.stride()
            seen.append(len(z))
            return cell(z, x)

    layer = Equilibrium(Watched(), solver=Anderson(1e-9, 200)).eval()
    layer.register_iterate_hook(lambda layer, step, z: seen.append(z.stride()))
    z = layer(x)
    assert {stride for stride in seen if isinstance(stride, tuple)} == {x.stride()}
    assert min(n for n in seen if isinstance(n, int)) < 8  # some were dropped
    torch.testing.assert_close(z, layer(x.contiguous()), rtol=1e-6, atol=1e-7)


def test_a_warm_start_from_another_layout():
    cell, x = cell_and_input("conv")
    layer = Equilibrium(cell, solver=TIGHT, gradient=Implicit(TIGHT))
    with WarmStart(layer):
        expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
        y = channels_last(x.detach()).requires_grad_()
        z = layer(y)
        found = torch.autograd.grad(z.square().sum(), y)[0]
    assert relative_error([found], [expected]) < 1e-9


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden, ReversibleIteration])
def test_a_standalone_solution_has_the_layout_of_its_start(solver):
    f, z0 = torch.cos, channels_last(torch.rand(SHAPE))
    solution = fixed_point(f, z0, solver(1e-6, 60))
    assert solution.value.stride() == z0.stride()
    torch.testing.assert_close(solution.value, fixed_point(f, z0.contiguous(), solver(1e-6, 60)).value)
