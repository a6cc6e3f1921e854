"""The layer, solve and backward pass, against TorchDEQ's `get_deq` and against the explicit twin: five tables.

1. one cell: milliseconds of 20 evaluations and as many products with the Jacobian, whatever the residual, beside those
   of the bare cell, by solver, gradient, dtype and layout;
2. a model: milliseconds of a training step of `deq_resnet8_cifar` with its default settings, beside the same model with
   the peer's layer in place of ours, and beside its explicit twin;
3. channels_last: what it gains at 224 px, for `deq_resnet18` and its twin, whole and in their last stages alone;
4. peak memory of a second derivative against the evaluations allowed, in units of one state;
5. the residual of a sample, and the relative error of its gradient against an exact solve in float64, by gradient,
   tolerance and dtype.

A ratio below 1 is in our favour. Everything is timed in turns, and medians are taken. The peer is Geng & Kolter,
"TorchDEQ: A Library for Deep Equilibrium Models", arXiv 2310.18605, with its `autograd.Function` for the implicit
gradient; its tolerances are relative, as ours.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchdeq import get_deq

from recipes.benchmarks.solvers import NEVER, peak_bytes
from recipes.benchmarks.tables import Row, compared, in_turn
from timm_deq import (
    Anderson,
    Broyden,
    Equilibrium,
    Gradient,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    SolveLog,
    Solver,
)
from timm_deq.models.deq_resnet import ResidualCell

CALLS, PHANTOM_STEPS = 20, 5
CELLS = ((64, 64, 4), (64, 64, 8))  # batch, channels, height and width
SOLVERS: dict[str, Callable[..., Solver]] = {
    "Anderson": partial(Anderson, memory=6),  # memories of the peer
    "Broyden": partial(Broyden, memory=CALLS),
    "Picard": Picard,
}
PEERS = {"Anderson": "anderson", "Broyden": "broyden", "Picard": "fixed_point_iter"}
# Solver, gradient, dtype and layout of a row.
VARIANTS = [(solver, "implicit", "float32", "NCHW") for solver in SOLVERS]
VARIANTS += [("Anderson", "phantom", "float32", "NCHW"), ("Anderson", "implicit", "bfloat16", "NCHW")]
VARIANTS += [("Anderson", "implicit", "float32", "NHWC"), ("Anderson", "implicit", "bfloat16", "NHWC")]
MODEL, IMAGES = "deq_resnet8_cifar", (64, 3, 32, 32)
LARGE_MODEL, LARGE_IMAGES = "deq_resnet18", (4, 3, 224, 224)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
SECOND_CALLS = (10, 20, 40)
ERROR_CELL = (32, 64, 4)
# Tolerance, budget, gradient (None: implicit) and dtype, by name.
ACCURACIES: dict[str, tuple[float, int, Gradient | None, str]] = {
    "implicit, as by default": (1e-3, 20, None, "float32"),
    "implicit, tol 1e-4": (1e-4, 100, None, "float32"),
    "implicit, tol 1e-5": (1e-5, 100, None, "float32"),
    "implicit, tol 1e-7, as `exact=True`": (1e-7, 200, None, "float32"),
    "implicit, tol 1e-9, as `exact=True`": (1e-9, 200, None, "float64"),
    "implicit, as by default, under autocast": (1e-3, 20, None, "bfloat16"),
    "implicit, tol 1e-7, under autocast": (1e-7, 60, None, "bfloat16"),
    "`Phantom()`": (1e-3, 20, Phantom(), "float32"),
    "`Neumann()`": (1e-3, 20, Neumann(), "float32"),
    "`Phantom(1, damping=1)`, JFB": (1e-3, 20, Phantom(1, damping=1.0), "float32"),
}


class PeerLayer(nn.Module):
    """An equilibrium of a cell by TorchDEQ."""

    def __init__(self, cell: nn.Module, solver: str, gradient: str, *, tol: float, calls: int) -> None:
        super().__init__()
        self.cell = cell
        steps = calls - (solver == "Broyden")  # which does not count its first call
        implicit: dict[str, Any] = {"ift": True} if gradient == "implicit" else {"grad": PHANTOM_STEPS, "tau": 0.5}
        names = {"solver": PEERS[solver], "max_iter": steps, "tol": tol, "stop_mode": "rel"}
        both = {f"{side}_{key}": value for side in "fb" for key, value in names.items()}
        self.deq = get_deq(**both, **implicit)

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(partial(self.cell, x=x), torch.zeros_like(x))[0][-1]


class Counted(nn.Module):
    """A cell that counts its evaluations, and the products with its Jacobian."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.calls = self.products = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        fz = self.cell(z, x)
        if fz.requires_grad:
            fz.register_hook(self._count)
        return fz

    def _count(self, u: Tensor) -> None:
        self.products += 1


