"""A log of the solves of a model, gathered by hooks."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from timm_deq.equilibrium import Equilibrium
from timm_deq.hooks import Hook, HookContext, equilibria
from timm_deq.solution import Solution, Status
from timm_deq.solvers.base import check_integer
from timm_deq.spectral import at_equilibrium, spectral_radius


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

    Raises:
        ValueError: `spectral_steps` is below 0.
    """

    def __init__(self, model: nn.Module, *, spectral_steps: int = 0) -> None:
        check_integer("spectral_steps", spectral_steps, 0)
        self.model = model
        self.spectral_steps = spectral_steps
        self._solves: dict[str, list[Solution]] = {"forward": [], "backward": []}
        self._traces: list[list[Tensor]] = []
        self._radii: list[Tensor] = []

    def register(self) -> Iterator[RemovableHandle]:
        for layer in equilibria(self.model).values():
            yield layer.register_solution_hook(Hook(self._record))
            if self.spectral_steps:  # ahead of other hooks, which may replace the output
                yield layer.register_forward_hook(Hook(self._record_radius), prepend=True, with_kwargs=True)

    def _record(self, layer: Equilibrium, phase: str, solution: Solution, trace: list[Tensor]) -> None:
        self._solves[phase].append(solution._replace(value=torch.empty(0), state=None))  # what is large is not kept
        if phase == "forward":
            self._traces.append(trace)

    def _record_radius(self, layer: Equilibrium, args: tuple[Any, ...], kwargs: dict[str, Any], z_star: Tensor) -> None:
        radius = partial(spectral_radius, steps=self.spectral_steps)
        self._radii.append(at_equilibrium(radius, layer, args, kwargs, z_star))

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
            `backward_converged`; with `spectral_steps` also `spectral_radius`.
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
        if self.spectral_steps:
            summary["spectral_radius"] = _mean(self.spectral_radius)
        return summary

    def _column(self, phase: str, field: str) -> Tensor:
        columns = [getattr(solution, field).cpu() for solution in self._solves[phase]]
        return torch.cat(columns) if columns else torch.empty(0)


def _mean(column: Tensor) -> float:
    return column.double().mean().item()


def _mean_residual(residual: Tensor) -> float:
    """Return the mean of the finite ones: a failed sample is counted by its status."""
    known = residual[residual.isfinite()]
    return _mean(known) if len(known) else float("inf")
