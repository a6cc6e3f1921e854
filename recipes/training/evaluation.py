"""The accuracy of a trained model, at several budgets of its solver."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from accelerate.utils import tqdm
from torch import Tensor

from recipes.errors import check, user_errors
from recipes.imbalance.priors import adjust_logits
from recipes.results.accuracy import Evaluation, accuracies, evaluate, recalls
from recipes.results.calibration import calibration_errors
from recipes.results.class_figures import confusion_figure
from recipes.results.figures import Drawing, anytime_figure, reliability_figure
from recipes.settings.contradictions import correction
from recipes.training.subject import Subject
from timm_deq import Equilibrium, set_solver


def logit_adjustment(subject: Subject, tau: float | None) -> Callable[[Tensor], Tensor] | None:
    """Create the correction of logits by the share of each class among the training images, if a tau is given.

    Raises:
        UserError: a model whose counts are not known, or whose training made up for the imbalance.
    """
    if tau is None:
        return None
    check(subject.manifest is not None, "adjust_tau", tau, "not given without a run, which has counts")
    corrected = correction(subject.config)
    check(corrected is None, "adjust_tau", tau, f"not given, as {corrected} has corrected already")
    assert subject.manifest is not None
    return partial(adjust_logits, counts=subject.manifest.counts, tau=tau)


def equilibria(subject: Subject, **given: Any) -> list[Equilibrium]:
    """Return the equilibrium layers of the model.

    Args:
        given: settings of a solver by flag, which a model without an equilibrium does not have.

    Raises:
        UserError: one is given for such a model.
    """
    layers = [module for module in subject.net.modules() if isinstance(module, Equilibrium)]
    for name, value in given.items():
        allowed = f"not given for {subject.name!r}, which has no equilibrium"
        check(value is None or bool(layers), name.replace("_", "-"), value, allowed)
    return layers


def evaluate_budgets(
    subject: Subject,
    layers: Sequence[Equilibrium],
    budgets: Sequence[int] | None,
    *,
    tol: float | None = None,
    adjust: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[dict[str, Any]], Evaluation]:
    """Evaluate on all images of the split, once for each budget of evaluations of the cell.

    Args:
        layers: the model's equilibria.
        budgets: in any order; None for the model's own.
        tol: relative residual at which a solve ends; the model's own if None.
        adjust: correction of the logits.

    Returns:
        What was found at each budget, in rising order, and the evaluation at the largest.
    """
    groups = {} if subject.manifest is None else subject.manifest.groups
    loader = subject.loader(subject.usable(subject.rows))
    points, evaluation = [], None
    for budget in sorted(set(budgets or ())) or [None]:
        if layers:
            with user_errors():
                set_solver(subject.net, max_steps=budget, tol=tol)
        budget = max((layer.solver.max_steps for layer in layers), default=None)
        batches = tqdm(loader, desc=f"max_steps {budget}" if layers else None, unit="batch", leave=False)
        evaluation = evaluate(subject.net, batches, subject.accelerator, subject.num_classes, adjust=adjust)
        points.append(
            {
                "max_steps": budget,
                "accuracy": accuracies(evaluation.confusion, groups),
                "per_class": dict(zip(subject.images.class_names, recalls(evaluation.confusion).tolist(), strict=True)),
                "calibration_error": calibration_errors(evaluation.bins, groups),
                "solver": evaluation.solver,
            }
        )
    assert evaluation is not None
    return points, evaluation


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """Format a Markdown table with a row for each budget: accuracies, evaluations per image, images that converged."""
    columns = ["max_steps", *(f"{name} %" for name in points[0]["accuracy"]), "evaluations", "converged %"]
    rows = []
    for point in points:
        solver = point["solver"]
        solved = [f"{solver['mean_evaluations']:.2f}", f"{100 * solver['converged']:.1f}"] if solver else ["-", "-"]
        accuracy = ["-" if math.isnan(value) else f"{100 * value:.2f}" for value in point["accuracy"].values()]
        rows.append([str(point["max_steps"] or "-"), *accuracy, *solved])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows))


def figures(subject: Subject, points: Sequence[Mapping[str, Any]], evaluation: Evaluation) -> dict[str, Drawing]:
    """Figures of an evaluation, by name, yet to be drawn: two of the largest budget, one of all if there are any."""
    names, title = subject.images.class_names, subject.title
    found: dict[str, Drawing] = {
        "confusion": partial(confusion_figure, evaluation.confusion, names, title=title),
        "reliability": partial(reliability_figure, evaluation.bins, title=title),
    }
    if points[0]["max_steps"] is not None:
        found["anytime"] = partial(anytime_figure, points, title=title)
    return found
