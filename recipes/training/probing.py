"""The neural collapse of a trained model on a split of images."""

import argparse
import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader

from nc_probe import CollapseReport, NCProbe, OODProbe, OODReport
from nc_probe.plots import plot_angles, plot_classes, plot_compare, plot_depth, plot_grams, plot_iterates
from recipes.errors import UserError, user_errors
from recipes.images.labels import shorten
from recipes.images.sources import ImageSplit, load_split, open_dataset
from recipes.images.views import ImageView
from recipes.imbalance.profiles import Groups, two_group
from recipes.results.accuracy import sum_over_ranks
from recipes.results.class_figures import sample_evenly, tsne_figure
from recipes.results.figures import Drawing
from recipes.training.subject import Subject, open_split

# t-SNE of more samples takes minutes, and shows no more.
TSNE_SAMPLES = 1000


def chosen_images(subject: Subject) -> np.ndarray:
    """Choose the rows of the split to measure on: of the split that a run was trained on those that it chose, else all.

    Raises:
        UserError: the data set is not the one that the run was trained on, though no other was named.
    """
    images, manifest, config = subject.images, subject.manifest, subject.config
    if manifest is None or subject.split != config.train_split:
        return subject.usable(subject.rows)
    if manifest.fingerprint == images.fingerprint:
        return subject.usable(np.asarray(manifest.indices))
    if "dataset" in subject.args:
        return subject.usable(subject.rows)
    raise UserError(
        f"split {images.name!r} of data set {config.dataset!r} has changed since {subject.name!r} was trained on it; "
        "allowed: the same images, another split, or a dataset named by --dataset"
    )


def chosen_groups(subject: Subject) -> Groups:
    """Return the groups that flags name, or those of the run; none of them is empty.

    Raises:
        UserError: flags that name no groups, or classes that are not there.
    """
    args = subject.args
    groups = {} if subject.manifest is None or subject.known is None else subject.manifest.groups
    if args.groups and args.majority:
        raise UserError(f"groups is {args.groups} and majority is {args.majority}; allowed: one of them")
    if args.majority:
        majority = args.majority[0] if len(args.majority) == 1 else args.majority
        _, groups = two_group(np.ones(subject.num_classes, dtype=int), majority=majority, ratio=1)
    elif args.groups:
        groups = dict(map(named_group, args.groups))
    return {name: classes for name, classes in groups.items() if classes}


def named_group(word: str) -> tuple[str, list[int]]:
    """Parse a group from a word such as `few=0-2,5`.

    Raises:
        UserError: it names none.
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
        raise UserError(f"groups has {word!r}; allowed: NAME=CLASSES, with classes such as 0-2,5")
    return name, classes


def create_probe(subject: Subject, indices: np.ndarray, groups: Groups) -> NCProbe:
    """Create the probe that the flags describe.

    Args:
        indices: rows of the split to measure on.

    Raises:
        UserError: a layer, a head, a centre or a convention that there is not.
    """
    args = subject.args
    cache_mib = 0 if args.second_pass else 1024 if args.cache_mib is None else args.cache_mib
    with user_errors():
        return NCProbe(
            subject.net,
            groups=groups,
            center=args.center,
            class_counts=np.bincount(subject.images.labels[indices], minlength=subject.num_classes).tolist(),
            num_classes=subject.num_classes,
            head=args.head,
            layers="stages" if list(args.layers) == ["stages"] else args.layers,
            iterates=args.iterates,
            conventions=args.conventions,
            spectrum=True,
            cache_bytes=cache_mib * 2**20,
        )


def measure(subject: Subject, probe: NCProbe, loader: DataLoader) -> CollapseReport:
    """Show the images to the model, twice with --second-pass, and measure.

    Raises:
        UserError: features that cannot be measured, such as those of broken weights.
    """
    with user_errors():
        with probe:
            _show(subject, probe, tqdm(loader, desc="images", unit="batch", leave=False))
        if subject.args.second_pass:
            with probe.second_pass():
                _show(subject, probe, tqdm(loader, desc="images again", unit="batch", leave=False))
        return probe.compute()


@torch.no_grad()
def _show(subject: Subject, probe: NCProbe, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Show the images of this rank to the model, and their classes to the probe that is attached to it."""
    accelerator = subject.accelerator
    for images, labels in batches:
        with accelerator.autocast():
            subject.net(images.to(accelerator.device, non_blocking=True))
        probe.update(labels)


def sample_features(
    subject: Subject, probe: NCProbe, loader: DataLoader, report: CollapseReport
) -> tuple[np.ndarray, np.ndarray] | None:
    """Features (n, d) float32 and classes (n,) of some images, the same on any number of ranks; None if not kept.

    Every rank fills in the images that it has seen, and the sum over ranks is all of them.
    """
    assert report.means is not None and isinstance(loader.dataset, ImageView)
    labels = loader.dataset.labels
    chosen = sample_evenly(labels, TSNE_SAMPLES, seed=subject.config.seed)
    found = torch.zeros(len(chosen), report.means.shape[1] + 1)  # the last column marks the images that were seen
    for positions, (features, _) in zip(loader.batch_sampler or (), probe.kept(), strict=False):
        inside = np.flatnonzero(np.isin(positions, chosen))
        rows = np.searchsorted(chosen, np.asarray(positions)[inside])
        found[rows, :-1] = features[inside].float()
        found[rows, -1] = 1
    found = sum_over_ranks(subject.accelerator, found.to(subject.accelerator.device)).cpu().numpy()
    return (found[:, :-1], labels[chosen]) if found[:, -1].all() else None


