"""Parts common to all families: from the flat, JSON-able keywords of a timm model to solvers, gradients and norms.

Flat, because `timm` stores a model's keywords in `config.json`: what builds an equilibrium survives the Hub.
"""

from dataclasses import asdict, fields, replace
from typing import Any

import torch
from timm.layers import BatchNormAct2d, GroupNormAct, register_notrace_module
from timm.models._input import update_model_args
from torch import nn

from timm_deq.equilibrium import Equilibrium
from timm_deq.gradients import Gradient, Implicit, Neumann, Phantom, Reversible, Shine, Unrolled
from timm_deq.hooks import equilibria
from timm_deq.solvers import Anderson, Broyden, Picard, ReversibleIteration, Solver
from timm_deq.solvers.base import check_bool, check_integer

SOLVERS: dict[str, type[Solver]] = {
    "picard": Picard,
    "anderson": Anderson,
    "broyden": Broyden,
    "reversible": ReversibleIteration,
}
GRADIENTS: dict[str, type[Gradient]] = {
    "implicit": Implicit,
    "phantom": Phantom,
    "neumann": Neumann,
    "shine": Shine,
    "reversible": Reversible,
    "unrolled": Unrolled,
}
# Prefixes of the keywords of a gradient, for those that have any.
PREFIXES = {"implicit": "backward_", "phantom": "phantom_", "neumann": "neumann_", "shine": "shine_"}

# A traced model keeps its equilibria whole, with their early exit and their gradient.
register_notrace_module(Equilibrium)


def create_solver(name: str, **settings: Any) -> Solver:
    """Build a solver by name; settings that are None keep the solver's default.

    Raises:
        ValueError: An unknown name, a setting that the solver does not have, or one out of its range.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}")
    return SOLVERS[name](**_known_settings(f'solver="{name}"', SOLVERS[name], settings))


def create_gradient(name: str, solver: Solver, **settings: Any) -> Gradient:
    """Build a gradient by name; settings that are None keep the gradient's default.

    Args:
        name: A key of `GRADIENTS`.
        solver: The forward solver, which the backward solve of "implicit" follows.
        settings: `backward_tol`, `backward_max_steps` for "implicit"; `phantom_steps`, `phantom_damping` for "phantom";
            `neumann_terms`; `shine_refine`.

    Raises:
        ValueError: An unknown name, a setting that the gradient does not have, one out of its range, or a solver that
            does not serve the gradient.
    """
    if name not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {name!r}")
    prefix = PREFIXES.get(name, "")
    foreign = [key for key, value in settings.items() if value is not None and not (prefix and key.startswith(prefix))]
    if foreign:
        raise ValueError(f'{foreign[0]} does not apply to gradient="{name}"')
    own = {key.removeprefix(prefix): value for key, value in settings.items() if value is not None}
    gradient = Implicit(replace(solver, **own)) if name == "implicit" else GRADIENTS[name](**own)
    gradient.check_solver(solver)
    return gradient


def create_equilibrium_args(
    *,
    solver: str = "anderson",
    tol: float = 1e-3,
    max_steps: int = 20,
    atol: float | None = None,
    memory: int | None = None,
    ridge: float | None = None,
    mixing: float | None = None,
    damping: float | None = None,
    check_every: int | None = None,
    while_loop: bool | None = None,
    min_steps: int | None = None,
    gather: bool = True,
    gradient: str = "implicit",
    backward_tol: float | None = None,
    backward_max_steps: int | None = None,
    phantom_steps: int | None = None,
    phantom_damping: float | None = None,
    neumann_terms: int | None = None,
    shine_refine: int | None = None,
) -> dict[str, Any]:
    """Return the keywords that every DEQ model takes, as arguments of its :class:`Equilibrium`.

    None means the default of the chosen solver or gradient.

    Args:
        solver: "anderson", "broyden", "picard" or "reversible".
        tol: Relative residual at which a sample has converged.
        max_steps: Most evaluations of the cell.
        atol: Absolute residual at which a sample has converged too.
        memory: Iterates that "anderson", or rank-one terms that "broyden" keeps; for "shine" all, if not given.
        ridge: Regularisation of "anderson".
        mixing: Step of "anderson" along the mixed residual.
        damping: Step of "picard" along the residual, weight of the cell in "reversible".
        check_every: Evaluations of the cell between convergence checks.
        while_loop: Whether exported and compiled programs keep the early exit, as a loop.
        min_steps: Least budget of a solve in training, if it is to be random.
        gather: Whether evaluation goes on with the unfinished samples alone.
        gradient: "implicit", "phantom", "neumann", "shine" (with "broyden"), "reversible" (with "reversible") or
            "unrolled".
        backward_tol: Tolerance of the backward solve of "implicit"; that of the forward solve by default.
        backward_max_steps: Budget of the backward solve of "implicit"; that of the forward solve by default.
        phantom_steps: Damped steps of "phantom".
        phantom_damping: Weight of the cell in each.
        neumann_terms: Terms of the series of "neumann".
        shine_refine: Steps that refine the shared inverse of "shine".
    """
    if min_steps is not None:
        check_integer("min_steps", min_steps, 1)
    if gradient == "shine" and solver == "broyden" and memory is None:
        memory = max_steps  # a restart would throw away what the gradient is to share
    chosen = create_solver(
        solver,
        tol=tol,
        max_steps=max_steps,
        atol=atol,
        memory=memory,
        ridge=ridge,
        mixing=mixing,
        damping=damping,
        check_every=check_every,
        while_loop=while_loop,
    )
    differentiated = create_gradient(
        gradient,
        chosen,
        backward_tol=backward_tol,
        backward_max_steps=backward_max_steps,
        phantom_steps=phantom_steps,
        phantom_damping=phantom_damping,
        neumann_terms=neumann_terms,
        shine_refine=shine_refine,
    )
    return {"solver": chosen, "gradient": differentiated, "min_steps": min_steps, "gather": gather}


def create_out_norm(
    out_norm: str,
    channels: int,
    *,
    num_groups: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Create the norm before pooling: "none", "group" (GroupNorm) or "batch_relu" (BatchNorm, ReLU).

    Raises:
        ValueError: Any other `out_norm`.
    """
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    if out_norm == "none":
        return nn.Identity()
    if out_norm == "group":
        return GroupNormAct(channels, num_groups, apply_act=False, **dd)
    if out_norm == "batch_relu":
        return BatchNormAct2d(channels, **dd)
    raise ValueError(f"out_norm must be one of none, group, batch_relu, got {out_norm!r}")


