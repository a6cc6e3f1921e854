"""Models, and what a run leaves on disk.

Every file is complete or absent: it is written beside its place, then renamed into it.
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import nn

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


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically, replacing the one that is there."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


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
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    model_config = {"label_names": list(class_names)} if class_names is not None else None
    save_for_hf(model, str(draft), model_config=model_config, safe_serialization=True, data_config=data_config)
    # timm stores num_classes at the root, and as an argument of the model too, which transformers' TimmWrapper then
    # gets twice.
    config = json.loads((draft / "config.json").read_text())
    config.get("model_args", {}).pop("num_classes", None)
    write_text(draft / "config.json", json.dumps(config, indent=2))
    for path in draft.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if not folder.exists():
        os.rename(draft, folder)
        return
    for name in ("config.json", "model.safetensors"):
        os.replace(draft / name, folder / name)
    shutil.rmtree(draft)
