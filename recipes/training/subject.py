"""A trained model and the images that it is shown, for the commands that look at one."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from timm.data.model_config import resolve_input_data_config
from torch.utils.data import DataLoader

from recipes.errors import UserError, user_errors
from recipes.images.labels import shorten
from recipes.images.sources import CorruptImageError, ImageSplit, find_columns, load_split, open_dataset
from recipes.images.views import ImageView, eval_loader, eval_transform, find_corrupt
from recipes.results.figures import Drawing, save_figures
from recipes.settings.config import TrainConfig
from recipes.settings.flags import IMAGE_FLAGS
from recipes.training.checkpoint import (
    create_model,
    load_run,
    read_config,
    saved_class_names,
    to_json,
    whole_folder,
    write_text,
)
from recipes.training.download import run_folder
from recipes.training.manifest import Manifest
from recipes.training.sharding import start_accelerator


class Subject:
    """A model, the settings it was trained with, and a split of images.

    Args:
        args: flags of `recipes.settings.flags.Parser`.
        split: name of the split; that which the model was trained on if None.

    Attributes:
        config: settings of the run, or the defaults, with the flags that are given.
        manifest, folder: of the run, which may come from the Hub; None for a model that is no run.
        images: the split; its classes are numbered as the outputs of the model, where it stores their names.
        rows: rows of it that make up the split that was asked for.
        net: after `load_model`: the model, on its device.

    Raises:
        UserError: a setting out of its range, a folder that is not that of a run with a checkpoint, or no such data
            set, split or column.
    """

    net: Any

    def __init__(self, args: argparse.Namespace, split: str | None):
        self.args, self.name = args, args.model
        self.config, self.manifest, self.folder = read_settings(args)
        self.model_args: dict[str, Any] = getattr(args, "model_args", {})
        self.split = split or self.config.train_split
        self.accelerator = start_accelerator()
        other = "dataset" in args and getattr(args, "no_classifier", False)  # whose classes the model need not know
        self.known = None if other or self.manifest is None else saved_class_names(self.name)
        with self.accelerator.main_process_first(), user_errors():
            self.images, self.rows = open_split(self.config, self.split, self.manifest, self.known)

    @property
    def num_classes(self) -> int:
        return len(self.images.class_names)

    @property
    def title(self) -> str:
        """The model and the images in words, for the head of a figure."""
        return f"{self.net.pretrained_cfg['architecture']} on {self.config.dataset}, split {self.split}"

    def load_model(self, *, classifier: bool = True) -> Any:
        """Load the model, whose random weights, if it has any, are the same on every rank.

        Args:
            classifier: keep the classifier, which must know the classes of the images.

        Raises:
            UserError: a model that cannot be loaded, or one of other classes.
        """
        set_seed(self.config.seed)
        net = open_model(self.config, self.folder, self.num_classes, self.model_args)
        if not classifier:
            net.reset_classifier(0)
        elif self.known is None:
            self._match_names(net.pretrained_cfg.get("label_names"), net.num_classes)
        hint = ", or --no-classifier" if "no_classifier" in self.args else ""
        if net.num_classes not in (0, self.num_classes) or (classifier and net.num_classes == 0):
            raise UserError(
                f"model {self.name!r} knows {net.num_classes} classes; allowed: a model of {self.num_classes}, "
                f"as data set {self.config.dataset!r} has{hint}"
            )
        self.net = net.to(self.accelerator.device).eval()
        return self.net

    def _match_names(self, names: Any, outputs: int) -> None:
        """Number the classes of the images as those of a model of the Hub or of timm, by their names if it has some.

        Raises:
            UserError: the model knows some of the names, and not others.
        """
        images = self.images
        occurring = {images.class_names[k] for k in np.unique(images.labels)}
        if isinstance(names, list | tuple) and len(names) == outputs and occurring & set(names):
            self.images = images.renumbered(list(names), f"model {self.name!r}")
        elif self.config.pretrained:
            self.accelerator.print("note: the model does not store these names of classes, which are taken by number")

    @torch.no_grad()
    def _try_forward(self, size: tuple[int, ...]) -> None:
        """Show one black image (C, H, W) to the model.

        Raises:
            UserError: the model does not take images of this size.
        """
        image = torch.zeros(1, *size, device=self.accelerator.device)
        with user_errors(Exception, what=f"model {self.name!r} fails on an image of {' x '.join(map(str, size))}: "):
            with self.accelerator.autocast():
                self.net(image)

    def usable(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the split that can be decoded, where `skip_corrupt` allows others, which are listed.

        Raises:
            CorruptImageError: there are too many others.
        """
        most = self.config.skip_corrupt
        if not most:
            return rows
        sharing = {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes}
        corrupt = find_corrupt(self.images, rows, workers=self.config.workers, most=most, **sharing)
        if len(corrupt) > most:
            raise CorruptImageError(f"skip_corrupt is {most}, and there are more: {'; '.join(corrupt.values())}")
        for message in corrupt.values():
            self.accelerator.print(f"skipped: {message}")
        return np.setdiff1d(rows, [*corrupt])

    def loader(self, indices: np.ndarray) -> DataLoader:
        """Batches of this rank of some rows of the split, every image once over all ranks; needs the model."""
        size = getattr(self.args, "img_size", self.model_args.get("img_size", self.config.img_size))
        with user_errors():
            data_config = resolve_input_data_config(self.net, {"img_size": size})
            self._try_forward(data_config["input_size"])
            channels = data_config["input_size"][0]
            view = ImageView(self.images, indices, eval_transform(data_config), channels=channels)
        return eval_loader(
            view,
            batch_size=self.config.eval_batch_size,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )


def read_settings(args: argparse.Namespace) -> tuple[TrainConfig, Manifest | None, Path | None]:
    """Read the settings of the model and its images, checked as those of training are, and the manifest and the folder
    of a run.

    Raises:
        UserError: a setting out of its range, or a folder that is not that of a run with a checkpoint.
    """
    given = {name: value for name, value in vars(args).items() if name in IMAGE_FLAGS}
    folder = run_folder(args.model)
    if folder is None:
        pretrained = args.pretrained or ":" in args.model
        given["model_args"] = getattr(args, "model_args", {})
        return TrainConfig(output=".", model=args.model, pretrained=pretrained, **given), None, None
    config = read_config(folder)
    return replace(config, model=args.model, **given), Manifest.load(folder / "manifest.json"), folder


def open_model(config: TrainConfig, folder: Path | None, num_classes: int, model_args: Mapping[str, Any]) -> Any:
    """Load the model of a run, whose folder is given, with some other arguments; or create one of timm, of
    `num_classes` if its weights are random."""
    if folder is not None:
        return load_run(folder, model_args)
    return create_model(config, None if config.pretrained else num_classes)


def open_split(
    config: TrainConfig, name: str, manifest: Manifest | None = None, known: Sequence[str] | None = None
) -> tuple[ImageSplit, np.ndarray]:
    """Open a split, of which the rows are those that a run has taken from its train split, or all.

    Args:
        manifest: of the run, if the model is one.
        known: names of the classes of the model; if not given, the classes are those of the train split, or those of
            the split itself where there is no train split.

    Raises:
        UserError: there is no such data set, split or column, or the classes do not fit.
    """
    splits = open_dataset(config.dataset, config.dataset_config, config.dataset_revision)
    columns: dict[str, Any] = config.only("image_column", "label_column")
    carved = name == config.test_split and manifest is not None and manifest.test is not None and name not in splits
    source = config.train_split if carved else name
    if source not in splits:
        raise UserError(f"split {source!r} is not in the data set; allowed: {shorten([*splits])}")
    reference = config.train_split if config.train_split in splits else source
    columns = dict(zip(columns, find_columns(splits, reference, **columns), strict=True))
    if known is None and reference != source:
        known = load_split(splits, reference, declared=True, **columns).class_names
    images = load_split(splits, source, class_names=known, whose=f"model {config.model!r}", declared=True, **columns)
    if not carved or manifest is None:
        return images, np.arange(len(images.labels))
    if manifest.fingerprint != images.fingerprint:
        raise UserError(
            f"split {source!r} of data set {config.dataset!r} is not what {name!r} was taken from; allowed: the same "
            "images, or a split that is there"
        )
    return images, np.array(manifest.test, dtype=np.int64)


def save_results(
    folder: Path, name: str, results: Mapping[str, Any], figures: Mapping[str, Drawing], *, format: str = "png"
) -> None:
    """Write results as JSON into a folder, which is complete or absent, then draw figures beside them.

    Args:
        name: of the JSON file.
        format: of the figures.
    """
    with whole_folder(folder) as draft:
        write_text(draft / name, to_json(results, indent=2))
    save_figures(folder, figures, format=format)