def set_solver(model: nn.Module, solver: str | None = None, *, exact: bool = False, **settings: Any) -> None:
    """Change how a model solves for its equilibria: the anytime knob, `set_solver(model, max_steps=4)`.

    The backward solve of an implicit gradient follows; a tolerance and a budget of its own it keeps, unless `exact`.
    The settings are recorded in the model's arguments, so they survive `deepcopy`, saving and the Hub.

    Args:
        model: A module with at least one :class:`Equilibrium`.
        solver: Name of another solver, whose other settings then start from its defaults; None keeps the present one.
        exact: Whether forward and backward solves are to go as far as the precision of the weights allows: a `tol` of
            1e-9 in float64, of 1e-7 in float32, and a budget of 200. A `tol` or a budget that is given prevails.
        settings: `tol`, `max_steps` and the other settings of the solver; those not given, or None, stay.

    Raises:
        ValueError: The model has no equilibrium, a setting is unknown or out of its range, or the new solver does not
            serve the gradient; `exact` with a gradient other than :class:`Implicit`.
    """
    check_bool("exact", exact)
    layers = list(equilibria(model).values())
    if not layers:
        raise ValueError(f"model must have an Equilibrium layer, got {type(model).__name__} without one")
    given = {key: value for key, value in settings.items() if value is not None}
    changed = [_changed(layer, solver, _exact_settings(layer) | given if exact else given) for layer in layers]
    for layer, new in zip(layers, changed, strict=True):  # all valid before any is set
        layer.gradient.check_solver(new)
    recorded: dict[str, Any] = {}
    for layer, new in zip(layers, changed, strict=True):
        recorded = _recorded(new)
        if isinstance(layer.gradient, Implicit):
            layer.gradient, backward = _following(layer.gradient, layer.solver, new, exact=exact)
            recorded.update(backward)
        layer.solver = new
    update_model_args(model, **recorded)


def _exact_settings(layer: Equilibrium) -> dict[str, Any]:
    """Return the settings of solves whose error is that of rounding."""
    if not isinstance(layer.gradient, Implicit):
        raise ValueError(f'gradient must be "implicit" for exact=True, got {type(layer.gradient).__name__}')
    dtype = next((p.dtype for p in layer.cell.parameters()), torch.float32)
    return {"tol": max(torch.finfo(dtype).eps, 1e-9), "max_steps": 200}


def _changed(layer: Equilibrium, name: str | None, given: dict[str, Any]) -> Solver:
    """Return the solver of a layer after a change of its settings, or of the solver itself."""
    current = layer.solver
    if name is not None and SOLVERS.get(name) is not type(current):
        return create_solver(name, **{"tol": current.tol, "max_steps": current.max_steps, **given})
    new = replace(current, **_known_settings(type(current).__name__, type(current), given))
    if isinstance(layer.gradient, Shine) and isinstance(current, Broyden) and isinstance(new, Broyden):
        if current.memory == current.max_steps and "memory" not in given:  # as when the model was made
            new = replace(new, memory=new.max_steps)
    return new


def _recorded(solver: Solver) -> dict[str, Any]:
    """Return all keywords that build a solver, so that nothing recorded for the one before it reaches it."""
    names = {cls: name for name, cls in SOLVERS.items()}
    if type(solver) not in names:
        return {}
    every = {field.name for cls in SOLVERS.values() for field in fields(cls)}
    return {"solver": names[type(solver)], **dict.fromkeys(every), **asdict(solver)}


def _following(gradient: Implicit, old: Solver, new: Solver, *, exact: bool) -> tuple[Implicit, dict[str, Any]]:
    """Return the implicit gradient after a change of the forward solver, as `create_gradient`, and its keywords."""
    backward = gradient.solver
    own = {"tol": backward.tol, "max_steps": backward.max_steps}
    if exact:
        if backward != replace(old, **own):
            return Implicit(replace(backward, tol=new.tol, max_steps=new.max_steps)), {}
        backward = old  # whatever it had of its own
    if backward == old:
        return Implicit(new), {"backward_tol": None, "backward_max_steps": None}
    if backward != replace(old, **own):  # not one that keywords describe
        return gradient, {}
    return Implicit(replace(new, **own)), {f"backward_{key}": value for key, value in own.items()}


def _known_settings(owner: str, cls: type[Solver], settings: dict[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        if key not in _names(cls):
            raise ValueError(f"{key} does not apply to {owner}, whose settings are {', '.join(sorted(_names(cls)))}")
    return given


def _names(cls: type[Solver]) -> set[str]:
    return {field.name for field in fields(cls)}