def one_cell(device: torch.device, rounds: int) -> Iterator[Row]:
    """Milliseconds of a solve and its backward pass by variant, ours, the peer's and the bare cell's."""
    for shape, (solver, gradient, dtype, layout) in product(CELLS, VARIANTS):
        cell, x, g = problem(*shape, layout, device)
        chosen = SOLVERS[solver](NEVER, CALLS)
        ours = Equilibrium(
            cell, solver=chosen, gradient=Implicit(chosen) if gradient == "implicit" else Phantom(PHANTOM_STEPS)
        )
        peer = PeerLayer(cell, solver, gradient, tol=NEVER, calls=CALLS)
        runs: dict[str, Callable[[], None]] = {
            "bare": partial(bare, cell, x, g, dtype, PHANTOM_STEPS if gradient == "phantom" else 0),
            "ours": partial(solve, ours, x, g, dtype),
            "peer": partial(solve, peer, x, g, dtype),
        }
        runs["bare"]()
        runs["ours"]()
        if not peer_serves(runs["peer"]):
            del runs["peer"]
        times = {"peer": math.inf} | in_turn(runs, rounds, device)
        batch, channels, size = shape
        row = {"state": f"{batch}x{channels}x{size}x{size}", "solver": solver, "gradient": gradient, "dtype": dtype}
        row |= {"layout": layout, "bare ms": times["bare"]}
        yield row | compared("ms", times["ours"], times["peer"]) | {"ours / bare": times["ours"] / times["bare"]}


def problem(
    batch: int, channels: int, size: int, layout: str, device: torch.device, *, gain: float = 0.1
) -> tuple[nn.Module, Tensor, Tensor]:
    """A cell, its input and a cotangent."""
    torch.manual_seed(0)
    cell = ResidualCell(channels, width=channels, bottleneck=False, num_groups=8, branch_gain=gain)
    cell.init_weights()
    x, g = (torch.randn(batch, channels, size, size, device=device).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    return cell.to(device).to(memory_format=LAYOUTS[layout]), x.requires_grad_(), g


def solve(layer: nn.Module, x: Tensor, g: Tensor, dtype: str) -> None:
    """Find an equilibrium and back-propagate a cotangent."""
    with autocast(dtype, x.device):  # the backward pass too: the peer evaluates the cell there
        layer(x).backward(g)


def bare(cell: nn.Module, x: Tensor, g: Tensor, dtype: str, recorded: int) -> None:
    """Evaluate a cell, and its Jacobian, as often as a solve does; or record the last evaluations."""
    z = torch.zeros_like(x)
    with autocast(dtype, x.device):
        with torch.no_grad():
            for _ in range(CALLS):
                z = cell(z, x).to(x.dtype)
        if recorded:
            for _ in range(recorded):
                z = cell(z, x)
            return z.backward(g.to(z.dtype))
        fz = cell(z.requires_grad_(), x)
        u = g
        for _ in range(CALLS):
            (u,) = torch.autograd.grad(fz, z, u.to(fz.dtype), retain_graph=True)
        fz.backward(u.to(fz.dtype))


def one_model(device: torch.device, rounds: int) -> Iterator[Row]:
    """Milliseconds of a training step by gradient, dtype and layout: ours, with the peer's layer, and the twin's."""
    x, labels = torch.randn(IMAGES, device=device), torch.arange(IMAGES[0], device=device) % 10
    for gradient, layout, dtype in product(("implicit", "phantom"), LAYOUTS, ("float32", "bfloat16")):
        images = x.to(memory_format=LAYOUTS[layout])
        models = {name: create(name, gradient, layout, device) for name in ("ours", "peer", "twin")}
        if not peer_serves(partial(train, models["peer"], images, labels, dtype)):
            del models["peer"]
        counts: dict[str, tuple[int | None, int | None]] = {"peer": (None, None)}
        for name, model in models.items():
            counted = counted_step(model, images, labels, dtype)
            counts[name] = (counted.calls, counted.products) if counted else (None, None)
        runs = {name: partial(train, model, images, labels, dtype) for name, model in models.items()}
        times = {"peer": math.inf} | in_turn(runs, rounds, device)
        row = {"gradient": gradient, "dtype": dtype, "layout": layout, "twin ms": times["twin"]}
        for i, what in enumerate(("evaluations", "products")):
            row |= {f"{what}, {name}": counts[name][i] for name in ("ours", "peer")}
        yield row | compared("ms", times["ours"], times["peer"]) | {"ours / twin": times["ours"] / times["twin"]}


def create(name: str, gradient: str, layout: str, device: torch.device) -> nn.Module:
    """Create our model, the same with the peer's layer, or the explicit twin, ready to be trained."""
    torch.manual_seed(0)
    model: Any = timm.create_model(MODEL, num_classes=10, gradient=gradient, equilibrium=name != "twin")
    if name == "peer":
        layer = model.layer4.equilibrium
        model.layer4.equilibrium = PeerLayer(
            layer.cell, "Anderson", gradient, tol=layer.solver.tol, calls=layer.solver.max_steps
        )
    return model.train().to(device).to(memory_format=LAYOUTS[layout])


def peer_serves(run: Callable[[], object]) -> bool:
    """Warm the peer up; return whether it can do this at all: on CUDA it has no Anderson in bf16."""
    try:
        run()
    except NotImplementedError:  # by torch, of the peer's solve in this precision: its columns say so by being empty
        return False
    return True


def counted_step(model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> Counted | None:
    """Take a training step of a model that has a cell, as a warm-up, and count its evaluations; leave it as it was."""
    layer: Any = getattr(model.layer4, "equilibrium", None)
    if layer is None:
        train(model, images, labels, dtype)
        return None
    layer.cell = counted = Counted(layer.cell)
    train(model, images, labels, dtype)
    layer.cell = counted.cell
    return counted


def train(model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> None:
    """Forward, loss and backward, as of a training step."""
    model.zero_grad(set_to_none=True)
    with autocast(dtype, images.device):
        F.cross_entropy(model(images).float(), labels).backward()


def channels_last(device: torch.device, rounds: int) -> Iterator[Row]:
    """What channels_last gains, of a whole model and of its last stage, for equilibrium and twin, in per cent."""
    images = torch.randn(LARGE_IMAGES, device=device)
    models: dict[tuple[str, str], Any] = {}
    for kind, layout in product(("deq", "twin"), LAYOUTS):
        torch.manual_seed(0)
        model = timm.create_model(LARGE_MODEL, equilibrium=kind == "deq").train()
        models[kind, layout] = model.to(device).to(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        net = models["twin", "NCHW"]
        h0 = net.layer3(net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(images)))))))
    for (part, given), backward in product((("model", images), ("stage 4", h0)), (False, True)):
        runs = {}
        for (kind, layout), model in models.items():
            module = model if part == "model" else model.layer4
            runs[f"{kind} {layout}"] = partial(run_pass, module, given.to(memory_format=LAYOUTS[layout]), backward)
        for run in runs.values():
            run()
        times = in_turn(runs, rounds, device)
        row: Row = {"part": part, "pass": "forward and backward" if backward else "forward"}
        for kind in ("deq", "twin"):
            before, after = (times[f"{kind} {layout}"] for layout in LAYOUTS)
            row |= {
                f"{kind}, NCHW ms": before,
                f"{kind}, NHWC ms": after,
                f"{kind}, gain %": 100 * (1 - after / before),
            }
        yield row


