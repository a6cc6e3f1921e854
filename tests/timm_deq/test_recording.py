"""The programs that record a model, rather than run it, give the eager numbers."""

import io
import itertools
from dataclasses import replace

import onnxruntime
import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models import get_notrace_modules
from torch import fx
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor
from torchvision.models.feature_extraction import get_graph_node_names

import timm_deq
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
    SolveLog,
    Unrolled,
)

# Histories of two in four steps: full, and written over.
SOLVERS = [{"solver": "picard"}, {"solver": "anderson", "memory": 2}, {"solver": "broyden", "memory": 2}]
SOLVERS += [{"solver": "reversible"}]
SLOW_BUT_ONE = [SOLVERS[1], *(pytest.param(s, marks=pytest.mark.slow) for s in SOLVERS if s["solver"] != "anderson")]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("deq_resnet8_cifar", **{"max_steps": 4, **kwargs}).eval()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def assert_close(recorded, expected):
    torch.testing.assert_close(recorded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SLOW_BUT_ONE)
def test_compile_whole_in_eval(solver):
    net = model(**solver)
    with torch.no_grad():
        assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(IMAGES), net(IMAGES))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")  # by inductor itself
def test_inductor_in_eval():
    net = model()
    with torch.no_grad():
        assert_close(torch.compile(net, fullgraph=True)(IMAGES), net(IMAGES))


def train_step(net, forward):
    net.train()
    loss = forward(IMAGES).square().mean()
    loss.backward()
    return [loss.detach()] + [p.grad for p in net.parameters()]


# The compiler of older torch instantiates autograd functions itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("gradient", ["phantom", "unrolled"])
def test_compile_whole_in_training(gradient):
    eager, compiled = model(gradient=gradient, memory=2), model(gradient=gradient, memory=2)
    expected = train_step(eager, eager)
    actual = train_step(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-3, atol=1e-5)


# After the break, dynamo itself looks at `.grad` of the tensors that the second graph receives.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compile_implicit_training_with_one_graph_break():
    eager, compiled = model(max_steps=2), model(max_steps=2)
    compiled.train()
    # One place breaks; dynamo counts it once for each function on the stack above.
    breaks = torch._dynamo.explain(compiled)(IMAGES).break_reasons
    assert {reason.user_stack[-1].name for reason in breaks} == {"attach"}
    expected = train_step(eager, eager)
    actual = train_step(compiled, torch.compile(compiled, backend="aot_eager"))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_export(solver):
    net = model(**solver)
    with torch.no_grad():
        program = torch.export.export(net, (IMAGES,))
        assert_close(program.module()(IMAGES), net(IMAGES))


LOOP = {"while_loop": True, "memory": 2}


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # by torch.export.load itself
@pytest.mark.parametrize(
    ("settings", "recorded"), [({}, True), ({}, False), (LOOP, False)], ids=["grad", "no_grad", "while_loop"]
)
def test_an_exported_program_is_saved_and_loaded(settings, recorded):
    """With parameters that require a gradient, and for batches of any size."""
    net = model(**settings)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.set_grad_enabled(recorded):
        program = torch.export.export(net, (IMAGES,), dynamic_shapes=dynamic)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    images = torch.cat([IMAGES, 2 * IMAGES[:1]])
    with torch.no_grad():
        assert_close(loaded(images), net(images))


