"""Measure the neural collapse of a classifier on the images that it was trained on.

    accelerate launch recipes/probe.py runs/digits --layers stages --iterates --output runs/collapse

prints the collapse (NC1 to NC4 and more, by group of classes) of a deep equilibrium network that recipes/train.py has
trained, at its features, after each stage, and at each iterate of its solver: half a minute on one thread. Instead of a
run folder, any model of timm and any image data set will do: `resnet50 --pretrained --dataset ORG/NAME --split train`;
with `--no-classifier`, a model of other classes than those of the data set. `--help` lists everything. Devices, ranks
and precision are chosen by `accelerate launch` or `torchrun`.

The output folder holds `collapse.json` and pictures: `gram.png` and `angles.png` (classes two by two), `depth.png` and
`iterates.png` (if measured), `tsne.png` (some of the features). A mistake ends the run with one line; `python -X dev`
shows where it was found.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from matplotlib.figure import Figure
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nc_probe import CONVENTIONS, CollapseReport, NCProbe
from nc_probe.plots import plot_angles, plot_depth, plot_grams, plot_iterates
from recipes.evaluate import Parser, open_model, open_split, settings
from recipes.images.sources import ImageSplit
from recipes.images.views import ImageView, eval_loader, eval_transform
from recipes.imbalance.profiles import Groups, two_group
from recipes.results.accuracy import sum_over_ranks
from recipes.results.figures import sample_evenly, tsne_figure
from recipes.settings.config import TrainConfig
from recipes.training.checkpoint import new_folder, to_json, whole_folder, write_text
from recipes.training.faults import exit_code
from recipes.training.manifest import Manifest
from recipes.training.outcome import environment

# t-SNE of more samples takes minutes, and shows no more.
TSNE_SAMPLES = 2000


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: run(read_flags(argv)))


def read_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; --help prints and exits. IMAGE_FLAGS that are not given are not in the result.

    Raises:
        ValueError: an unknown flag, or a value of the wrong type.
    """
    parser = Parser(
        prog="accelerate launch recipes/probe.py",
        description="Measure the neural collapse of an image classifier: features, layers, iterates of its solver.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("model", metavar="MODEL", help="run folder of recipes/train.py, timm name, local-dir:FOLDER, hf-hub:ORG/NAME")
    flag("--pretrained", action="store_true", help="load the weights that timm has for a name, not random ones")
    flag("--no-classifier", action="store_true", help="measure the features alone, of whatever classes the model knows")
    flag("--head", help="name of the classifier's module, where it cannot be found")
    flag("--split", help="images to measure on; if not given those trained on, for a run exactly those it chose")
    flag("--center", default="balanced", help="balanced: every class counts once (default); empirical: by its images")
    flag("--groups", nargs="+", metavar="NAME=0-2,5", help="classes of groups; if not given those of the run, or none")
    flag("--majority", type=int, nargs="+", metavar="N", help="K_A, or two or more classes: groups majority, minority")
    flag("--layers", nargs="+", default=(), metavar="NAME", help="modules to measure too, or 'stages'")
    flag("--iterates", action="store_true", help="measure the iterates of an equilibrium too")
    flag("--conventions", nargs="+", default=(), metavar="PAPER", help=f"formulas besides: {', '.join(CONVENTIONS)}")
    flag("--cache-mib", type=int, help="memory for features on each rank, in MiB (default: 1024); beyond it disk")
    flag("--second-pass", action="store_true", help="keep no features: show the images twice instead; no t-SNE then")
    flag("--no-tsne", action="store_true", help="draw no t-SNE of features")
    flag("--output", help="folder to create; one that exists is never touched")
    parser.add_images()
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """One measurement, from the model and the data set to the table and the output folder."""
    started = time.perf_counter()
    folder = None if args.output is None else new_folder(args.output)
    if args.second_pass and args.cache_mib is not None:
        raise ValueError(f"cache-mib is {args.cache_mib}; allowed: not given with second-pass, which keeps no features")
    config, manifest = settings(args)
    split = args.split or config.train_split
    accelerator = Accelerator()
    with accelerator.main_process_first():
        images = open_split(config, split)
    num_classes = len(images.class_names)
    indices = chosen_images(args, config, images, manifest)
    groups = chosen_groups(args, {} if manifest is None else manifest.groups, num_classes)

    set_seed(config.seed)  # random weights are the same on every rank
    net = open_model(config, manifest, num_classes)
    if args.no_classifier:
        net.reset_classifier(0)
    net.to(accelerator.device).eval()
    if net.num_classes not in (0, num_classes):
        raise ValueError(
            f"model {args.model!r} knows {net.num_classes} classes; allowed: a model of {num_classes}, "
            f"as data set {config.dataset!r} has, or --no-classifier"
        )
    data_config = resolve_input_data_config(net, config.only("img_size"))
    view = ImageView(images, indices, eval_transform(data_config), channels=data_config["input_size"][0])
    loader = eval_loader(
        view,
        batch_size=config.eval_batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    cache_mib = 0 if args.second_pass else 1024 if args.cache_mib is None else args.cache_mib
    probe = NCProbe(
        net,
        groups=groups,
        center=args.center,
        class_counts=np.bincount(view.labels, minlength=num_classes).tolist(),
        num_classes=num_classes,
        head=args.head,
        layers="stages" if list(args.layers) == ["stages"] else args.layers,
        iterates=args.iterates,
        conventions=args.conventions,
        cache_bytes=cache_mib * 2**20,
    )
    with probe:
        show(net, tqdm(loader, desc="images", unit="batch", leave=False), accelerator, probe)
    with probe.second_pass() if args.second_pass else nullcontext():
        if args.second_pass:
            show(net, tqdm(loader, desc="images again", unit="batch", leave=False), accelerator, probe)
    report = probe.compute()
    sample = None
    if folder is not None and not args.no_tsne and not args.second_pass:
        sample = gather_features(probe, loader, report, accelerator, seed=config.seed)

    if accelerator.is_main_process:
        print(report)
        if folder is not None:
            results = {
                "settings": {**vars(args), "dataset": config.dataset, "split": split, "groups": groups},
                "classes": images.class_names,
                "images": len(view),
                "collapse": report.as_dict(per_class=True),
                "seconds": time.perf_counter() - started,
                **environment(accelerator),
            }
            title = f"{net.pretrained_cfg['architecture']} on {config.dataset}, split {split}"
            pictures = figures(report, sample, groups, images.class_names, seed=config.seed, title=title)
            save(folder, results, pictures)
    accelerator.end_training()


def chosen_images(
    args: argparse.Namespace, config: TrainConfig, images: ImageSplit, manifest: Manifest | None
) -> np.ndarray:
    """Rows of the split to measure on: of the split that a run was trained on those that it chose, else all.

    Raises:
        ValueError: the data set is not the one that the run was trained on, though nothing else was asked for.
    """
    everything = np.arange(len(images.labels))
    if manifest is None or images.name != config.train_split:
        return everything
    if manifest.fingerprint == images.fingerprint:
        return np.asarray(manifest.indices)
    if "dataset" in args:
        return everything
    raise ValueError(
        f"split {images.name!r} of data set {config.dataset!r} has changed since {args.model!r} was trained on it; "
        "allowed: the same images, another split, or a dataset named by --dataset"
    )


def chosen_groups(args: argparse.Namespace, groups: Groups, num_classes: int) -> Groups:
    """The groups that flags name, or those given; none of them is empty.

    Raises:
        ValueError: flags that name no groups, or classes that are not there.
    """
    if args.groups and args.majority:
        raise ValueError(f"groups is {args.groups} beside majority {args.majority}; allowed: one of them")
    if args.majority:
        majority = args.majority[0] if len(args.majority) == 1 else args.majority
        _, groups = two_group(np.ones(num_classes, dtype=int), majority=majority, ratio=1)
    elif args.groups:
        groups = dict(map(named_group, args.groups))
    return {name: classes for name, classes in groups.items() if classes}


def named_group(word: str) -> tuple[str, list[int]]:
    """The group that a word such as `few=0-2,5` names.

    Raises:
        ValueError: it names none.
    """
    name, _, listed = word.partition("=")
    classes = []
    try:
        for part in listed.split(","):
            first, _, last = part.partition("-")
            classes += range(int(first), int(last or first) + 1)
    except ValueError:
        classes = []
    if not name or not classes:
        raise ValueError(f"groups has {word!r}; allowed: NAME=CLASSES, with classes such as 0-2,5")
    return name, classes


@torch.no_grad()
def show(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator, probe: NCProbe) -> None:
    """Show the images of this rank to the model, and their classes to the probe that is attached to it."""
    for images, labels in batches:
        with accelerator.autocast():
            net(images.to(accelerator.device, non_blocking=True))
        probe.update(labels)


def gather_features(
    probe: NCProbe, loader: DataLoader, report: CollapseReport, accelerator: Accelerator, *, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Features (n, d) float32 and classes (n,) of some images, the same on any number of ranks; None if not kept.

    Every rank fills in the images that it has seen, and the sum over ranks is all of them.
    """
    assert report.means is not None and isinstance(loader.dataset, ImageView)
    labels = loader.dataset.labels
    chosen = sample_evenly(labels, TSNE_SAMPLES, seed=seed)
    found = torch.zeros(len(chosen), report.means.shape[1] + 1)  # the last column tells what was seen
    for positions, (features, _) in zip(loader.batch_sampler or (), probe.kept(), strict=False):
        inside = np.flatnonzero(np.isin(positions, chosen))
        rows = np.searchsorted(chosen, np.asarray(positions)[inside])
        found[rows, :-1] = features[inside].float()
        found[rows, -1] = 1
    found = sum_over_ranks(accelerator, found.to(accelerator.device)).cpu().numpy()
    return (found[:, :-1], labels[chosen]) if found[:, -1].all() else None


def figures(
    report: CollapseReport,
    sample: tuple[np.ndarray, np.ndarray] | None,
    groups: Groups,
    class_names: Sequence[str],
    *,
    seed: int,
    title: str,
) -> dict[str, Figure]:
    """Pictures of what was measured, by name; none of what was not."""
    order = "group" if groups else "frequency"
    gram = plot_grams(report, order=order, class_names=class_names, title=f"{title}: cosines between classes")
    pictures = {"gram": gram}
    if len(report.classes) > 1:
        pictures["angles"] = plot_angles(report, title=f"{title}: angles between classes")
    if report.layers:
        pictures["depth"] = plot_depth(report, title=f"{title}: collapse against depth")
    if report.iterates:
        pictures["iterates"] = plot_iterates(report, title=f"{title}: collapse as the solver goes on")
    if sample is not None and len(sample[0]) > 3:
        named: dict[str, Any] = {"groups": groups, "class_names": class_names, "seed": seed}
        pictures["tsne"] = tsne_figure(*sample, **named, title=f"{title}: t-SNE of {len(sample[0])} features")
    return pictures


def save(folder: Path, results: Mapping[str, Any], pictures: Mapping[str, Figure]) -> None:
    """Write `collapse.json` and the pictures; the folder is complete or absent."""
    with whole_folder(folder) as draft:
        write_text(draft / "collapse.json", to_json(results, indent=2))
        for name, figure in pictures.items():
            figure.savefig(draft / f"{name}.png", dpi=150)


if __name__ == "__main__":
    sys.exit(main())
