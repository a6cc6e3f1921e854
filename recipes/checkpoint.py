"""Models, and what a run leaves on disk.

Every file and every folder is complete or absent: it is written beside its place, flushed to the disk, then renamed
into it.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from recipes.config import TrainConfig, nearest


def create_model(config: TrainConfig, num_classes: int | None) -> nn.Module:
    """The timm model of a configuration, with as many classes as it was trained for if `num_classes` is None.

    Raises:
        ValueError: an unknown name, arguments that the model does not take, or weights that cannot be had.
    """
    if ":" not in config.model and not timm.is_model(config.model):
        hint = nearest(config.model, timm.list_models())
        raise ValueError(f"model {config.model!r} is unknown{hint}; allowed: what timm.list_models() gives")
    try:
        return timm.create_model(
            config.model, pretrained=config.pretrained, num_classes=num_classes, **config.model_args
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise ValueError(
            f"model {config.model!r} cannot be built with model_args {config.model_args}: {error}"
        ) from error


def new_folder(output: str) -> Path:
    """The path of a folder to create.

    Raises:
        ValueError: there is something already.
    """
    if os.path.lexists(output):
        raise ValueError(f"output {output!r} exists; allowed: a folder that does not")
    return Path(output)


def draft_of(path: Path) -> Path:
    """Where a file or folder is written before it is renamed."""
    return path.with_name(f".{path.name}.draft")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `folder` when the block ends well and is removed when it does not."""
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
    """Add a line to a file. It may be cut short, or be there too early: a run that is resumed writes the file anew."""
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
    """What safetensors says about a disk, as the OSError that it is."""
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
    folder can be read at any moment.

    Args:
        model: a timm model.
        folder: holds `config.json` and `model.safetensors` afterwards.
        data_config: preprocessing of its images, as `timm.data` resolves it.
        class_names: names of the classes, stored with the model.
    """
    folder = Path(folder)
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
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
