r"""Size and spectral radius of the Jacobian $J = \partial f / \partial z$ at an equilibrium.

The solve and its backward pass converge fast where J is small, so Bai, Koltun & Kolter, "Stabilizing Equilibrium Models
by Jacobian Regularization" (ICML 2021, Eq. 9), penalise its Frobenius norm, by the estimate of Hutchinson (1989),

$$ \frac{1}{D}\,\|J\|_F^2 = \frac{1}{D}\,\mathbb{E}_v \|v^\top J\|^2, \qquad \mathbb{E}\,v v^\top = I, $$

for a state of D elements. Its spectral radius, below which no iteration of f contracts, is found by power iteration
(von Mises 1929) with products by $J^\top$, which has the same eigenvalues.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from timm_deq.equilibrium import Equilibrium
from timm_deq.hooks import Hook, HookContext, equilibria
from timm_deq.jacobian import TransposedJacobian
from timm_deq.solvers.base import check_integer
from timm_deq.transforms import inside_backward


def jacobian_penalty(f: Callable[[Tensor], Tensor], z: Tensor, *, samples: int = 1) -> Tensor:
    r"""Return an unbiased estimate of $\|J\|_F^2 / D$ for each sample, differentiable in what f depends on.

    The vectors v have independent signs (Rademacher): of all vectors with independent elements these give the smallest
    variance, and none at all for a diagonal J. Costs one evaluation of f and `samples` products $v^\top J$, and takes a
    second derivative of f: fused attention kernels have none, so run an attention cell under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Args:
        f: A map from `(B, ...)` to `(B, ...)` that treats samples independently.
        z: Where the Jacobian is taken, `(B, ...)`, held constant.
        samples: Vectors v, at least 1.

    Returns:
        The estimates, `(B,)`, in float32 or better; detached where gradients are disabled.

    Raises:
        ValueError: `samples` is below 1.
    """
    check_integer("samples", samples, 1)
    transposed = TransposedJacobian.at(f, z)
    total = z.new_zeros(len(z), dtype=torch.promote_types(z.dtype, torch.float32))
    if transposed.is_zero:
        return total
    for _ in range(samples):
        v = torch.randint_like(transposed.fz, 2) * 2 - 1
        product = transposed(v, create_graph=torch.is_grad_enabled())
        total = total + product.flatten(1).to(total.dtype).square().sum(dim=1)
    return total / (samples * z.flatten(1).shape[1])


def spectral_radius(f: Callable[[Tensor], Tensor], z: Tensor, *, steps: int = 20) -> Tensor:
    r"""Return the largest modulus of the eigenvalues of J for each sample, by power iteration.

    The estimate is the geometric mean of the growth of $\|{J^\top}^k v\|$ over the later half of the steps. A complex
    pair makes the growth of single steps oscillate, but hardly their mean, whose error falls as one over `steps`; where
    one real eigenvalue dominates, it falls exponentially. A normal J is never overestimated. Measured on cells and on
    random matrices of up to 256 rows, the error is within 13 % at 20 steps, 8 % at 50 and 4 % at 100. The start v is
    the same at every call and leaves torch's global generator alone: measuring a model does not change what it does
    next.

    Args:
        f: A map from `(B, ...)` to `(B, ...)` that treats samples independently; evaluated once.
        z: Where the Jacobian is taken, `(B, ...)`.
        steps: Products with $J^\top$, at least 1.

    Returns:
        The estimates, `(B,)`, detached, in float32 or better; 0 for a zero J or a constant f.

    Raises:
        ValueError: `steps` is below 1.
    """
    check_integer("steps", steps, 1)
    transposed = TransposedJacobian.at(f, z)
    dtype = torch.promote_types(z.dtype, torch.float32)
    if transposed.is_zero:
        return z.new_zeros(len(z), dtype=dtype)
    generator = torch.Generator(z.device).manual_seed(0)
    v = torch.randn(z.shape, generator=generator, device=z.device, dtype=dtype).flatten(1)
    log_growth = v.new_zeros(len(v))
    for step in range(steps):
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        v = transposed(v.view(z.shape)).flatten(1).to(dtype)
        if step >= steps // 2:
            log_growth += torch.linalg.vector_norm(v, dim=1).log()
    return (log_growth / (steps - steps // 2)).exp()


class JacobianPenalty(HookContext):
    """Penalises the Jacobian of every equilibrium that a model finds in training while it is open.

    ```python
    with JacobianPenalty(model) as penalty:
        loss = criterion(model(images), labels) + 0.1 * penalty.mean()
    ```

    The gradient reaches the cell's parameters and, through the injected input, what comes before it; the equilibrium
    itself is held constant. A forward in evaluation mode, or without gradients, is not recorded.

    Args:
        model: Any module; all its :class:`Equilibrium` layers are penalised.
        samples: See :func:`jacobian_penalty`.
    """

    def __init__(self, model: nn.Module, *, samples: int = 1) -> None:
        check_integer("samples", samples, 1)
        self.model = model
        self.samples = samples
        self._penalties: list[Tensor] = []

    def register(self) -> list[RemovableHandle]:
        # Ahead of other hooks, which may replace the output.
        return [
            layer.register_forward_hook(Hook(self._record), prepend=True, with_kwargs=True)
            for layer in equilibria(self.model).values()
        ]

    def _record(self, layer: Equilibrium, args: tuple[Any, ...], kwargs: dict[str, Any], z_star: Tensor) -> None:
        if layer.training and torch.is_grad_enabled():
            measure = partial(jacobian_penalty, samples=self.samples)
            penalty = at_equilibrium(measure, layer, args, kwargs, z_star)
            if not inside_backward():  # a checkpoint repeats forwards, all of them, but it was recorded before
                self._penalties.append(penalty)

    def mean(self) -> Tensor:
        """Return the mean over samples and layers of the forwards since the last call, a differentiable scalar.

        Raises:
            ValueError: There was no forward in training mode since.
        """
        if not self._penalties:
            raise ValueError("mean() needs a forward of an Equilibrium in training mode with gradients, got none")
        penalties, self._penalties = self._penalties, []
        return torch.cat(penalties).mean()


def at_equilibrium(
    measure: Callable[..., Tensor],
    layer: Equilibrium,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    z_star: Tensor,
) -> Tensor:
    """Apply `measure(f, z_star)` to the map f that a forward of `layer` solved, from the arguments of a forward hook.

    Dropout masks inside f are drawn again.
    """
    with layer.bind(kwargs.get("x", *args[:1])) as f:
        return measure(f, z_star)
