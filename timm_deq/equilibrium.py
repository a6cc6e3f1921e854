"""The equilibrium layer: a cell, a solver that finds its fixed point, and a gradient that differentiates it."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from timm_deq.bound_cell import BoundCell
from timm_deq.fixed_point import Map, fixed_point, outside_inference_mode
from timm_deq.gradients.base import Gradient
from timm_deq.gradients.implicit import Implicit
from timm_deq.parametrized import cached_parametrizations, weights_of
from timm_deq.solution import Solution
from timm_deq.solvers.anderson import Anderson
from timm_deq.solvers.base import Solver, State, autocast_enabled, check_bool, check_integer, is_exporting, is_tracing
from timm_deq.transforms import (
    forward_mode,
    inside_vmap,
    refuse_reverse,
    requires_grad,
    with_tangent,
    without_tangents,
)

SolutionHook = Callable[["Equilibrium", str, Solution, list[Tensor]], None]
"""Called with the layer, "forward" or "backward", the solution, and the residuals `(B,)` after each evaluation."""

IterateHook = Callable[["Equilibrium", int, Tensor], None]
"""Called with the layer, the number of updates so far, and the iterates `(B, ...)`, of all samples."""


class NonFiniteInputError(ValueError):
    """The input of an equilibrium is not finite: most often, training has diverged before it."""


class Equilibrium(nn.Module):
    """`z* = cell(z*, x)`, found by `solver` and differentiated by `gradient`.

    The output has the value of the equilibrium itself in training and in evaluation alike.

    Args:
        cell: A module called as `cell(z, x)` that returns the shape of z, treats samples independently, and is one
            deterministic function for the length of a solve (so: no batch statistics; dropout by
            :class:`timm_deq.VariationalDropout`). It may define `initial_state(x)`; otherwise the solve starts from
            zeros of the shape of x. Parametrised weights (`torch.nn.utils.parametrize`) are computed once per solve.
        solver: Finds the equilibrium.
        gradient: Differentiates it.
        min_steps: If given, training draws the budget of each solve uniformly from `min_steps` to the solver's
            `max_steps`, so that the model is of use at any number of steps. Recorded programs draw nothing.
        gather: Whether a solve in evaluation drops converged samples from the batch (compaction). A cell that holds
            further tensors with a row for each sample wants False.

    Raises:
        ValueError: A gradient that the solver does not serve, `min_steps` below 1, or a cell that `fully_shard` has
            sharded by itself (shard the layer, or the model).

    >>> from timm_deq import Anderson, Equilibrium
    >>> class Cell(nn.Linear):
    ...     def forward(self, z, x):
    ...         return torch.tanh(super().forward(z) / 4 + x)
    >>> layer = Equilibrium(Cell(3, 3), solver=Anderson(tol=1e-5))
    >>> x = torch.randn(8, 3, requires_grad=True)
    >>> z_star = layer(x)
    >>> torch.allclose(layer.cell(z_star, x), z_star, atol=1e-4)
    True
    >>> z_star.square().mean().backward()
    >>> x.grad.shape
    torch.Size([8, 3])
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        min_steps: int | None = None,
        gather: bool = True,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.solver = Anderson() if solver is None else solver
        self.gradient = Implicit(self.solver) if gradient is None else gradient
        self.gradient.check_solver(self.solver)
        if min_steps is not None:
            check_integer("min_steps", min_steps, 1)
        check_bool("gather", gather)
        self.min_steps = min_steps
        self.gather = gather
        self._solution_hooks: OrderedDict[int, SolutionHook] = OrderedDict()
        self._iterate_hooks: OrderedDict[int, IterateHook] = OrderedDict()
        self._refuse_sharded_cell()

    @outside_inference_mode
    def forward(self, x: Tensor, z0: Tensor | None = None, u0: Tensor | None = None) -> Tensor:
        """Solve for the equilibrium.

        Args:
            x: The input injected into the cell, `(B, ...)`.
            z0: Where to start; the cell's initial state by default.
            u0: Where the backward solve of a gradient that has one is to start, of the shape of the equilibrium.

        Returns:
            The equilibrium, of the shape and dtype of the initial state.

        Raises:
            NonFiniteInputError: x is not finite.
            ValueError: The cell changes the shape, dtype or device of the state, or an input of its own in place.
        """
        if isinstance(x, torch.fx.Proxy) and isinstance(x.tracer, torch.fx.Tracer) and x.tracer.root is not self:
            return self._as_one_node(x.tracer, x, z0, u0)
        return self._find(x, z0, u0)

    def _as_one_node(self, tracer: torch.fx.Tracer, x: Tensor, z0: Tensor | None, u0: Tensor | None) -> Any:
        """Let `torch.fx` record a call of this layer: whole, it keeps its early exit and its gradient."""
        given = {name: start for name, start in (("z0", z0), ("u0", u0)) if start is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), given)

    def _find(self, x: Tensor, z0: Tensor | None = None, u0: Tensor | None = None) -> Tensor:
        self._refuse_sharded_cell()
        if not is_tracing(x) and x.is_inference():
            x = x.clone()  # with a version counter
        if z0 is None:
            z0 = self.initial_state(x)
        exporting = is_exporting()
        differentiable = torch.is_grad_enabled() and self._requires_grad(x) and not exporting
        with cached_parametrizations(self.cell, differentiable=differentiable):
            f = BoundCell(self.cell, x)
            if differentiable:
                self.gradient.check_solver(self.solver)  # either may have been replaced
                f = self.gradient.prepare(f, self.solver)
            # Tangents are those of the equilibrium, as gradients are, not those of the steps that led there.
            pushes = forward_mode(x) and not self.gradient.differentiates_solver
            constant = without_tangents if pushes else nullcontext
            with constant():
                recorded = differentiable and self.gradient.differentiates_solver
                with nullcontext() if exporting else torch.set_grad_enabled(recorded):
                    solution = self._solve(f, x, z0, gather=not (self.training or differentiable or forward_mode(x)))
                output = z_star = solution.value.to(z0.dtype)
                # Histories are not to wait for the backward pass.
                state = solution.state if self.gradient.required_solver else None
            both = pushes and self.gradient.attaches_tangent
            if differentiable or both:
                with nullcontext() if both else constant():
                    output = self._attach(f, x, z_star, state, u0)
            return self._push(f, z_star, state, output, differentiable) if pushes and not both else output

    def _attach(self, f: Map, x: Tensor, z_star: Tensor, state: State | None, start: Tensor | None) -> Tensor:
        """Make the equilibrium differentiable in reverse mode."""
        if autocast_enabled(x) and not is_tracing(x):
            # Older torch keeps the casts made while gradients were disabled: the weights would be cut off.
            torch.clear_autocast_cache()
        report = self._report_backward if self._solution_hooks else None
        return self.gradient.attach(
            f, z_star, state=state, start=start, report=report, inputs=[x, *weights_of(self.cell)]
        )

    def _push(self, f: Map, z_star: Tensor, state: State | None, output: Tensor, differentiable: bool) -> Tensor:
        """Make the equilibrium differentiable in forward mode."""
        with torch.no_grad():
            tangent = self.gradient.tangent(f, z_star, state=state)
        if tangent is not None and differentiable:
            name = type(self.gradient).__name__
            message = f"the tangent of an equilibrium cannot be differentiated by {name}: use the gradient Unrolled"
            tangent = refuse_reverse(tangent, message, output)
        return with_tangent(output, tangent)

    @contextmanager
    def bind(self, x: Tensor) -> Iterator[Map]:
        """Yield `z -> cell(z, x)`, the map that a forward with this input solves.

        A context, because parametrised weights are computed once and held for its length. Dropout masks inside the
        cell are drawn at the first evaluation, and kept.

        >>> from timm_deq import Equilibrium, ForwardBackward, spectral_radius
        >>> layer, x = Equilibrium(ForwardBackward(3)), torch.ones(4, 3)
        >>> with layer.bind(x) as f:
        ...     spectral_radius(f, layer(x)).shape
        torch.Size([4])
        """
        with cached_parametrizations(self.cell, differentiable=torch.is_grad_enabled()):
            yield BoundCell(self.cell, x)

    def initial_state(self, x: Tensor) -> Tensor:
        """Return where a solve starts by default: the cell's `initial_state(x)` or zeros, in float32 under autocast."""
        initial_state: Callable[[Tensor], Tensor] = getattr(self.cell, "initial_state", torch.zeros_like)
        z0 = initial_state(x)
        return z0.to(torch.promote_types(z0.dtype, torch.float32)) if autocast_enabled(z0) else z0

    def register_solution_hook(self, hook: SolutionHook) -> RemovableHandle:
        """Call `hook` after each solve; the handle removes it."""
        handle = RemovableHandle(self._solution_hooks)
        self._solution_hooks[handle.id] = hook
        return handle

    def register_iterate_hook(self, hook: IterateHook) -> RemovableHandle:
        """Call `hook` with the iterates of each forward solve, before each evaluation; the handle removes it."""
        handle = RemovableHandle(self._iterate_hooks)
        self._iterate_hooks[handle.id] = hook
        return handle

    def _solve(self, f: Map, x: Tensor, z0: Tensor, *, gather: bool) -> Solution:
        """Run the loop, and report the solution to the hooks."""
        residual_history = [] if self._solution_hooks else None
        version = None if is_tracing(x) else x._version
        with _explain_hooks():
            solution = fixed_point(
                f,
                z0,
                self.solver,
                max_steps=self._budget(x),
                subset_map=self._subset_map(x, z0) if gather else None,
                residual_history=residual_history,
                callback=self._show if self._iterate_hooks else None,
            )
        if version is not None:
            if x._version != version:
                raise ValueError("cell must not change its input in place, as x.add_(z) does")
            if solution.residual.isinf().any():
                _check_finite(x)  # most often the cause
        if residual_history is not None:
            self._report("forward", solution, residual_history)
        return solution

    def _show(self, step: int, z: Tensor) -> None:
        _refuse_vmap()
        for hook in tuple(self._iterate_hooks.values()):
            hook(self, step, z)

    def _report(self, phase: str, solution: Solution, trace: list[Tensor]) -> None:
        _refuse_vmap()
        for hook in tuple(self._solution_hooks.values()):
            hook(self, phase, solution, trace)

    def _report_backward(self, solution: Solution) -> None:
        self._report("backward", solution, [])

    def _subset_map(self, x: Tensor, z0: Tensor) -> Callable[[Tensor], Map] | None:
        """Return the map for some samples alone, if converged samples are to be dropped."""
        if not self.gather or is_tracing(x) or len(x) != len(z0):
            return None
        return lambda rows: BoundCell(self.cell, x[rows])  # in the layout of x, which index_select does not keep

    def _budget(self, x: Tensor) -> int | None:
        """Return a random budget if this is training and one is wanted; None for the solver's."""
        if self.min_steps is None or not self.training or is_tracing(x):
            return None
        most = self.solver.max_steps
        return int(torch.randint(min(self.min_steps, most), most + 1, (), device="cpu"))  # to be read at once

    def _requires_grad(self, x: Tensor) -> bool:
        """Return whether the cell or its input requires a gradient: of a frozen model nothing is recorded."""
        if isinstance(x, torch.fx.Proxy) or any(map(requires_grad, (x, *self.cell.parameters()))):
            return True
        held = (t for m in self.cell.modules() for t in (*m._buffers.values(), *vars(m).values()))
        return any(isinstance(t, Tensor) and requires_grad(t) for t in held)  # as what another network tells the cell

    def _refuse_sharded_cell(self) -> None:
        """Raise ValueError: FSDP2 would gather it at each evaluation, of which ranks make different numbers."""
        if not (dist.is_available() and dist.is_initialized()):
            return  # without the walk over the modules
        for name, module in self.cell.named_modules(prefix="cell"):
            if isinstance(module, FSDPModule):
                raise ValueError(
                    f"cell must be sharded as part of its Equilibrium or of a module above, got {name} sharded alone"
                )

    def __prepare_scriptable__(self) -> nn.Module:
        """Give TorchScript, which knows no solver objects, the recorded steps of the solve."""
        return torch.fx.symbolic_trace(_Steps(self))

    def extra_repr(self) -> str:
        settings = f"solver={self.solver}, gradient={self.gradient}"
        if self.min_steps is not None:
            settings += f", min_steps={self.min_steps}"
        return settings if self.gather else f"{settings}, gather=False"


