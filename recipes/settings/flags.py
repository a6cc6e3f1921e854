"""Flags of the commands that look at a trained model."""

import argparse
import os
from collections.abc import Callable
from typing import Any, NoReturn

from recipes.errors import UserError

IMAGE_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "dataset": (os.path.expanduser, "'digits' (embedded), a folder, or a Hub dataset id"),
    "dataset_config": (str, "configuration name of a Hub dataset"),
    "dataset_revision": (str, "commit, tag or branch of a Hub dataset"),
    "image_column": (str, "column of the images; found by its type if not given"),
    "label_column": (str, "column of the classes, or FIELD.OF.RECORDS; found by its name and type if not given"),
    "skip_corrupt": (int, "images that may be left out, and are listed, because they cannot be decoded"),
    "img_size": (int, "height and width of the model's input in pixels; the model's own if not given"),
    "eval_batch_size": (int, "images of one forward pass, on each rank"),
    "workers": (int, "processes per rank that decode images; chosen by the size of the set if not given"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is a UserError, like that of everything else."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; allowed: what --help lists")

    def add_model(self) -> None:
        """Add the model, --pretrained and --output."""
        model = "run folder of recipes/train.py, timm name, local-dir:FOLDER, hf-hub:ORG/NAME[@REVISION]"
        pretrained = "load the weights that timm has for a name, not random ones"
        self.add_argument("model", metavar="MODEL", type=os.path.expanduser, help=model)
        self.add_argument("--pretrained", action="store_true", help=pretrained)
        self.add_argument(
            "--output", type=os.path.expanduser, help="folder to create; one that exists is never touched"
        )

    def add_images(self) -> None:
        """Add the flags IMAGE_FLAGS; those that are not given are not in the result."""
        group = self.add_argument_group("images", "for a run folder those of the run, else as in recipes/train.py")
        for name, (kind, text) in IMAGE_FLAGS.items():
            group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
