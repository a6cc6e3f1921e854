"""A log of the solves of a model, gathered by hooks."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from timm_deq.dropout import VariationalDropout
from timm_deq.equilibrium import Equilibrium
from timm_deq.gradients.implicit import Implicit
from timm_deq.hooks import Hook, HookContext, equilibria
from timm_deq.solution import Solution, Status
from timm_deq.solvers.anderson import Anderson
from timm_deq.solvers.base import check_bool, check_integer, is_tracing
from timm_deq.spectral import at_equilibrium, spectral_radius
from timm_deq.transforms import forward_mode, func_transforms

EXACT, SOLVED = Anderson(1e-10, 400), 1e-8
"""In float64: the solver of a gradient that others are compared with, and the residual that its solves must reach."""


class SolveLog(HookContext):
    """Records every solve of a model's equilibria while it is open.

    ```python
    with SolveLog(model) as log:
        model(images)
    log.summary()
    ```

    Nothing is read from the device until it is asked for. A model without an equilibrium gives an empty log.

    Args:
        model: Any module; all its :class:`Equilibrium` layers are logged.
        spectral_steps: With more than 0, the spectral radius of the Jacobian at each equilibrium is measured too, by
            that many steps of :func:`spectral_radius`, each about as dear as a backward pass of the cell.
        gradient_error: Whether the first backward pass after each forward is compared with one in float64, solved to a
            residual of 1e-10, which costs several times as much. Dropout inside the cell is refused, and a hook that
            differentiates through the layer's input, as those of a penalty or a correction, is counted as error.

    Raises:
        ValueError: `spectral_steps` is below 0; in a forward, dropout in a cell whose gradient is to be compared.
    """

    def __init__(self, model: nn.Module, *, spectral_steps: int = 0, gradient_error: bool = False) -> None:
        check_integer("spectral_steps", spectral_steps, 0)
        check_bool("gradient_error", gradient_error)
        self.model = model
        self.spectral_steps = spectral_steps
        self.compares_gradients = gradient_error
        self._solves: dict[str, list[dict[str, Tensor]]] = {"forward": [], "backward": []}
        self._traces: list[list[Tensor]] = []
        self._radii: list[Tensor] = []
        self._gradient_errors: list[Tensor] = []

    def register(self) -> Iterator[RemovableHandle]:
        for layer in equilibria(self.model).values():
            yield layer.register_solution_hook(Hook(self._record))
            if self.spectral_steps:  # ahead of other hooks, which may replace the output
                yield layer.register_forward_hook(Hook(self._record_radius), prepend=True, with_kwargs=True)
            if self.compares_gradients:
                yield layer.register_forward_pre_hook(Hook(_own_input), with_kwargs=True)
                yield layer.register_forward_hook(Hook(self._follow_gradient), prepend=True, with_kwargs=True)

    def _record(self, layer: Equilibrium, phase: str, solution: Solution, trace: list[Tensor]) -> None:
        small = {name: getattr(solution, name) for name in ("steps", "evaluations", "residual", "status")}
        self._solves[phase].append(small)  # no tuple of a class, which torch.compile of torch 2.11 cannot hand on
        if phase == "forward":
            self._traces.append(trace)

    def _record_radius(self, layer: Equilibrium, args: tuple[Any, ...], kwargs: dict[str, Any], z_star: Tensor) -> None:
        radius = partial(spectral_radius, steps=self.spectral_steps)
        self._radii.append(at_equilibrium(radius, layer, args, kwargs, z_star))

    def _follow_gradient(
        self, layer: Equilibrium, args: tuple[Any, ...], kwargs: dict[str, Any], z_star: Tensor
    ) -> None:
        x = kwargs.get("x", *args[:1])
        if not _is_compared(x) or not (z_star.requires_grad and x.requires_grad):
            return
        if any(isinstance(m, VariationalDropout) and m.training and m.p > 0 for m in layer.cell.modules()):
            raise ValueError("gradient_error must be False for a cell with dropout in training: call model.eval()")
        cell, point, equilibrium = _in_float64(layer.cell), x.detach().clone(), z_star.detach().clone()
        cotangents, compared = [], []

        def compare(gradient: Tensor) -> None:
            if self._handles is None or not cotangents or compared:  # later passes may be of second derivatives
                return
            compared.append(True)
            exact = _exact_gradient(cell, point, equilibrium, cotangents[0])
            self._gradient_errors.append(_relative_error(gradient.detach(), exact))

        z_star.register_hook(lambda g: cotangents.append(g.detach()))
        x.register_hook(compare)

    def __len__(self) -> int:
        """Return the number of forward solves recorded."""
        return len(self._solves["forward"])

    @property
    def steps(self) -> Tensor:
        """Evaluations that each sample needed, `(N,)`, int64, on the CPU, in order of the solves."""
        return self._column("forward", "steps")

    @property
    def evaluations(self) -> Tensor:
        """Evaluations spent on each sample, `(N,)`, int64: at least its steps, as it may wait for others."""
        return self._column("forward", "evaluations")

    @property
    def residual(self) -> Tensor:
        """Final relative residual of each sample, `(N,)`."""
        return self._column("forward", "residual")

    @property
    def status(self) -> Tensor:
        """:class:`Status` of each sample, `(N,)`, int64."""
        return self._column("forward", "status")

    @property
    def backward_steps(self) -> Tensor:
        """As `steps`, of the backward solves, which come in the order in which autograd reached them."""
        return self._column("backward", "steps")

    @property
    def backward_residual(self) -> Tensor:
        """As `residual`, of the backward solves."""
        return self._column("backward", "residual")

    @property
    def backward_status(self) -> Tensor:
        """As `status`, of the backward solves."""
        return self._column("backward", "status")

    @property
    def gradient_error(self) -> Tensor:
        """Relative error in norm of each sample's gradient with respect to the input of its equilibrium, `(N,)`.

        In the order of `backward_steps`; empty unless `gradient_error` was given. Where the equilibrium or its adjoint
        could not be found in float64, it is infinite.
        """
        return torch.cat([error.cpu() for error in self._gradient_errors]) if self._gradient_errors else torch.empty(0)

    @property
    def spectral_radius(self) -> Tensor:
        """Spectral radius of the Jacobian at each equilibrium, `(N,)`; empty unless `spectral_steps` was given."""
        return torch.cat([radius.cpu() for radius in self._radii]) if self._radii else torch.empty(0)

    @property
    def trace(self) -> Tensor:
        """Relative residual after each evaluation, `(T, N)`; a finished sample keeps its last."""
        traces = [torch.stack(trace).cpu() for trace in self._traces]
        if not traces:
            return torch.empty(0, 0)
        longest = max(len(t) for t in traces)
        return torch.cat([torch.cat([t, t[-1:].expand(longest - len(t), -1)]) for t in traces], dim=1)

    def summary(self) -> dict[str, float]:
        """Return means over samples; empty when nothing was solved.

        Returns:
            `samples`, `mean_steps`, `mean_evaluations`, `mean_residual`, `median_residual`, `converged` and `nonfinite`
            (fractions of samples); after backward solves also `backward_mean_steps`, `backward_mean_residual` and
            `backward_converged`; with `gradient_error` also `median_gradient_error` and `max_gradient_error`; with
            `spectral_steps` also `spectral_radius`.
        """
        if not len(self.steps):
            return {}
        summary = {
            "samples": len(self.steps),
            "mean_steps": _mean(self.steps),
            "mean_evaluations": _mean(self.evaluations),
            "mean_residual": _mean_residual(self.residual),
            "median_residual": self.residual.median().item(),
            "converged": _mean(self.status == Status.CONVERGED),
            "nonfinite": _mean(self.status == Status.NONFINITE),
        }
        if len(self.backward_steps):
            summary["backward_mean_steps"] = _mean(self.backward_steps)
            summary["backward_mean_residual"] = _mean_residual(self.backward_residual)
            summary["backward_converged"] = _mean(self.backward_status == Status.CONVERGED)
        if len(self.gradient_error):
            summary["median_gradient_error"] = self.gradient_error.median().item()
            summary["max_gradient_error"] = self.gradient_error.max().item()
        if self.spectral_steps:
            summary["spectral_radius"] = _mean(self.spectral_radius)
        return summary

    def _column(self, phase: str, field: str) -> Tensor:
        columns = [solve[field].cpu() for solve in self._solves[phase]]
        return torch.cat(columns) if columns else torch.empty(0)


def _mean(column: Tensor) -> float:
    return column.double().mean().item()


def _mean_residual(residual: Tensor) -> float:
    """Return the mean of the finite ones: a failed sample is counted by its status."""
    known = residual[residual.isfinite()]
    return _mean(known) if len(known) else float("inf")


def _own_input(layer: Equilibrium, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Give the layer an input that nothing else uses, and that has a gradient where the layer has one."""
    x = kwargs.get("x", *args[:1])
    if not _is_compared(x) or not torch.is_grad_enabled():
        return None
    if x.requires_grad:
        x = x.view_as(x)
    elif x.is_floating_point() and any(p.requires_grad for p in layer.cell.parameters()):
        x = x.detach().requires_grad_()
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "x": x})


