"""Folders of finished runs, made up, with everything in them that a page shows."""

import json

import numpy as np
import yaml

CLASSES = ["zero", "one", "two", "three"]


def write_run(folder, *, seed, minority, residual=None, epochs=(0, 5, 10), **settings):
    """A run of four classes, two of them rare, whose numbers all follow from `minority` and the seed."""
    folder.mkdir(parents=True)
    config = {"output": str(folder), "seed": seed, "model": "net", "model_args": {}, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    solver = {} if residual is None else {"mean_steps": 7.5, "mean_residual": residual, "converged": 0.75}
    accuracy = {"overall": (0.95 + minority) / 2, "majority": 0.95, "minority": minority}
    records = []
    for epoch in epochs:
        loss = None if epoch == 0 else 1 / epoch + 0.001 * seed
        record = {"epoch": epoch, "train_loss": loss, "val": accuracy, "solver": solver}
        records.append(record | {"collapse": collapse(2 / (epoch + 1), minority)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    results = {"test": accuracy, "collapse": collapse(0.25, minority, grams=True), "solver": solver, "seconds": 3.0}
    results |= {"device": "cpu", "mixed_precision": "no", "versions": {"torch": "2"}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def collapse(nc1, minority, *, grams=False):
    found = {"nc1": nc1, "nc2_etf": 0.5 - minority / 4, "nc2_etf_weight": 0.4, "nc3": 0.3, "nc4": 1.0}
    found |= {"nc2_seli": 0.6, "nc2_seli_weight": 0.5, "nc2_gof": 0.7, "nc2_gof_weight": None}
    found |= {"mean_square_norm": 20 + minority, "mean_square_norm_weight": 5.0, "cdnv": nc1 / 3}
    if grams:
        cosines = (1.25 * np.eye(4) - 0.25).tolist()
        found |= {"classes": [0, 1, 2, 3], "class_count": [100, 100, 10, 10]}
        found |= {"gram": cosines, "gram_weight": cosines}
    return found
