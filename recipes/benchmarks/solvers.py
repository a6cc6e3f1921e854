r"""The solvers against TorchDEQ, the peer, on the same maps: three tables with a row for each map or size and solver.

1. evaluations of f until the true relative residual $\|f(z) - z\| / \|f(z)\|$ of every sample has met a tolerance at
   some call, and their mean over the samples. A wrapper around f measures both sides alike, whatever they measure;
2. overhead: the time of a solve less the time of as many calls of f alone, in turns, medians; gradients are enabled,
   and nothing requires one;
3. peak memory of a solve against the calls allowed, in units of one state.

A ratio below 1 is in our favour. Both sides get the same f, initial iterate, number of calls and memory; ridge and
mixing are each side's defaults. In the third table alone the peer's Broyden keeps what it keeps by default, which is
every pair. The peer is Geng & Kolter, "TorchDEQ: A Library for Deep Equilibrium Models", arXiv 2310.18605; its solvers
are called directly, without the layers above them.
"""

import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchdeq.solver import anderson_solver, broyden_solver

from recipes.benchmarks.tables import Row, compared, milliseconds
from timm_deq import Anderson, Broyden, fixed_point
from timm_deq.models.deq_resnet import ResidualCell

Map = Callable[[Tensor], Tensor]

MEMORY = {"Anderson": 6, "Broyden": 10}
BUDGET = 120  # at radius 0.9 the plain iteration takes about 105 calls to a residual of 1e-5
TIMED_CALLS, NEVER = 30, 1e-30
MEMORY_STATE, MEMORY_CALLS = (4, 4096), (10, 20, 40, 80)


def ours(method: str, f: Map, z0: Tensor, *, tol: float, calls: int, memory: int) -> None:
    fixed_point(f, z0, {"Anderson": Anderson, "Broyden": Broyden}[method](tol, calls, memory=memory))


def peer(method: str, f: Map, z0: Tensor, *, tol: float, calls: int, memory: int) -> None:
    if method == "Anderson":
        anderson_solver(f, z0, max_iter=calls, tol=tol, stop_mode="rel", m=memory)
    else:  # which does not count its first call
        broyden_solver(f, z0, max_iter=calls - 1, tol=tol, stop_mode="rel", LBFGS_thres=memory)


class Recorded:
    """A map that notes the relative residual of each sample, `(B,)`, at every call."""

    def __init__(self, f: Map) -> None:
        self.f = f
        self.residuals: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        fz = self.f(z)
        difference, length = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (fz - z, fz))
        self.residuals.append(difference / length)
        return fz

    def calls_to(self, tol: float) -> Tensor:
        """Calls until each sample first met the tolerance, `(B,)`; infinite where it never did."""
        met = torch.stack(self.residuals) <= tol
        return torch.where(met.any(dim=0), met.int().argmax(dim=0) + 1.0, torch.inf)


@torch.no_grad()
def evaluations(device: torch.device, tolerances: Sequence[float]) -> Iterator[Row]:
    """Calls of f to a tolerance, for every map, tolerance and solver; None where the budget did not suffice."""
    for name, (f, z0) in problems(device).items():
        for tol in tolerances:
            for method, kept in MEMORY.items():
                calls = []
                for solve in (ours, peer):
                    recorded = Recorded(f)
                    solve(method, recorded, z0, tol=tol, calls=BUDGET, memory=kept)
                    calls.append(recorded.calls_to(tol))
                row = {"f": name, "tolerance": tol, "solver": method}
                slowest, mean = [c.max().item() for c in calls], [c.mean().item() for c in calls]
                yield row | compared("calls", *slowest) | compared("mean calls", *mean)


def overhead(device: torch.device, sizes: Sequence[tuple[int, int]], rounds: int) -> Iterator[Row]:
    """Milliseconds of a solve beyond the calls of f, for every size `(B, D)` and solver."""
    for batch, length in sizes:
        f, z0 = diagonal(batch, length, device)
        for method, kept in MEMORY.items():
            solves = [partial(s, method, z0=z0, tol=NEVER, calls=TIMED_CALLS, memory=kept) for s in (ours, peer)]
            for solve in solves:  # a warm-up, which also shows that both make the same number of calls
                recorded = Recorded(f)
                solve(f=recorded)
                assert len(recorded.residuals) == TIMED_CALLS
            runs = [partial(iterate, f, z0), *(partial(solve, f=f) for solve in solves)]
            times = [[milliseconds(run, device) for run in runs] for _ in range(rounds)]
            beyond = [statistics.median(t[side] - t[0] for t in times) for side in (1, 2)]
            row = {"state": f"{batch}x{length}", "solver": method, "f ms": statistics.median(t[0] for t in times)}
            yield row | compared("overhead ms", *beyond)