def run_pass(module: nn.Module, x: Tensor, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        y = module(x.requires_grad_(backward) if x.is_leaf else x)
    if backward:
        y.square().mean().backward()


def second_derivative(device: torch.device) -> Iterator[Row]:
    """Peak memory of the gradient of a squared gradient, in states, for every number of evaluations allowed."""
    for calls in SECOND_CALLS:
        solver = Anderson(NEVER, calls, memory=6)
        layer, x = Equilibrium(Decay(), solver=solver, gradient=Implicit(solver)), torch.randn(4, 4096, device=device)

        def penalise(layer: Equilibrium = layer, x: Tensor = x) -> None:
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
            gradient.square().sum().backward()

        penalise()
        yield {"calls allowed": calls, "peak states": peak_bytes(penalise, device) / x.nbytes}


class Decay(nn.Module):
    """`f(z, x) = tanh(z / 2 + x)`."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return (z / 2 + x).tanh()


def gradient_errors(device: torch.device) -> Iterator[Row]:
    """Errors of the gradient in the input of a layer, and what they cost, by gradient, tolerance and dtype."""
    for name, (tol, calls, gradient, dtype) in ACCURACIES.items():
        cell, x, g = problem(*ERROR_CELL, "NCHW", device, gain=0.5)  # training makes it larger than at first
        precision = torch.float64 if dtype == "float64" else torch.float32
        solver = Anderson(tol, calls)
        layer = Equilibrium(cell.to(precision), solver=solver, gradient=gradient or Implicit(solver))
        layer.cell = counted = Counted(layer.cell)
        x = x.detach().to(precision).requires_grad_()
        solve(layer, x, g.to(precision), dtype)
        row: Row = {"gradient": name, "dtype": dtype, "evaluations": counted.calls, "products": counted.products}
        with SolveLog(layer, gradient_error=True) as log:
            solve(layer, x, g.to(precision), dtype)
        row |= {"median residual": log.residual.median().item(), "max residual": log.residual.max().item()}
        yield row | {f"{which} error": log.summary()[f"{which}_gradient_error"] for which in ("median", "max")}


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
