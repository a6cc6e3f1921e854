"""Flags of the commands that look at a trained model."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import yaml

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

    def add_model_args(self) -> None:
        """Add --model_args.NAME VALUE, which `read_args` takes."""
        text = "an argument of the model, as in recipes/train.py: --model_args.img_size 64"
        self.add_argument("--model_args.NAME", dest="model_args", metavar="VALUE", help=text)

    def read_args(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Read a command line in which there may be --model_args.NAME VALUE.

        Raises:
            UserError: an unknown flag, or a value of the wrong type.
        """
        words, rest, found = list(sys.argv[1:] if argv is None else argv), [], {}
        while words:
            word = words.pop(0)
            flag, given, value = word.partition("=")
            prefix, _, name = flag.partition(".")
            if prefix != "--model_args":
                rest.append(word)
            elif not name or not (given or words):
                self.error(f"{flag} must be --model_args.NAME VALUE")
            else:
                found[name] = _value(flag, value if given else words.pop(0))
        args = self.parse_args(rest)
        args.model_args = found
        return args

    def add_images(self) -> None:
        """Add the flags IMAGE_FLAGS; those that are not given are not in the result."""
        group = self.add_argument_group("images", "for a run folder those of the run, else as in recipes/train.py")
        for name, (kind, text) in IMAGE_FLAGS.items():
            group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)


def _value(flag: str, text: str) -> Any:
    """Read a value as YAML does, and 1e-3 as a number, which YAML 1.1 does not.

    Raises:
        UserError: it is not YAML.
    """
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise UserError(f"{flag} is {text!r}; allowed: a value in YAML") from error
    except ValueError:
        return text
