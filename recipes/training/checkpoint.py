"""Models and files of a run.

Every file and every folder is complete or absent: it is written under another name in the same folder, flushed to the
disk, then renamed.
"""

import inspect
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from recipes.errors import UserError, check, did_you_mean, user_errors
from recipes.imbalance.classifiers import RowScales, fold, replace_classifier
from recipes.settings.config import TrainConfig, parse
from recipes.settings.contradictions import SCALE
from recipes.settings.hub_name import is_hub_name
from recipes.training.download import fetch


def create_model(config: TrainConfig, num_classes: int | None) -> Any:
    """Create the model of a configuration, its classifier included, with as many classes as it was trained for if
    `num_classes` is None.

    Raises:
        UserError: an unknown name, arguments that the model does not take, weights that cannot be had, or a trained
            model of other classes.
    """
    folder = Path(config.model)
    trained = config.stage is not None  # a classifier that is to be kept, or initialised again at the same size
    kept = False
    if (folder / "config.yaml").is_file():
        before = read_config(folder)
        had, wanted = ((each.classifier, each.classifier_scale or SCALE) for each in (before, config))
        kept = had == wanted
        check(kept or before.classifier == "linear", "classifier", wanted, f"{had}, as of model {config.model!r}")
        net, trained = load_run(folder, config.model_args), True
    else:
        classes = None if trained else num_classes
        pretrained = config.pretrained or trained or is_hub_name(config.model)
        net = _timm_model(config.model, pretrained, classes, config.model_args)
    if trained and num_classes not in (None, net.num_classes):
        raise UserError(
            f"model {config.model!r} knows {net.num_classes} classes; allowed: a model of {num_classes}, as data set "
            f"{config.dataset!r} has"
        )
    if config.classifier != "linear" and not kept:
        replace_classifier(net, config.classifier, scale=config.classifier_scale or SCALE, seed=config.seed)
    return net


def load_run(folder: Path, model_args: Mapping[str, Any] | None = None) -> Any:
    """Load the model that a run has saved, whose last layer may be one that timm does not know.

    Raises:
        UserError: the folder is not that of a run with a checkpoint, or arguments that the model does not take.
    """
    config = read_config(folder)
    saved, plain = _saved_model(folder), config.classifier == "linear"
    net = _timm_model(f"local-dir:{saved}", plain, None, model_args or {})
    if not plain:
        replace_classifier(net, config.classifier, scale=config.classifier_scale or SCALE, seed=config.seed)
        with user_errors(SafetensorError, what=f"model {str(folder)!r} cannot be read: "):
            net.load_state_dict(load_file(saved / "model.safetensors"))
    return net


def saved_class_names(model: str) -> list[str] | None:
    """Return the names of the classes of a model in the order of its outputs, where its folder or its repository of the
    Hub stores them; None of other models."""
    folder = fetch(model) if is_hub_name(model) else Path(model.removeprefix("local-dir:"))
    for path in (folder / "checkpoint" / "config.json", folder / "config.json"):
        try:
            names = json.loads(path.read_text(encoding="utf-8")).get("label_names")
        except (OSError, ValueError, AttributeError):  # what is wrong with it is told when the model is loaded
            continue
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    return None


def read_config(folder: Path) -> TrainConfig:
    """Read the settings of a run that has saved a model.

    Raises:
        UserError: the folder is not that of such a run.
    """
    for part in ("config.yaml", "manifest.json", "checkpoint"):
        if not (_saved_model(folder) if part == "checkpoint" else folder / part).exists():
            raise UserError(f"model {str(folder)!r} has no {part}; allowed: a folder in which recipes/train.py has run")
    return parse(["--config", str(folder / "config.yaml")])


def _saved_model(folder: Path) -> Path:
    """The folder of a run's model: that of a run that has been pushed lies beside its settings."""
    return folder if (folder / "model.safetensors").is_file() else folder / "checkpoint"


