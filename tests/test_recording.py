"""The programs that record a model, rather than run it, give the eager numbers."""

import io

import onnxruntime
import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models import get_notrace_modules
from torch import fx

import timm_deq
from timm_deq import Equilibrium

# Histories of two in four steps: full, and written over.
SOLVERS = [{"solver": "picard"}, {"solver": "anderson", "memory": 2}, {"solver": "broyden", "memory": 2}]
SLOW_BUT_ONE = [SOLVERS[1], *(pytest.param(solver, marks=pytest.mark.slow) for solver in (SOLVERS[0], SOLVERS[2]))]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("deq_resnet8_cifar", max_steps=4, **kwargs).eval()


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
    eager, compiled = model(), model()
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


# The exporter touches names that copyreg and its own dependencies have deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("solver", SLOW_BUT_ONE)
def test_onnx(solver, tmp_path):
    net = model(**solver)
    with torch.no_grad():
        expected = net(IMAGES)
        torch.onnx.export(net, (IMAGES,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-4)


# TorchScript is deprecated upstream, and says so each time; tracing warns of GroupNorm's look at its input's shape.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("record", ["trace", "script"])
def test_torchscript(record, solver):
    net = model(**solver)
    with torch.no_grad():
        expected = net(IMAGES)
        recorded = torch.jit.trace(net, IMAGES) if record == "trace" else torch.jit.script(net)
        buffer = io.BytesIO()
        torch.jit.save(recorded, buffer)
        buffer.seek(0)
        assert_close(torch.jit.load(buffer)(IMAGES), expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_symbolic_trace_records_the_steps(solver):
    net = model(**solver)
    with torch.no_grad():
        assert_close(fx.symbolic_trace(net)(IMAGES), net(IMAGES))


@pytest.mark.parametrize("gradient", ["implicit", "phantom", "unrolled"])
def test_symbolic_trace_trains(gradient):
    net = model(gradient=gradient)
    fx.symbolic_trace(net)(IMAGES).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


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
