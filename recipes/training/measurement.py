"""Measurements of a run: at the end of every epoch, and once on the test split."""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from nc_probe import CollapseReport, NCProbe
from recipes.errors import user_errors
from recipes.results.accuracy import Evaluation, accuracies, evaluate, recalls
from recipes.results.calibration import calibration_errors
from recipes.results.figures import run_figures, save_figures
from recipes.training.checkpoint import append_line, save_checkpoint, to_json, write_text
from recipes.training.outcome import environment, peak_memory, run_title, summary
from recipes.training.run import Run, chosen_settings
from recipes.training.state import random_state_kept
from recipes.training.tracking import scalars
from timm_deq import Equilibrium


def measure_epoch(run: Run) -> None:
    """Put accuracies and, in some epochs, neural collapse into the record of the epoch under way."""
    config, record = run.config, run.progress.record
    run.network.gather()
    run.network.average_statistics()
    if run.done or (config.probe_every > 0 and run.progress.epoch % config.probe_every == 0):
        evaluation, report = _probe_training_images(run)
        record["solver"] = evaluation.solver
        record["train"] = accuracies(evaluation.confusion, run.images.manifest.groups)
        record["collapse"] = report.as_dict()
        run.postfix["NC1"] = f"{report.nc1:.3g}"
    if run.batches.sizes["val"]:
        evaluation = _evaluate(run, "val")
        record["solver"] = evaluation.solver
        record["val"] = accuracies(evaluation.confusion, run.images.manifest.groups)
        run.postfix["val"] = f"{record['val']['overall']:.1%}"
    # Images of each class trained on.
    record["draws"] = run.batches.sampler.samples_per_class(run.progress.step).tolist()


def save_epoch(run: Run) -> None:
    """Save the model where it is kept, the record of the epoch, and a state from which the next epoch begins."""
    progress, record = run.progress, run.progress.record
    keep = "collapse" in record
    if run.config.select == "best":
        keep = record["val"]["overall"] > progress.best
        if keep:
            progress.best, progress.best_epoch = record["val"]["overall"], progress.epoch
            progress.best_updates = progress.updates
    if keep:
        _save_model(run)
        run.checkpoint = f"{run.folder / 'checkpoint'} (epoch {progress.epoch})"
    record["peak_memory_mib"] = peak_memory(run.accelerator.device) / 2**20
    run.postfix["GiB"] = f"{record['peak_memory_mib'] / 1024:.2f}"
    record["seconds"] = run.seconds
    if run.accelerator.is_main_process:
        append_line(run.folder / "metrics.jsonl", to_json(record))
    run.accelerator.log(scalars(record), step=progress.updates)
    progress.records.append(record)
    progress.epoch, progress.step, progress.record = progress.epoch + 1, 0, {}
    run.states.save(progress, run.loss_sum.zero_())


def run_test(run: Run) -> None:
    """Show the selected weights to the test split, once, and write results and figures."""
    progress = run.progress
    selected = progress.records[-1]["epoch"]
    if run.config.select == "best":
        selected = progress.best_epoch
        run.network.measured.load_state_dict(run.states.weights(progress.best_updates))
    report = run.report
    if run.config.select == "best" or report is None:  # a run may be resumed after its last epoch
        if run.config.select == "last":
            run.network.gather()
        _, report = _probe_training_images(run)
        _save_model(run)
    evaluation = _evaluate(run, "test")
    anytime = _anytime(run, evaluation) if run.config.push_to_hub else []
    accuracy = accuracies(evaluation.confusion, run.images.manifest.groups)
    run.accelerator.log(scalars({"test": accuracy}), step=progress.updates)
    if run.accelerator.is_main_process:
        results = _results(run, evaluation, report, selected) | ({"anytime": anytime} if anytime else {})
        tol = next((m.solver.tol for m in run.network.measured.modules() if isinstance(m, Equilibrium)), None)
        settings: dict[str, Any] = {"tol": tol, "class_names": run.images.class_names, "anytime": anytime}
        settings["title"] = run_title(run.config, run.images.manifest)
        write_text(run.folder / "results.json", to_json(results, indent=2))
        print(summary(results, run.folder))
        save_figures(run.folder / "figures", run_figures(progress.records, report, evaluation.log, **settings))


def _results(run: Run, evaluation: Evaluation, report: CollapseReport, selected: int) -> dict[str, Any]:
    """Content of results.json."""
    names = run.images.class_names
    draws = np.sum([record["draws"] for record in run.progress.records], axis=0)
    return {
        "test": accuracies(evaluation.confusion, run.images.manifest.groups),
        "test_per_class": dict(zip(names, recalls(evaluation.confusion).tolist(), strict=True)),
        "calibration_error": calibration_errors(evaluation.bins, run.images.manifest.groups),
        "collapse": report.as_dict(per_class=True),
        "solver": evaluation.solver,
        "selected": {"by": run.config.select, "epoch": selected},
        "images": run.batches.sizes,
        "draws_per_class": dict(zip(names, draws.tolist(), strict=True)),
        "chosen": chosen_settings(run),
        "parameters": sum(p.numel() for p in run.network.net.parameters()),
        "seconds": time.perf_counter() - run.started,
        **environment(run.accelerator),
    }


def _anytime(run: Run, last: Evaluation) -> list[dict[str, Any]]:
    """Evaluate on the test split with budgets of 1, 2, 4, ... evaluations of the cell, for the model card.

    Args:
        last: the evaluation with the model's own budget.

    Returns:
        Points for `recipes.results.figures.anytime_figure`; none for an explicit model.
    """
    layers = [module for module in run.network.measured.modules() if isinstance(module, Equilibrium)]
    solvers, found = [layer.solver for layer in layers], {}
    most = max((solver.max_steps for solver in solvers), default=0)
    for budget in (2**i for i in range(most.bit_length()) if 2**i < most):
        for layer, solver in zip(layers, solvers, strict=True):
            layer.solver = replace(solver, max_steps=min(budget, solver.max_steps))
        found[budget] = _evaluate(run, "test")
    for layer, solver in zip(layers, solvers, strict=True):
        layer.solver = solver
    groups = run.images.manifest.groups
    points = {**found, most: last} if layers else {}
    return [{"max_steps": budget, "accuracy": accuracies(each.confusion, groups)} for budget, each in points.items()]


def _evaluate(run: Run, split: str, probe: NCProbe | None = None) -> Evaluation:
    loader = run.batches.evaluation[split]
    with random_state_kept(run.accelerator.device):  # a model may draw in evaluation too, and training goes on
        return evaluate(run.network.measured, loader, run.accelerator, len(run.images.class_names), probe)


def _probe_training_images(run: Run) -> tuple[Evaluation, CollapseReport]:
    """Measure neural collapse on the training images as they are."""
    evaluation = _evaluate(run, "train", run.probe)
    with user_errors():
        run.report = run.probe.compute()
    return evaluation, run.report


def _save_model(run: Run) -> None:
    if run.accelerator.is_main_process:
        settings: dict[str, Any] = {"data_config": run.network.data_config, "class_names": run.images.class_names}
        save_checkpoint(run.network.measured, run.folder / "checkpoint", **settings)
