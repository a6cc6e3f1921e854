r"""Fixed-point correction.

Bai, Geng, Savani & Kolter, "Deep Equilibrium Optical Flow Estimation", CVPR 2022, Sec. 3.3, put the loss $\ell$ on some
of the iterates $z^{(k_1)}, \dots, z^{(k_n)}$ of the solve as well as on its end $z^*$,

$$ \sum_{i=1}^{n} \gamma^{\,n+1-i} \, \ell\bigl(z^{(k_i)}\bigr) + \ell(z^*), $$

here divided by the sum of the weights, so that early iterates are pulled to the answer and the solve converges sooner.
Each iterate is differentiated by one step of f from it: $z^{(k)}$ is a constant, $f(z^{(k)})$ is recorded by autograd.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from timm_deq.equilibrium import Equilibrium
from timm_deq.fixed_point import Map
from timm_deq.gradients.base import Gradient
from timm_deq.gradients.phantom import Phantom
from timm_deq.hooks import Hook, HookContext, equilibria
from timm_deq.spectral import at_equilibrium


class FixedPointCorrection(HookContext):
    """Lets a model's head see iterates of the solve, as more samples, in every training forward while it is open.

    ```python
    with FixedPointCorrection(model, at=(1, 3)) as correction:
        loss = correction.loss(criterion, model(images), labels)
    ```

    The output of the model's equilibrium becomes the concatenation along the batch of the iterates and the equilibrium,
    `((n + 1) B, ...)`, and so do the logits. What follows the equilibrium must treat it as more samples; batch
    statistics there are taken over all of them. In evaluation mode, or without gradients, nothing changes.

    Args:
        model: Any module with one :class:`Equilibrium` layer.
        at: After how many updates of the solver the iterates are taken, n increasing numbers, each at least 1. For a
            solve that ended before, its equilibrium is taken.
        gradient: Differentiates the iterates; the one-step gradient of the paper by default. One that follows the steps
            of the solver will not do.
        decay: The factor $\\gamma$ in (0, 1] from the weight of an entry to that of the one before it.

    Raises:
        ValueError: A model without an equilibrium or with several, or a setting out of its range.
    """

    def __init__(
        self, model: nn.Module, *, at: Sequence[int], gradient: Gradient | None = None, decay: float = 0.8
    ) -> None:
        layers = list(equilibria(model).values())
        if len(layers) != 1:
            raise ValueError(f"model must have exactly 1 Equilibrium, got {len(layers)}")
        if not at or at[0] < 1 or any(later <= earlier for earlier, later in zip(at, at[1:], strict=False)):
            raise ValueError(f"at must be increasing integers of at least 1, got {at!r}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay!r}")
        self.layer = layers[0]
        self.at = tuple(at)
        self.gradient = Phantom(1, damping=1.0) if gradient is None else gradient
        if self.gradient.differentiates_solver or self.gradient.required_solver is not None:
            raise ValueError(f"gradient must need no more than f and an iterate, as Phantom, got {gradient!r}")
        self.decay = decay
        self._iterates: list[Tensor] = []

    def register(self) -> list[RemovableHandle]:
        return [
            self.layer.register_iterate_hook(Hook(self._see)),
            self.layer.register_forward_hook(Hook(self._correct), with_kwargs=True),
        ]

    def split(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Return the n + 1 parts `(B, ...)` of an output `((n + 1) B, ...)`; the last is that of the equilibrium.

        Raises:
            ValueError: The length of `logits` is no multiple of n + 1.
        """
        parts = len(self.at) + 1
        if len(logits) % parts:
            raise ValueError(f"logits must have a multiple of {parts} rows, as in training mode, got {len(logits)}")
        return logits.tensor_split(parts)

    def loss(self, criterion: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted mean of `criterion(part, labels)` over the parts of `logits`.

        Args:
            criterion: A loss of logits `(B, ...)` and labels `(B, ...)`.
            logits: The model's output in training mode, `((n + 1) B, ...)`.
            labels: The labels, `(B, ...)`.

        Raises:
            ValueError: The lengths of `logits` and `labels` do not match.
        """
        parts = len(self.at) + 1
        if len(logits) != parts * len(labels):
            raise ValueError(f"logits must have {parts} x {len(labels)} rows, as in training mode, got {len(logits)}")
        weights = [self.decay**i for i in reversed(range(parts))]
        losses = [criterion(part, labels) for part in self.split(logits)]
        return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum(dim=0) / sum(weights)

    def _see(self, layer: Equilibrium, step: int, z: Tensor) -> None:
        if step == 0:
            self._iterates = []
        if step in self.at:
            self._iterates.append(z.detach())

    def _correct(
        self, layer: Equilibrium, args: tuple[Any, ...], kwargs: dict[str, Any], z_star: Tensor
    ) -> Tensor | None:
        if isinstance(z_star, torch.fx.Proxy) and layer.training:
            raise RuntimeError(
                "FixedPointCorrection must not be open while torch.fx records: trace outside of its context"
            )
        iterates, self._iterates = self._iterates, []
        if not (layer.training and torch.is_grad_enabled()):
            return None
        iterates += [z_star.detach()] * (len(self.at) - len(iterates))

        def attach(f: Map, z_star: Tensor) -> Tensor:
            return torch.cat([*(self.gradient.attach(f, z) for z in iterates), z_star])

        return at_equilibrium(attach, layer, args, kwargs, z_star)