def load_ood(subject: Subject) -> tuple[DataLoader, DataLoader | None]:
    """Load the images of no class that --ood names, and those of the classes that --ood_known names, if it is given.

    Raises:
        UserError: no such data set or split, or images of a class that the model has.
    """
    args, config = subject.args, subject.config
    with subject.accelerator.main_process_first(), user_errors():
        splits = open_dataset(args.ood)
        name = args.ood_split or ("test" if "test" in splits else next(iter(splits)))
        images = load_split(splits, name, declared=True)
        known = None
        if args.ood_known is not None:
            known = open_split(config, args.ood_known, subject.manifest, subject.images.class_names)
    shared = sorted({*images.class_names} & {*subject.images.class_names})
    if shared:
        raise UserError(f"ood is {args.ood!r}, which has classes measured: {shorten(shared)}; allowed: images of none")

    def loader(split: ImageSplit, rows: np.ndarray) -> DataLoader:
        shown = copy.copy(subject)
        shown.images = split
        return shown.loader(shown.usable(rows))

    return loader(images, np.arange(len(images.labels))), None if known is None else loader(*known)


@torch.no_grad()
def measure_ood(subject: Subject, probe: NCProbe, unknown: DataLoader, known: DataLoader | None) -> OODReport:
    """Tell images of no class from those of the classes by what has been measured.

    Args:
        unknown: images of no class.
        known: images of the classes; those measured if None.

    Raises:
        UserError: features that cannot be scored, or no known ones.
    """
    accelerator = subject.accelerator
    with user_errors(), OODProbe(probe) as ood:
        shown = [] if known is None else [("images of the classes", known, ood.update_known)]
        for name, loader, add in [*shown, ("images of no class", unknown, ood.update)]:
            for images, _ in tqdm(loader, desc=name, unit="batch", leave=False):
                with accelerator.autocast():
                    subject.net(images.to(accelerator.device, non_blocking=True))
                add()
        return ood.compute()


def load_other(subject: Subject) -> Subject:
    """Load the model that --compare names, to be measured as the subject is, whose model is loaded.

    Raises:
        UserError: a model that cannot be had, or one of other classes.
    """
    own = {"model": subject.args.compare, "layers": (), "iterates": False, "head": None, "model_args": {}}
    other = Subject(argparse.Namespace(**{**vars(subject.args), **own}), subject.args.split)
    other.load_model(classifier=not other.args.no_classifier)
    if {*other.images.class_names} != {*subject.images.class_names}:
        raise UserError(
            f"compare is {other.name!r}, of other classes than {subject.name!r}; allowed: a model of the same"
        )
    return other


def measure_other(other: Subject, subject: Subject, groups: Groups) -> CollapseReport:
    """Measure the features of another model of the same classes, which may have other numbers, and of the same groups.

    Raises:
        UserError: features that cannot be measured.
    """
    names, numbers = subject.images.class_names, {name: k for k, name in enumerate(other.images.class_names)}
    groups = {group: [numbers[names[k]] for k in classes] for group, classes in groups.items()}
    indices = chosen_images(other)
    loader = other.loader(indices)
    return measure(other, create_probe(other, indices, groups), loader)


def figures(
    subject: Subject,
    report: CollapseReport,
    sample: tuple[np.ndarray, np.ndarray] | None,
    groups: Groups,
    compared: CollapseReport | None = None,
) -> dict[str, Drawing]:
    """Figures of what was measured, by name, yet to be drawn; none of what was not."""
    order, title = "group" if groups else "frequency", subject.title
    names: Sequence[str] = subject.images.class_names
    grams: dict[str, Any] = {"order": order, "class_names": names, "title": f"{title}: cosines between classes"}
    found: dict[str, Drawing] = {"gram": partial(plot_grams, report, **grams)}
    if len(report.classes) > 1:
        found["angles"] = partial(plot_angles, report, title=f"{title}: angles between classes")
    found["classes"] = partial(plot_classes, report, class_names=names, title=f"{title}: classes by frequency")
    if compared is not None:
        labels = subject.name, subject.args.compare
        found["compare"] = partial(plot_compare, report, compared, labels=labels, title=f"{title}, beside another")
    if report.layers:
        found["depth"] = partial(plot_depth, report, title=f"{title}: collapse against depth")
    if report.iterates:
        found["iterates"] = partial(plot_iterates, report, title=f"{title}: collapse as the solver goes on")
    if sample is not None and len(sample[0]) > 3:
        named: dict[str, Any] = {"groups": groups, "class_names": names, "seed": subject.config.seed}
        found["tsne"] = partial(tsne_figure, *sample, **named, title=f"{title}: t-SNE of {len(sample[0])} features")
    return found