class _Steps(nn.Module):
    """The solve of a layer, for `torch.fx` to record step by step."""

    def __init__(self, layer: Equilibrium) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer._find(x)


@contextmanager
def _explain_hooks() -> Iterator[None]:
    """Explain why torch refuses the hooks that some modules of a cell put on their tensors."""
    try:
        yield
    except RuntimeError as error:
        if "register a hook on a tensor that doesn't require gradient" not in str(error):
            raise
        raise RuntimeError(
            "cell must not put hooks on its tensors while it is solved without gradients, as captum's DeepLift does:"
            " use the gradient Reversible, whose solve is recorded, or an attribution by the gradient of the input"
        ) from error


def _refuse_vmap() -> None:
    """Raise RuntimeError: what hooks keep of a batch of programs cannot be read once the transform is over."""
    if torch.compiler._is_exporting_flag:
        raise RuntimeError("hooks on a solve, as of SolveLog and WarmStart, must not be open inside torch.export")
    if inside_vmap():
        raise RuntimeError(
            "hooks on a solve, as of SolveLog and WarmStart, must not be open inside torch.func.vmap, jacrev and"
            " jacfwd: call these outside of their context"
        )


def _check_finite(x: Tensor) -> None:
    if not x.is_floating_point():
        return
    samples = int((~x.detach().flatten(1).isfinite().all(dim=1)).sum())
    if samples:
        raise NonFiniteInputError(f"x must be finite, got NaN or infinity in {samples} of {len(x)} samples")
