r"""The common part of the gradients that find the adjoint $u = (I - J^\top)^{-1} g$ of a cotangent $g$.

f is evaluated once at the equilibrium, recorded by autograd. An identity is applied to the result, whose backward pass
replaces $g$ by $u$; f's own backward pass then takes $u$ to the parameters.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from timm_deq.bound_cell import lasting
from timm_deq.fixed_point import Map
from timm_deq.gradients.base import BackwardCallback, Gradient
from timm_deq.jacobian import TransposedJacobian
from timm_deq.layout import Layout
from timm_deq.solution import Solution
from timm_deq.solvers.base import State
from timm_deq.transforms import forward_mode, func_transforms, refuse_reverse, tangent_of, with_tangent

_OTHERWISE = "use the gradient Unrolled, or torch.autograd.grad(..., create_graph=True) with Implicit"


class AdjointGradient(Gradient):
    """Base of the gradients that differ only in how they solve the adjoint system.

    Where f is recorded by `torch.fx`, which knows no autograd, the recorded steps are differentiated instead.

    Attributes:
        twice_differentiable: Whether `solve` is exact, up to a tolerance, so that u may be differentiated implicitly.
    """

    twice_differentiable: ClassVar[bool] = False

    @abstractmethod
    def solve(
        self, system: Map, g: Tensor, start: Tensor | None, state: State | None, *, transposed: bool
    ) -> Solution | Tensor:
        """Return the solution u of a linear system, or the :class:`Solution` that holds it.

        Args:
            system: `u -> J^T u + g`, whose fixed point is u; `u -> J u + g` for a tangent.
            g: The cotangent or the tangent, `(B, ...)`, in float32 or better, scaled to at most one per sample, in the
                layout of the equilibrium.
            start: A first guess, in the same scale and layout.
            state: The last state of the forward solver, in rows of the same layout.
            transposed: Whether the system is that of the adjoint.
        """

    def tangent(self, f: Map, z_star: Tensor, *, state: State | None = None) -> Tensor | None:
        """Solve `t = J t + b` with the tangent b of f at a constant `z_star`, in place of the adjoint system."""
        if func_transforms().count("Jvp") > 1:
            name = type(self).__name__
            raise RuntimeError(f"the gradient {name} has no second derivative by torch.func.jvp: {_OTHERWISE}")
        b = tangent_of(f(z_star))
        if b is None:
            return None
        if _functorch.is_legacy_batchedtensor(b):
            raise RuntimeError(
                'vectorize=True with strategy="forward-mode" does not serve an equilibrium: use torch.func.jacfwd or'
                " the gradient Unrolled"
            )
        b = Layout.of(z_star).arranged(b.to(torch.promote_types(b.dtype, torch.float32)))
        scale = _scale_of(b)

        def system(t: Tensor) -> Tensor:
            pushed = tangent_of(f(with_tangent(z_star, t * scale)))
            assert pushed is not None
            return pushed.to(t.dtype) / scale

        solution = self.solve(system, b / scale, None, state, transposed=False)
        return (solution if isinstance(solution, Tensor) else solution.value) * scale

    def attach(
        self,
        f: Map,
        z_star: Tensor,
        *,
        state: State | None = None,
        start: Tensor | None = None,
        report: BackwardCallback | None = None,
        inputs: Sequence[Tensor] = (),
    ) -> Tensor:
        return z_star if isinstance(z_star, fx.Proxy) else self._attach(f, z_star, state, start, report, inputs)

    @torch.compiler.disable()  # a nested autograd.grad cannot be compiled: one graph break
    def _attach(
        self,
        f: Map,
        z_star: Tensor,
        state: State | None,
        start: Tensor | None,
        report: BackwardCallback | None,
        inputs: Sequence[Tensor],
    ) -> Tensor:
        if transforms := func_transforms():
            return self._attach_in_func(f, z_star, state, start, report, transforms)
        transposed = TransposedJacobian.at(f, z_star)
        if transposed.is_zero:  # a constant f: there is nothing to differentiate
            return z_star

        solve = partial(self._solve_scaled, z_star, state, start, report)
        inputs = [t for t in inputs if t.requires_grad]
        connected = partial(self._connected_gradients, lasting(f), z_star, transposed.fz, inputs)
        return _Adjoint.apply(transposed.fz, transposed.z, z_star, solve, connected, *inputs)

    def _solve_scaled(
        self,
        z_star: Tensor,
        state: State | None,
        start: Tensor | None,
        report: BackwardCallback | None,
        product: Map,
        cotangent: Tensor,
    ) -> Tensor:
        """Return the adjoint u for a cotangent `(B, ...)`, by the product with J^T at `z_star`."""
        # Per sample to unit size, so that no loss scale drives squared norms out of the range of float32.
        g = Layout.of(z_star).arranged(cotangent.to(torch.promote_types(cotangent.dtype, torch.float32)))
        scale = _scale_of(g)
        g = g / scale

        def adjoint(u: Tensor) -> Tensor:
            return product(u).to(u.dtype) + g

        solution = self.solve(adjoint, g, _usable_start(start, g, scale), state, transposed=True)
        if isinstance(solution, Tensor):
            return solution * scale
        u = solution.value * scale
        if report is not None:
            report(solution._replace(value=u))
        return u

    def _attach_in_func(
        self,
        f: Map,
        z_star: Tensor,
        state: State | None,
        start: Tensor | None,
        report: BackwardCallback | None,
        transforms: list[str],
    ) -> Tensor:
        """Attach the gradient inside transforms of `torch.func`, of which the innermost alone may be in reverse mode.

        The adjoint is solved in the backward pass of that transform, where products with J^T are those of an inner vjp.
        To transforms further out it is a constant.
        """
        name = type(self).__name__
        if "Grad" not in transforms:
            message = f"the gradient {name} has no reverse mode over torch.func.jvp and vmap: {_OTHERWISE}"
            return refuse_reverse(z_star, message, f(z_star))
        if set(transforms[:-1]) - {"Vmap"} or transforms[-1] != "Grad":
            raise RuntimeError(
                f"the gradient {name} serves torch.func.grad, vjp and jacrev as the innermost transform, inside of none"
                f" but vmap: {_OTHERWISE}"
            )
        fz, pull = torch.func.vjp(f, z_star)  # pyright: ignore[reportAssignmentType]
        solve_scaled = partial(self._solve_scaled, z_star, state, start, report)

        def solve(cotangent: Tensor) -> Tensor:
            with torch.no_grad():
                u = solve_scaled(lambda u: pull(u.to(fz.dtype))[0], cotangent).to(fz.dtype)
            return refuse_reverse(u, f"the gradient {name} has no second derivative by torch.func: {_OTHERWISE}", fz)

        return _FuncAdjoint.apply(fz, z_star, solve)

    def _connected_gradients(
        self, f: Map, z_star: Tensor, fz: Tensor, inputs: list[Tensor], g: Tensor, u: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of `inputs` for the cotangent `g`, themselves differentiable.

        The adjoint u is the fixed point of `u -> J^T u + g`, and so it is differentiated as the equilibrium is: by the
        same identity, above a J that depends on an equilibrium which is connected to `inputs`.
        """
        if not self.twice_differentiable:
            raise RuntimeError(
                f"the gradient {type(self).__name__} has no second derivative: it would miss how the equilibrium moves."
                " Use Implicit, or Unrolled, whose derivatives of every order are those of the steps taken."
            )
        _check_inputs(fz, inputs)
        is_open: list[bool] = []
        z = _Gate.apply(self._attach(f, z_star, None, None, None, inputs), is_open)
        fz = f(z)

        def adjoint(u: Tensor) -> Tensor:
            product = torch.autograd.grad(fz, z, u.to(fz.dtype), create_graph=True, materialize_grads=True)[0]
            return product.to(u.dtype) + g

        u = self._attach(adjoint, u, None, None, None, ())
        gradients = torch.autograd.grad(fz, inputs, u.to(fz.dtype), create_graph=True, allow_unused=True)
        is_open.append(True)
        return gradients


