"""Evaluate a classifier: its accuracy overall, by group and by class, and what its solver did.

    accelerate launch recipes/evaluate.py runs/digits --max-steps 1 2 4 8 16 --output runs/anytime

prints the anytime curve of a deep equilibrium network that recipes/train.py has trained: its accuracy on test images
when the solver may evaluate the cell that many times. It takes half a minute on one thread. Instead of a run folder,
any model of timm and any image data set will do: `resnet50 --pretrained --dataset ORG/NAME --split validation`;
`--help` lists everything. Devices, ranks and precision are chosen by `accelerate launch` or `torchrun`.

The output folder holds `results.json`, `confusion.png`, `reliability.png` (both at the largest budget) and, for a model
that solves, `anytime.png`. A mistake ends the run with one line; `python -X dev` shows where it was found.
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from matplotlib.figure import Figure
from timm.data.model_config import resolve_input_data_config

from recipes.errors import check
from recipes.images.sources import ImageSplit, load_splits, open_dataset
from recipes.images.views import ImageView, eval_loader, eval_transform
from recipes.imbalance.classifiers import tau_normalise
from recipes.imbalance.priors import adjust_logits
from recipes.results.accuracy import accuracies, evaluate, recalls
from recipes.results.calibration import calibration_errors
from recipes.results.figures import anytime_figure, confusion_figure, reliability_figure
from recipes.settings.config import TrainConfig
from recipes.settings.contradictions import correction
from recipes.training.checkpoint import (
    create_model,
    load_run,
    new_folder,
    read_config,
    to_json,
    whole_folder,
    write_text,
)
from recipes.training.faults import exit_code
from recipes.training.manifest import Manifest
from recipes.training.outcome import environment
from timm_deq import Equilibrium, set_solver

IMAGE_FLAGS: dict[str, tuple[type, str]] = {
    "dataset": (str, "'digits' (embedded), a folder, or a Hub dataset id"),
    "dataset_config": (str, "configuration name of a Hub dataset"),
    "dataset_revision": (str, "commit, tag or branch of a Hub dataset"),
    "image_column": (str, "column of the images; found by its type if not given"),
    "label_column": (str, "column of the classes; found by its type if not given"),
    "img_size": (int, "height and width of the model's input in pixels; the model's own if not given"),
    "eval_batch_size": (int, "images of one forward pass, on each rank"),
    "workers": (int, "processes per rank that decode images; chosen by the size of the set if not given"),
}


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: run(read_flags(argv)))


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is a ValueError, like that of everything else."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; allowed: what --help lists")

    def add_images(self) -> None:
        """The flags IMAGE_FLAGS; those that are not given are not in the result."""
        group = self.add_argument_group("images", "for a run folder those of the run, else as in recipes/train.py")
        for name, (kind, text) in IMAGE_FLAGS.items():
            group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)


def read_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; --help prints and exits. IMAGE_FLAGS that are not given are not in the result.

    Raises:
        ValueError: an unknown flag, or a value of the wrong type.
    """
    parser = Parser(
        prog="accelerate launch recipes/evaluate.py",
        description="Evaluate an image classifier, a deep equilibrium network at several budgets of evaluations.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("model", metavar="MODEL", help="run folder of recipes/train.py, timm name, local-dir:FOLDER, hf-hub:ORG/NAME")
    flag("--pretrained", action="store_true", help="load the weights that timm has for a name, not random ones")
    flag("--split", default="test", help="images to evaluate on (default: test)")
    flag("--max-steps", type=int, nargs="+", metavar="N", help="budgets of evaluations; the model's own if not given")
    flag("--tol", type=float, help="relative residual at which a solve ends; the model's own if not given")
    flag("--no-gather", action="store_true", help="evaluate each batch until its last image has finished")
    flag("--adjust-tau", type=float, metavar="TAU", help="subtract TAU log(share of the class) from logits; say 1")
    flag("--tau-normalise", type=float, metavar="TAU", help="divide class vectors by length^TAU, 0 to 1")
    flag("--output", help="folder to create; one that exists is never touched")
    parser.add_images()
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """One evaluation, from the model and the data set to the table and the output folder."""
    started = time.perf_counter()
    folder = None if args.output is None else new_folder(args.output)
    config, manifest = settings(args)
    groups = {} if manifest is None else manifest.groups
    if args.adjust_tau is not None:
        check(manifest is not None, "adjust_tau", args.adjust_tau, "not given without a run, which has counts")
        corrected = correction(config)
        check(corrected is None, "adjust_tau", args.adjust_tau, f"not given, as {corrected} has corrected already")
    accelerator = Accelerator()
    with accelerator.main_process_first():
        images = open_split(config, args.split)
    num_classes = len(images.class_names)

    set_seed(config.seed)  # random weights are the same on every rank
    net = open_model(config, manifest, num_classes).to(accelerator.device)
    if net.num_classes != num_classes:
        raise ValueError(
            f"model {args.model!r} knows {net.num_classes} classes; allowed: a model of {num_classes}, "
            f"as data set {config.dataset!r} has"
        )
    layers = [module for module in net.modules() if isinstance(module, Equilibrium)]
    for name, value in (("max-steps", args.max_steps), ("tol", args.tol)):
        if value is not None and not layers:
            raise ValueError(f"{name} is {value}; allowed: not given for {args.model!r}, which has no equilibrium")

    for layer in layers:
        layer.gather = not args.no_gather
    if args.tau_normalise is not None:
        tau_normalise(net, args.tau_normalise)
    adjust = None
    if args.adjust_tau is not None and manifest is not None:
        adjust = partial(adjust_logits, counts=manifest.counts, tau=args.adjust_tau)

    data_config = resolve_input_data_config(net, config.only("img_size"))
    channels = data_config["input_size"][0]
    loader = eval_loader(
        ImageView(images, np.arange(len(images.labels)), eval_transform(data_config), channels=channels),
        batch_size=config.eval_batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    points: list[dict[str, Any]] = []
    for budget in sorted(set(args.max_steps or ())) or [None]:
        if layers:
            set_solver(net, max_steps=budget, tol=args.tol)
        budget = max((layer.solver.max_steps for layer in layers), default=None)
        batches = tqdm(loader, desc=f"max_steps {budget}" if layers else None, unit="batch", leave=False)
        confusion, solver, _, bins = evaluate(net, batches, accelerator, num_classes, adjust=adjust)
        accuracy = accuracies(confusion, groups)
        per_class = dict(zip(images.class_names, recalls(confusion).tolist(), strict=True))
        calibration = calibration_errors(bins, groups)
        point = {"accuracy": accuracy, "per_class": per_class, "calibration_error": calibration, "solver": solver}
        points.append({"max_steps": budget, **point})

    if accelerator.is_main_process:
        print(table(points))
        if folder is not None:
            results = {
                "model": args.model,
                "dataset": config.dataset,
                "split": args.split,
                "adjust_tau": args.adjust_tau,
                "tau_normalise": args.tau_normalise,
                "images": int(confusion.sum()),
                "tol": max((layer.solver.tol for layer in layers), default=None),
                "points": points,
                "seconds": time.perf_counter() - started,
                **environment(accelerator),
            }
            title = f"{net.pretrained_cfg['architecture']} on {config.dataset}, split {args.split}"
            figures = {
                "confusion": confusion_figure(confusion, images.class_names, title=title),
                "reliability": reliability_figure(bins, title=title),
            }
            if layers:
                figures["anytime"] = anytime_figure(points, title=title)
            save(folder, results, figures)
    accelerator.end_training()


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a row for each budget: accuracies, evaluations spent per image, images that converged."""
    columns = ["max_steps", *(f"{name} %" for name in points[0]["accuracy"]), "evaluations", "converged %"]
    rows = []
    for point in points:
        solver = point["solver"]
        solved = [f"{solver['mean_evaluations']:.2f}", f"{100 * solver['converged']:.1f}"] if solver else ["-", "-"]
        accuracy = ["-" if math.isnan(value) else f"{100 * value:.2f}" for value in point["accuracy"].values()]
        rows.append([str(point["max_steps"] or "-"), *accuracy, *solved])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows))


def settings(args: argparse.Namespace) -> tuple[TrainConfig, Manifest | None]:
    """The settings of the model and its images, checked as those of training are, and the manifest of a run.

    Raises:
        ValueError: a setting out of its range, or a folder that is not that of a run with a checkpoint.
    """
    given = {name: value for name, value in vars(args).items() if name in IMAGE_FLAGS}
    folder = Path(args.model)
    if not folder.is_dir():
        pretrained = args.pretrained or ":" in args.model
        return TrainConfig(output=".", model=args.model, pretrained=pretrained, **given), None
    config = read_config(folder)
    return replace(config, model=args.model, **given), Manifest.load(folder / "manifest.json")


def open_model(config: TrainConfig, manifest: Manifest | None, num_classes: int) -> Any:
    """The model of a run, whose manifest is given, or one of timm: of `num_classes` if its weights are random."""
    if manifest is not None:
        return load_run(Path(config.model))
    return create_model(config, None if config.pretrained else num_classes)


def open_split(config: TrainConfig, name: str) -> ImageSplit:
    """The split to evaluate on. Its classes are those of the train split, or its own where there is no train split.

    Raises:
        ValueError: there is no such data set, split or column, or the classes do not fit.
    """
    splits = open_dataset(config.dataset, config.dataset_config, config.dataset_revision)
    if name not in splits:
        raise ValueError(f"split {name!r} is not in the data set; allowed: {', '.join(map(repr, splits))}")
    # Two names, because the train split itself may be the one to evaluate on.
    pair = {"classes": splits.get(config.train_split, splits[name]), name: splits[name]}
    columns = config.only("image_column", "label_column")
    return load_splits(pair, train_split="classes", test_split=name, **columns)[1]


def save(folder: Path, results: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    """Write `results.json` and the figures; the folder is complete or absent."""
    with whole_folder(folder) as draft:
        write_text(draft / "results.json", to_json(results, indent=2))
        for name, figure in figures.items():
            figure.savefig(draft / f"{name}.png", dpi=150)


if __name__ == "__main__":
    sys.exit(main())