class RotatingCell(torch.nn.Module):
    """`f(z, x) = 0.8 Q z + x` with an orthogonal Q."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 5)
        torch.nn.utils.parametrizations.orthogonal(self.linear)

    def forward(self, z, x):
        return 0.8 * self.linear(z) + x


@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=3), Broyden(memory=3), ReversibleIteration()])
def test_an_exported_while_loop_leaves_early(solver):
    torch.manual_seed(0)
    solver = replace(solver, tol=1e-4, max_steps=2000)
    cell, x = RotatingCell(), torch.randn(4, 5)
    eager = Equilibrium(cell, solver=solver).eval()
    with SolveLog(eager) as log, torch.no_grad():
        expected = eager(x)
        layer = Equilibrium(cell, solver=replace(solver, while_loop=True)).eval()
        program = torch.export.export(layer, (x,)).module()
        periods = []
        program.while_loop_body_graph_0.register_forward_hook(lambda *_: periods.append(1))
        assert_close(program(x), expected)
    evaluations = solver.period + 1 + len(periods) * solver.period  # before the loop, and in it
    assert len(periods) > 2 and 0 <= evaluations - log.steps.max() < solver.period


GRADIENTS = {
    "implicit": (Anderson, Implicit()),
    "phantom": (Anderson, Phantom()),
    "neumann": (Picard, Neumann()),
    "shine": (Broyden, Shine()),
    "reversible": (ReversibleIteration, Reversible()),
    "unrolled": (Anderson, Unrolled()),
}


def exported(layer, x):
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("record", [pytest.param(exported, marks=pytest.mark.slow), torch.jit.trace])
def test_a_recorded_program_has_the_derivative_of_its_steps(record, gradient, recorded):
    """Whatever the gradient of the layer was, and whether it was recorded with gradients enabled."""
    torch.manual_seed(0)
    cell, x = Tanh(5, 5), torch.randn(4, 5, requires_grad=True)
    solver, chosen = GRADIENTS[gradient]
    layer = Equilibrium(cell, solver=solver(1e-30, 4), gradient=chosen)
    with torch.set_grad_enabled(recorded):
        program = record(layer, x)
    (found,) = torch.autograd.grad(program(x).square().sum(), x)
    eager = Equilibrium(cell, solver=layer.solver, gradient=Unrolled())
    assert_close(found, torch.autograd.grad(eager(x).square().sum(), x)[0])


class Tanh(torch.nn.Linear):
    """`f(z, x) = tanh(W z / 2 + x)`."""

    def forward(self, z, x):
        return torch.tanh(super().forward(z) / 2 + x)


@pytest.mark.parametrize(
    "solver",
    [Picard(1e-6), *(pytest.param(s, marks=pytest.mark.slow) for s in (Anderson(1e-6), Broyden(1e-6, memory=3)))],
)
def test_an_exported_while_loop_takes_any_batch_and_size(solver):
    """At the default budget, of a state whose sizes are all free but that of its channels."""
    torch.manual_seed(0)
    layer = Equilibrium(Tanh(5, 5), solver=replace(solver, while_loop=True)).eval()
    free = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim.AUTO},)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(2, 3, 5),), dynamic_shapes=free)
        assert any("while_loop" in node.name for node in program.graph.nodes)
        for x in (torch.randn(1, 3, 5), torch.randn(7, 4, 5)):
            assert_close(program.module()(x), layer(x))


class Solve(torch.nn.Module):
    """All that a solve tells, of `RotatingCell` and of one sample that explodes."""

    def __init__(self, solver):
        super().__init__()
        self.cell, self.solver = RotatingCell(), solver

    def forward(self, x):
        scale = torch.tensor([[1.0], [1.0], [1e9]])
        return timm_deq.fixed_point(lambda z: scale * self.cell(z, x), torch.zeros_like(x), self.solver)[:4]


@pytest.mark.parametrize("max_steps", [1, 3, pytest.param(4, marks=pytest.mark.slow), 6])
def test_a_while_loop_keeps_to_its_budget(max_steps):
    """Whether the budget ends before the loop, in it, or between two of its periods."""
    x = torch.randn(3, 5)
    for solver in (Anderson(1e-30, max_steps, memory=2), Broyden(1e-30, max_steps, memory=2)):
        torch.manual_seed(0)
        module = Solve(solver)
        with torch.no_grad():
            expected = module(x)
            module.solver = replace(solver, while_loop=True)
            value, residual, steps, status = torch.export.export(module, (x,)).module()(x)
        assert_close(value, expected[0])
        assert_close(residual, expected[1])
        assert torch.equal(steps, expected[2]) and torch.equal(status, expected[3])


def test_a_while_loop_compiles():
    net = model(while_loop=True, memory=2)
    with torch.no_grad():
        assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(IMAGES), net(IMAGES))


def test_whoever_follows_a_compiled_solve_sees_all_of_it():
    """A recorded loop would show the steps before it alone: its place is taken by the static loop."""
    torch.manual_seed(0)
    cell, x, seen = RotatingCell(), torch.randn(4, 5), []
    layer = Equilibrium(cell, solver=Picard(1e-30, 11, while_loop=True)).eval()
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        compiled(x)  # without a listener first
        with SolveLog(layer) as log:
            compiled(x)
        handle = layer.register_iterate_hook(lambda layer, step, z: seen.append((step, z.clone())))
        compiled(x)
        handle.remove()
        with SolveLog(layer) as eager:
            layer(x)
    assert log.trace.shape == (11, 4)
    torch.testing.assert_close(log.trace, eager.trace)
    assert [step for step, _ in seen] == list(range(11))
    torch.testing.assert_close(seen[1][1], cell(torch.zeros_like(x), x))


def onnx_logits(net, path, batches, **settings):
    """What onnxruntime makes of a model for each batch of images."""
    program = torch.onnx.export(net, (IMAGES,), path, dynamo=True, verbose=False, **settings)
    assert ("Loop" in [node.op_type for node in program.model.graph]) == net.layer4.equilibrium.solver.while_loop
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(session.run(None, {name: batch.numpy()})[0]) for batch in batches]


# The exporter touches names that copyreg and its own dependencies have deprecated.
ignore_exporter = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@ignore_exporter
@pytest.mark.parametrize("solver", SLOW_BUT_ONE)
def test_onnx(solver, tmp_path):
    """With live parameters."""
    net = model(**solver)
    (output,) = onnx_logits(net, tmp_path / "model.onnx", [IMAGES])
    torch.testing.assert_close(output, net(IMAGES).detach(), rtol=1e-3, atol=1e-4)


@ignore_exporter
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"while_loop": True, "max_steps": 20}], ids=["static", "while_loop"])
def test_onnx_with_batches_of_any_size(settings, tmp_path):
    """And images of any."""
    net = model(memory=2, **settings)
    batches = [IMAGES[:1], torch.cat([IMAGES, 2 * IMAGES]), torch.randn(2, 3, 48, 40)]
    with torch.no_grad():
        sizes = dict.fromkeys((2, 3), torch.export.Dim.AUTO)
        dynamic = ({0: torch.export.Dim("batch", min=1, max=64), **sizes},)
        outputs = onnx_logits(net, tmp_path / "model.onnx", batches, dynamic_shapes=dynamic)
        for output, batch in zip(outputs, batches, strict=True):
            torch.testing.assert_close(output, net(batch), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's
def test_aot_inductor(tmp_path):
    """With the C++ compiler that torch.compile needs too."""
    net = model(memory=2)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(net, (IMAGES,), dynamic_shapes=dynamic)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        batch = torch.cat([IMAGES, 2 * IMAGES[:1]])
        assert_close(compiled(batch), net(batch))


# TorchScript is deprecated upstream, and says so each time; tracing warns of GroupNorm's look at its input's shape.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("record", "solver"), [("live trace", SOLVERS[1]), *itertools.product(["trace", "script"], SOLVERS)]
)
def test_torchscript(record, solver):
    net = model(**solver)
    with torch.set_grad_enabled(record == "live trace"):
        expected = net(IMAGES)
        recorded = torch.jit.script(net) if record == "script" else torch.jit.trace(net, IMAGES)
        buffer = io.BytesIO()
        torch.jit.save(recorded, buffer)
        buffer.seek(0)
        assert_close(torch.jit.load(buffer)(IMAGES), expected)


def features_and_gradients(net, features):
    z = features(IMAGES)
    return z, torch.autograd.grad(z.square().sum(), [p for n, p in net.named_parameters() if not n.startswith("fc")])


@pytest.mark.parametrize("gradient", ["implicit", "phantom", "neumann", "shine", "reversible", "unrolled"])
def test_fx_keeps_the_equilibrium_whole(gradient):
    """A leaf, in a feature extractor too: with its own gradient, and its early exit."""
    solver = {"shine": "broyden", "reversible": "reversible"}.get(gradient, "anderson")
    net = model(gradient=gradient, solver=solver, tol=0.5)
    traced = fx.symbolic_trace(net)
    extractor = torchvision_extractor(net, {"layer4.equilibrium": "z"})
    with SolveLog(extractor) as log:
        found = features_and_gradients(net, lambda x: extractor(x)["z"])
    expected = features_and_gradients(net, net.forward_features)  # without a norm of its own
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(traced(IMAGES), net(IMAGES))
    assert log.evaluations.max() < net.layer4.equilibrium.solver.max_steps


def test_no_node_inside_a_cell_is_offered():
    for names in get_graph_node_names(model()):
        assert [name for name in names if "equilibrium" in name] == ["layer4.equilibrium"]


def test_fx_records_the_steps_of_a_layer_that_is_traced_by_itself():
    torch.manual_seed(0)
    layer, x = Equilibrium(RotatingCell(), solver=Picard(1e-30, 3)), torch.randn(4, 5)
    steps = fx.symbolic_trace(layer, concrete_args={"z0": None, "u0": None})
    cell, z = layer.cell, torch.zeros_like(x)
    for _ in range(2):
        z = cell(z, x)
    assert_close(steps(x), z)
    for weight, expected in zip(
        layer.parameters(), torch.autograd.grad(z.sum(), list(layer.parameters())), strict=True
    ):
        assert_close(torch.autograd.grad(steps(x).sum(), weight)[0], expected)


def test_timm_s_tracer_keeps_the_equilibrium_whole():
    assert Equilibrium in get_notrace_modules()
    net = model()
    extractor = create_feature_extractor(net, {"norm": "features"})
    assert any(isinstance(m, Equilibrium) for m in extractor.modules())
    with torch.no_grad():
        assert torch.equal(extractor(IMAGES)["features"], net.forward_features(IMAGES))


def test_meta_device():
    net = timm.create_model("deq_resnet18", device="meta")
    assert net(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)
    assert timm_deq.fixed_point(lambda z: z / 2, torch.empty(2, 3, device="meta"), timm_deq.Anderson()).value.is_meta
