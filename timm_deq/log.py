"""Telemetry: what the solves of a model did, gathered by hooks, as nc_probe gathers features."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from timm_deq.equilibrium import Equilibrium
from timm_deq.solution import Solution, Status


class SolveLog:
    """Records every solve of a model's equilibria while it is open.

    ```python
    with SolveLog(model) as log:
        model(images)
    log.summary()
    ```

    Nothing is read from the device until it is asked for. A model without an equilibrium gives an empty log.

    Args:
        model: Any module; all its :class:`Equilibrium` layers are logged.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._handles: list[Any] = []
        self._solves: dict[str, list[Solution]] = {"forward": [], "backward": []}
        self._traces: list[list[Tensor]] = []

    def __enter__(self) -> "SolveLog":
        layers = [m for m in self.model.modules() if isinstance(m, Equilibrium)]
        self._handles = [layer.register_solution_hook(self._record) for layer in layers]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _record(self, layer: Equilibrium, phase: str, solution: Solution, trace: list[Tensor]) -> None:
        self._solves[phase].append(solution._replace(value=torch.empty(0)))  # the state itself is not kept
        if phase == "forward":
            self._traces.append(trace)

    def __len__(self) -> int:
        """Solves recorded, forward ones only."""
        return len(self._solves["forward"])

    @property
    def steps(self) -> Tensor:
        """Evaluations of each sample, `(N,)`, int64, on the CPU, in order of the solves."""
        return self._column("forward", "steps")

    @property
    def residual(self) -> Tensor:
        """Final relative residual of each sample, `(N,)`."""
        return self._column("forward", "residual")

    @property
    def status(self) -> Tensor:
        """:class:`Status` of each sample, `(N,)`, int64."""
        return self._column("forward", "status")

    @property
    def trace(self) -> Tensor:
        """Relative residual after each evaluation, `(T, N)`; a finished sample keeps its last."""
        traces = [torch.stack(trace).cpu() for trace in self._traces]
        if not traces:
            return torch.empty(0, 0)
        longest = max(len(t) for t in traces)
        return torch.cat([torch.cat([t, t[-1:].expand(longest - len(t), -1)]) for t in traces], dim=1)

    def summary(self) -> dict[str, float]:
        """Means over samples; empty when nothing was solved.

        Returns:
            `samples`, `mean_steps` (evaluations), `mean_residual`, `median_residual`, `converged` and `nonfinite`
            (fractions of samples); after backward solves also `backward_mean_steps`, `backward_converged`.
        """
        steps, residual, status = self.steps, self.residual, self.status
        if not len(steps):
            return {}
        known = residual[residual.isfinite()]
        summary = {
            "samples": len(steps),
            "mean_steps": steps.double().mean().item(),
            "mean_residual": known.double().mean().item() if len(known) else float("inf"),
            "median_residual": residual.median().item(),
            "converged": (status == Status.CONVERGED).double().mean().item(),
            "nonfinite": (status == Status.NONFINITE).double().mean().item(),
        }
        if self._solves["backward"]:
            summary["backward_mean_steps"] = self._column("backward", "steps").double().mean().item()
            converged = self._column("backward", "status") == Status.CONVERGED
            summary["backward_converged"] = converged.double().mean().item()
        return summary

    def _column(self, phase: str, field: str) -> Tensor:
        columns = [getattr(solution, field).cpu() for solution in self._solves[phase]]
        return torch.cat(columns) if columns else torch.empty(0)