def _is_compared(x: Any) -> bool:
    """Return whether the gradient of a solve with the input x can be followed: in reverse mode, by `torch.autograd`."""
    if not isinstance(x, Tensor) or is_tracing(x):
        return False
    if func_transforms():
        raise RuntimeError("gradient_error must be False inside torch.func.grad, vjp and jvp: use torch.autograd")
    return not forward_mode(x)


def _in_float64(cell: nn.Module) -> nn.Module:
    """Return a constant copy of a cell as it is now, whatever its tensors were computed from."""
    held = [t for m in cell.modules() for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())]
    copies = {id(t): _constant(t) for t in held if isinstance(t, Tensor)}
    copy = deepcopy(cell, copies)
    for module in copy.modules():
        if isinstance(module, parametrize.ParametrizationList):
            module.eval()  # a spectral norm moves its weight at each call in training
    return copy


def _constant(t: Tensor) -> Tensor:
    return t.detach().to(torch.float64 if t.is_floating_point() else t.dtype, copy=True)


def _exact_gradient(cell: nn.Module, x: Tensor, z_star: Tensor, g: Tensor) -> Tensor:
    """Return the derivative of `<g, z*>` in x `(B, ...)` in float64; infinite in samples that could not be solved."""
    residuals: list[Tensor] = []
    with torch.enable_grad():  # autocast leaves float64 alone
        layer = Equilibrium(cell, solver=EXACT, gradient=Implicit(EXACT))
        layer.register_solution_hook(lambda layer, phase, solution, trace: residuals.append(solution.residual))
        x = x.double().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x, z0=z_star.double()), x, g.double())
    solved = torch.stack(residuals).amax(dim=0) <= SOLVED
    return torch.where(solved.view(-1, *[1] * (x.ndim - 1)), gradient, torch.inf)


def _relative_error(gradient: Tensor, exact: Tensor) -> Tensor:
    """Return `||gradient - exact|| / ||exact||` of each sample, `(B,)`."""
    difference, norm = (torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (gradient - exact, exact))
    error = difference / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.where(exact.flatten(1).isfinite().all(dim=1), error, torch.inf)
