"""A trained model and the images that it is shown, for the commands that look at one."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from timm.data.model_config import resolve_input_data_config
from torch.utils.data import DataLoader

from recipes.errors import UserError, user_errors
from recipes.images.sources import ImageSplit, load_splits, open_dataset
from recipes.images.views import ImageView, eval_loader, eval_transform
from recipes.settings.config import TrainConfig
from recipes.settings.flags import IMAGE_FLAGS
from recipes.training.checkpoint import create_model, load_run, read_config, to_json, whole_folder, write_text
from recipes.training.download import run_folder
from recipes.training.manifest import Manifest


class Subject:
    """A model, the settings it was trained with, and a split of images.

    Args:
        args: flags of `recipes.settings.flags.Parser`.
        split: name of the split; that which the model was trained on if None.

    Attributes:
        config: settings of the run, or the defaults, with the flags that are given.
        manifest, folder: of the run, which may come from the Hub; None for a model that is no run.
        images: the split.
        net: after `load_model`: the model, on its device.

    Raises:
        UserError: a setting out of its range, a folder that is not that of a run with a checkpoint, or no such data
            set, split or column.
    """

    net: Any

    def __init__(self, args: argparse.Namespace, split: str | None):
        self.args, self.name = args, args.model
        self.config, self.manifest, self.folder = read_settings(args)
        self.split = split or self.config.train_split
        self.accelerator = Accelerator()
        with self.accelerator.main_process_first(), user_errors():
            self.images = open_split(self.config, self.split)

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
        net = open_model(self.config, self.folder, self.num_classes)
        if not classifier:
            net.reset_classifier(0)
        hint = ", or --no-classifier" if "no_classifier" in self.args else ""
        if net.num_classes not in (0, self.num_classes) or (classifier and net.num_classes == 0):
            raise UserError(
                f"model {self.name!r} knows {net.num_classes} classes; allowed: a model of {self.num_classes}, "
                f"as data set {self.config.dataset!r} has{hint}"
            )
        self.net = net.to(self.accelerator.device).eval()
        return self.net

    def loader(self, indices: np.ndarray) -> DataLoader:
        """Batches of this rank of some rows of the split, every image once over all ranks; needs the model."""
        data_config = resolve_input_data_config(self.net, self.config.only("img_size"))
        with user_errors():
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
        return TrainConfig(output=".", model=args.model, pretrained=pretrained, **given), None, None
    config = read_config(folder)
    return replace(config, model=args.model, **given), Manifest.load(folder / "manifest.json"), folder


def open_model(config: TrainConfig, folder: Path | None, num_classes: int) -> Any:
    """Load the model of a run, whose folder is given, or create one of timm: of `num_classes` if its weights are
    random."""
    if folder is not None:
        return load_run(folder)
    return create_model(config, None if config.pretrained else num_classes)


def open_split(config: TrainConfig, name: str) -> ImageSplit:
    """Open a split. Its classes are those of the train split, or its own where there is no train split.

    Raises:
        UserError: there is no such data set, split or column, or the classes do not fit.
    """
    splits = open_dataset(config.dataset, config.dataset_config, config.dataset_revision)
    if name not in splits:
        raise UserError(f"split {name!r} is not in the data set; allowed: {', '.join(map(repr, splits))}")
    # Two names, because the train split itself may be the one to look at.
    pair = {"classes": splits.get(config.train_split, splits[name]), name: splits[name]}
    columns = config.only("image_column", "label_column")
    return load_splits(pair, train_split="classes", test_split=name, **columns)[1]


def save_results(folder: Path, name: str, results: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    """Write results as JSON, and figures; the folder is complete or absent.

    Args:
        name: of the JSON file.
    """
    with whole_folder(folder) as draft:
        write_text(draft / name, to_json(results, indent=2))
        for figure_name, figure in figures.items():
            figure.savefig(draft / f"{figure_name}.png", dpi=150)
