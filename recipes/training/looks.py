"""Another look at the model of a finished run: what its page shows and its results do not hold."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nc_probe import CollapseReport, NCProbe
from recipes.results.class_figures import tsne_points
from recipes.results.page.study import Look
from recipes.results.runs import FinishedRun
from recipes.training.checkpoint import to_json, write_text
from recipes.training.evaluation import equilibria, evaluate_budgets
from recipes.training.integrity import file_hash
from recipes.training.probing import chosen_images, measure, sample_features
from recipes.training.subject import Subject

# The first evaluation measures the initial state, the second the state after one update.
ONE_UPDATE = 2

CACHE = 512 * 2**20  # bytes of features in memory


def look_at(run: FinishedRun, *, features: bool) -> Look:
    """Look at a run's model.

    Args:
        run: that has a checkpoint; its data set must be there.
        features: look at the training images too, for t-SNE and for collapse along the solve.

    Raises:
        UserError: the model or its images are not what they were, or not there.
    """
    solves = bool(run.results["solver"])
    args = argparse.Namespace(model=str(run.folder), pretrained=False, second_pass=False)
    found: dict[str, Any] = {}
    if solves:
        subject = Subject(args, run.config.get("test_split", "test"))
        subject.load_model()
        points, _ = evaluate_budgets(subject, equilibria(subject), [ONE_UPDATE])
        found["one_update"] = points[0]["accuracy"]
    if features:
        found |= _features(Subject(args, None), iterates=solves)
    return Look(**json.loads(to_json(found)))


def _features(subject: Subject, *, iterates: bool) -> dict[str, Any]:
    """Training images in the plane, and their collapse along the solve."""
    indices, manifest = chosen_images(subject), subject.manifest
    assert manifest is not None  # of a run
    net = subject.load_model()
    loader = subject.loader(indices)
    counts = np.bincount(subject.images.labels[indices], minlength=subject.num_classes).tolist()
    probe = NCProbe(net, class_counts=counts, num_classes=subject.num_classes, iterates=iterates, cache_bytes=CACHE)
    report = measure(subject, probe, loader)
    found: dict[str, Any] = {"iterates": {name: _scalars(each) for name, each in report.iterates.items()}}
    sample = sample_features(subject, probe, loader, report)
    if sample is not None and len(sample[0]) > 3:
        points = np.round(tsne_points(sample[0], seed=subject.config.seed).astype(float), 3)
        found |= {"points": points.tolist(), "labels": sample[1].tolist(), "class_names": subject.images.class_names}
    return found


def _scalars(report: CollapseReport) -> dict[str, float]:
    return {name: getattr(report, name) for name in ("nc1", "nc2_etf", "nc3", "cdnv")}


def kept_look(path: Path, run: FinishedRun, *, features: bool) -> Look:
    """Look at a run's model, or read what was seen before of the same run.

    Args:
        path: file of what was seen.
        run, features: as `look_at` takes them.
    """
    identity = file_hash(run.folder / "results.json")  # which has times, that no other run has to the last digit
    try:
        kept: Mapping[str, Any] = json.loads(path.read_text())
        if kept["run"] == identity and (kept["features"] or not features):
            return Look(**kept["look"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or of another version
        pass
    look = look_at(run, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json({"run": identity, "features": features, "look": asdict(look)}))
    return look
