import copy
import pickle
from functools import partial

import pytest
import torch
from problems import cell_and_input
from torch import nn

from timm_deq import Equilibrium, FixedPointCorrection, JacobianPenalty, Picard, SolveLog, WarmStart, equilibria

CONTEXTS = {
    "penalty": JacobianPenalty,
    "correction": lambda model: FixedPointCorrection(model, at=(1, 2)),
    "log": lambda model: SolveLog(model, spectral_steps=2),
    "warm start": WarmStart,
}


@pytest.fixture(params=CONTEXTS)
def case(request):
    """A context, open on a model with one equilibrium, and an input."""
    cell, x = cell_and_input("conv")
    model = nn.Sequential(Equilibrium(cell))
    with CONTEXTS[request.param](model) as context:
        yield context, model, x


def hooks(model):
    layer = model[0]
    registries = (layer._forward_hooks, layer._forward_pre_hooks, layer._solution_hooks, layer._iterate_hooks)
    return sum(len(registry) for registry in registries)


def test_the_equilibria_of_a_model_by_name():
    cell = cell_and_input("conv")[0]
    shared, other = Equilibrium(cell), Equilibrium(cell)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(nn.ReLU(), other), "again": shared})
    assert equilibria(model) == {"first": shared, "second.1": other} and equilibria(nn.ReLU()) == {}
    assert equilibria(shared) == {"": shared}


def test_entering_twice_is_refused_and_leaks_nothing(case):
    context, model, _ = case
    before = hooks(model)
    with pytest.raises(RuntimeError, match=f"{type(context).__name__} must not be entered twice: it is already active"):
        context.__enter__()
    assert hooks(model) == before > 0
    context.__exit__(None, None, None)
    assert hooks(model) == 0
    with context:  # once closed, it may be opened again
        assert hooks(model) == before


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_model_is_copied_inside_a_context(case, copied):
    """After a forward, when the context holds tensors that autograd recorded."""
    context, model, x = case
    model(x)
    twin = copied(model)
    plain = twin(x)
    held = len(context) if isinstance(context, SolveLog) else None
    twin(x)
    assert held is None or len(context) == held  # the copy is followed by nobody
    context.__exit__(None, None, None)
    torch.testing.assert_close(plain, model(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace", "ignore:.torch.jit.script")
@pytest.mark.parametrize(
    ("context", "line"),
    [
        (JacobianPenalty, "products with a Jacobian, .* must not be taken inside transforms of torch.func or programs"),
        (partial(SolveLog, spectral_steps=2), "products with a Jacobian, .* must not be taken inside transforms"),
        (partial(SolveLog, gradient_error=True), "gradient_error must be False inside torch.func"),
        (SolveLog, "SolveLog and WarmStart, must not be open inside torch.export"),
        pytest.param(WarmStart, "WarmStart, must not be open inside torch.export", marks=pytest.mark.slow),
        (partial(FixedPointCorrection, at=(1,)), "FixedPointCorrection must not be open while torch.fx records"),
    ],
)
def test_what_cannot_be_followed_is_refused(context, line):
    """In one line, rather than by whatever torch says of it."""
    cell, x = cell_and_input("conv")
    model, x = nn.Sequential(Equilibrium(cell, solver=Picard(1e-3, 3))), x.detach()
    if "torch.export" in line:
        routes = [lambda: torch.export.export(model, (x,))]
    elif "torch.fx" in line:
        routes = [lambda: torch.fx.symbolic_trace(model)]
    else:
        routes = [lambda: torch.func.grad(lambda x: model(x).sum())(x), lambda: torch.func.jvp(model, (x,), (x,))]
    if "programs" in line:
        routes += [lambda: torch.fx.symbolic_trace(model), lambda: torch.jit.trace(model, (x,))]
    with context(model):
        for route in routes:
            with pytest.raises(RuntimeError, match=line):
                route()


def test_an_error_on_the_way_in_leaves_no_hook():
    class Failing(WarmStart):
        def register(self):
            yield from super().register()
            raise ValueError("mine")

    model = nn.Sequential(Equilibrium(cell_and_input("conv")[0]))
    with pytest.raises(ValueError, match="mine"), Failing(model):
        pass
    assert hooks(model) == 0
