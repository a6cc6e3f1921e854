"""Warm starts: solves that begin where the last ones ended.

For repeated views of one input: augmentations, the frames of a video, the steps of an attack or of an optimisation over
the input, the epochs of full-batch training. The nearer the views, the fewer the evaluations.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from timm_deq.equilibrium import Equilibrium
from timm_deq.hooks import Hook, HookContext, equilibria
from timm_deq.solution import Solution, Status
from timm_deq.transforms import inside_backward


class WarmStart(HookContext):
    """While open, equilibria of a model start from their last ones, and backward solves from their last adjoints.

    ```python
    with WarmStart(model):
        for view in views:  # (B, C, H, W) each, of the same B images
            model(view)
    ```

    A solve whose input has another shape than the last, or that is given a `z0`, starts as without, and so does a
    sample whose last solve failed. The adjoint serves the gradients that solve for it (:class:`timm_deq.Implicit`,
    :class:`timm_deq.Shine`). Those of the steps taken (:class:`timm_deq.Unrolled`, :class:`timm_deq.Reversible`) get
    too small, and zero where the start is the answer.

    Args:
        model: Any module; all its :class:`Equilibrium` layers are warm-started.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._last: dict[tuple[Equilibrium, str], Tensor] = {}

    def register(self) -> Iterator[RemovableHandle]:
        for layer in equilibria(self.model).values():
            yield layer.register_forward_pre_hook(Hook(self._start), with_kwargs=True)
            yield layer.register_solution_hook(Hook(self._keep))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.forget()

    def forget(self) -> None:
        """Discard the starts: the next solves, of other images, begin as without."""
        self._last.clear()

    def _start(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        assert isinstance(layer, Equilibrium)
        if torch.jit.is_tracing():  # the start would be a constant of the program
            return None
        if layer.gradient.differentiates_solver and inside_backward():  # a checkpoint repeats the steps: all of them
            return None
        z, u = self._last.get((layer, "forward")), self._last.get((layer, "backward"))
        if z is None or len(args) > 1 or kwargs.get("z0") is not None:
            return None
        cold = layer.initial_state(args[0] if args else kwargs["x"])
        if z.shape != cold.shape or z.device != cold.device:
            return None
        usable = z.isfinite().flatten(1).all(dim=1).view(-1, *[1] * (z.ndim - 1))
        return args, {"u0": u, **kwargs, "z0": torch.where(usable, z.to(cold.dtype), cold)}

    def _keep(self, layer: Equilibrium, phase: str, solution: Solution, history: list[Tensor]) -> None:
        failed = (solution.status == Status.NONFINITE).view(-1, *[1] * (solution.value.ndim - 1))
        self._last[layer, phase] = torch.where(failed, torch.nan, solution.value.detach())