class _Gate(torch.autograd.Function):
    """Identity of a tensor, through which nothing is back-propagated until it is open.

    The gradients of `inputs` are to be the partial ones at a given z; their own derivatives pass through it.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, is_open: list[bool]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.is_open = is_open
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        return grads[0] if ctx.is_open else None, None


def _check_inputs(fz: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise RuntimeError if `fz` depends on a leaf other than through `inputs`, or one input on another.

    The part of the one would be missing in a second derivative, that of the other counted twice.
    """
    known = {t.grad_fn if t.grad_fn is not None else t for t in inputs}
    reached = _ancestors(fz, known)
    foreign = {t for t in reached if isinstance(t, Tensor)} - known
    upstream = {t for input in inputs if input.grad_fn is not None for t in _ancestors(input, set())}
    if len(foreign) > 1 or upstream & known - {t.grad_fn for t in inputs}:  # one is z itself
        raise RuntimeError(
            "a second derivative of an equilibrium needs the tensors that the cell depends on to be its input and its"
            " parameters, none of which leads to another; for others use the gradient Unrolled"
        )


def _ancestors(tensor: Tensor, stop: set[Any]) -> set[Any]:
    """Return the autograd nodes above a tensor, with leaves in place of theirs, as far as those of `stop`."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        node = getattr(node, "variable", node)
        if node is None or node in seen:
            continue
        seen.add(node)
        if node not in stop and not isinstance(node, Tensor):
            nodes += [following for following, _ in node.next_functions]
    return seen


def _scale_of(g: Tensor) -> Tensor:
    """Return the largest modulus of each sample of `g` `(B, ...)`, `(B, 1, ...)`; 1 for a sample of zeros."""
    scale = torch.linalg.vector_norm(Layout.of(g).rows(g), ord=float("inf"), dim=1)
    return torch.where(scale > 0, scale, 1).view(-1, *[1] * (g.ndim - 1))


def _usable_start(start: Tensor | None, g: Tensor, scale: Tensor) -> Tensor | None:
    """Return a first guess in the scale of `g`, or `g` in samples where either is not finite; None if it is none.

    So a cotangent that is not finite reaches the parameters, and a guess that one has left behind does no harm.
    """
    if start is None or start.shape != g.shape or start.device != g.device:
        return None
    start = Layout.of(g).arranged(start.detach().to(g.dtype)) / scale
    finite = Layout.of(g).rows(start + g).isfinite().all(dim=1)
    return torch.where(finite.view(scale.shape), start, g)


class _Adjoint(torch.autograd.Function):
    """Forward: the value of `z_star`. Backward: hands `u` to `fz`, for a cotangent `g`."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, z_star: Tensor, solve: Any, connected: Any, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(fz, z)
        ctx.solve, ctx.connected, ctx.inputs = solve, connected, len(inputs)
        ctx.is_dual = forward_mode(fz)
        return z_star.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (cotangent,) = grads
        if cotangent is None:
            return None, None, None, None, None, *[None] * ctx.inputs
        if _functorch.is_legacy_batchedtensor(cotangent):
            raise RuntimeError(
                "is_grads_batched=True and vectorize=True do not serve an equilibrium: back-propagate one cotangent at"
                " a time, or use torch.func.jacrev or the gradient Unrolled"
            )
        if ctx.is_dual and forward_mode(cotangent):
            raise RuntimeError("an equilibrium has no forward mode over its reverse mode: use the gradient Unrolled")
        fz, z = ctx.saved_tensors
        with torch.no_grad():
            u = ctx.solve(TransposedJacobian(z, fz), cotangent).to(fz.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            return None, None, None, None, None, *ctx.connected(cotangent, u)
        return u, None, None, None, None, *[None] * ctx.inputs


class _FuncAdjoint(torch.autograd.Function):
    """Forward: the value of `z_star`. Backward: hands `u` to `fz`, inside a transform of `torch.func`."""

    @staticmethod
    def forward(fz: Tensor, z_star: Tensor, solve: Any) -> Tensor:
        return z_star.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.solve = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.solve(grads[0]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], fz: Tensor, z_star: Tensor, solve: Any) -> tuple[Tensor, Any]:
        return refuse_reverse(
            z_star, f"an adjoint has no reverse mode over torch.func.vmap: {_OTHERWISE}", fz
        ), in_dims[1]