@torch.no_grad()
def memory(device: torch.device) -> Iterator[Row]:
    """Peak memory of a solve in states, for every solver and number of calls allowed."""
    f, z0 = diagonal(*MEMORY_STATE, device)
    for method, kept in MEMORY.items():
        for calls in MEMORY_CALLS:
            kept_by_peer = kept if method == "Anderson" else calls - 1  # its default
            sides = ((ours, kept), (peer, kept_by_peer))
            runs = [partial(solve, method, f, z0, tol=NEVER, calls=calls, memory=m) for solve, m in sides]
            peaks = [peak_bytes(run, device) / z0.nbytes for run in runs]
            yield {"solver": method, "calls allowed": calls} | compared("peak states", *peaks)


def iterate(f: Map, z: Tensor) -> None:
    for _ in range(TIMED_CALLS):
        z = f(z)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most memory that tensors made by `run` held at once."""
    if device.type != "cuda":
        with PeakMemory() as mode:
            run()
        return mode.peak
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of the storages that operations make while it is open, but not what they need inside.

    Attributes:
        live: Bytes held now.
        peak: The most bytes held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in given:
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of the tensors in a tree, each once."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in found}


def problems(device: torch.device) -> dict[str, tuple[Map, Tensor]]:
    """Maps of states of 16 samples, each with its initial iterate, zero; drawn on the CPU, the same everywhere."""
    torch.manual_seed(0)
    batch, length = 16, 256
    rotation = torch.linalg.qr(torch.randn(length, length)).Q
    # Eigenvalues from -0.95 to 0.95, far from orthogonal eigenvectors: I - A has a condition number of 160.
    triangle = torch.diag(torch.linspace(-0.95, 0.95, length)) + 0.5 * torch.randn(length, length).triu(1) / length**0.5
    gain = 0.5  # larger than at first, as training makes it
    block = ResidualCell(64, width=64, bottleneck=False, num_groups=8, branch_gain=gain).to(device)
    block.init_weights()
    maps: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
        "rotation, radius 0.9": (partial(linear, (0.9 * rotation).to(device)), (length,)),
        "non-normal, radius 0.95": (partial(linear, (rotation @ triangle @ rotation.T).to(device)), (length,)),
        "convolutions": (block, (64, 8, 8)),
        "attention": (partial(attention, (torch.randn(3 * 64, 64) / 8).to(device)), (16, 64)),
    }
    inputs = {name: torch.randn(batch, *shape).to(device) for name, (_, shape) in maps.items()}
    return {name: (partial(f, x=inputs[name]), torch.zeros_like(inputs[name])) for name, (f, _) in maps.items()}


def linear(A: Tensor, z: Tensor, *, x: Tensor) -> Tensor:
    """`A z + x` for states `(B, D)`."""
    return z @ A.T + x


def attention(weight: Tensor, z: Tensor, *, x: Tensor) -> Tensor:
    """`LayerNorm(x + softmax(q k^T / sqrt(D)) v / 2)` for tokens `(B, T, D)`."""
    q, k, v = F.linear(z, weight).chunk(3, dim=-1)
    return F.layer_norm(x + F.scaled_dot_product_attention(q, k, v) / 2, x.shape[-1:])


def diagonal(batch: int, length: int, device: torch.device) -> tuple[Map, Tensor]:
    """`a z + b` by elements, one pass over memory and too many eigenvalues to be solved soon; and a state `(B, D)`."""
    torch.manual_seed(0)
    a, b = torch.linspace(-0.99, 0.99, length).to(device), torch.randn(batch, length).to(device)
    return lambda z: torch.addcmul(b, a, z), torch.zeros_like(b)