def _timm_model(name: str, pretrained: bool, num_classes: int | None, model_args: Mapping[str, Any]) -> Any:
    if ":" not in name and not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise UserError(f"model {name!r} is unknown{hint}; allowed: what timm.list_models() gives")
    source = f"local-dir:{fetch(name)}" if is_hub_name(name) else name
    try:
        return timm.create_model(source, pretrained=pretrained, num_classes=num_classes, **model_args)
    except Exception as error:  # of whatever class the model's own code, timm, safetensors or the Hub raise
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            hint = did_you_mean(unknown[1], _arguments(name))
            raise UserError(f"model {name!r} has no argument {unknown[1]!r}{hint} in model_args") from error
        reason = str(error) or type(error).__name__
        raise UserError(f"model {name!r} cannot be built with model_args {dict(model_args)}: {reason}") from error


def _arguments(name: str) -> list[str]:
    """List the arguments of whatever the module of a timm model defines or imports, to find a mistyped one among."""
    if not timm.is_model(name):
        return []
    found: set[str] = set()
    for value in vars(sys.modules[timm.model_entrypoint(name).__module__]).values():
        with suppress(TypeError, ValueError):  # no callable, or one without a signature
            found |= set(inspect.signature(value).parameters)
    return sorted(found)


def new_folder(output: str) -> Path:
    """Return the path of a folder to create.

    Raises:
        UserError: there is something already.
    """
    if os.path.lexists(output):
        raise UserError(f"output {output!r} exists; allowed: a folder that does not")
    return Path(output)


def draft_of(path: Path) -> Path:
    """Return the path at which a file or folder is written before it is renamed."""
    return path.with_name(f".{path.name}.draft")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `folder` when the block ends well and is removed when it does not."""
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        publish(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def publish(draft: Path, folder: Path) -> None:
    """Rename a folder into its place, with all that it holds on the disk before, and its name afterwards."""
    for path in (*draft.rglob("*"), draft):
        sync(path)
    os.rename(draft, folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder, which is gone at once for those who know it by its name."""
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    os.rename(folder, draft)
    shutil.rmtree(draft, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically, replacing the one that is there."""
    path = Path(path)
    draft = draft_of(path)
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file. It may be cut short, or be there too early: a run that is resumed rewrites the file."""
    with path.open("a") as file:
        file.write(line + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full, or something else is wrong with it.
    """
    with disk_errors(path):
        save_file(dict(tensors), path)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what safetensors reports of the disk as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON of nested dicts and lists, with null for numbers that are not finite, which JSON does not have."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_checkpoint(
    model: nn.Module, folder: str | Path, *, data_config: dict[str, Any], class_names: Sequence[str] | None = None
) -> None:
    """Write a model so that `timm.create_model("local-dir:FOLDER", pretrained=True)` gives it back.

    A second call replaces the first's files. As only the weights change within a run, and a rename is atomic, the
    folder can be read at any moment. The factors of learnable weight scaling are folded in.

    Args:
        model: a timm model.
        folder: holds `config.json` and `model.safetensors` afterwards.
        data_config: preprocessing of its images, as `timm.data` resolves it.
        class_names: names of the classes, stored with the model.
    """
    folder = Path(folder)
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    if any(isinstance(module, RowScales) for module in model.modules()):
        model = fold(deepcopy(model))
    model_config = {"label_names": list(class_names)} if class_names is not None else None
    try:
        with disk_errors(folder):
            save_for_hf(model, str(draft), model_config=model_config, safe_serialization=True, data_config=data_config)
        # timm stores num_classes at the root, and as an argument of the model too, which transformers' TimmWrapper then
        # gets twice.
        config = json.loads((draft / "config.json").read_text())
        config.get("model_args", {}).pop("num_classes", None)
        write_text(draft / "config.json", json.dumps(config, indent=2))
        if not folder.exists():
            return publish(draft, folder)
        for name in ("config.json", "model.safetensors"):
            sync(draft / name)
            os.replace(draft / name, folder / name)
        sync(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
