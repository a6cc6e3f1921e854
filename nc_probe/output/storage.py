"""Reports in JSON, of which all comes back: what is absent, what is infinite, and matrices to the last bit."""

import base64
import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_origin

import torch
from torch import Tensor

__all__ = ["decode", "encode", "replace_text"]


def encode(value: Any) -> Any:
    """Make what JSON can hold: None for NaN, "inf" for what is infinite, the float64 of a tensor in base 64."""
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Tensor):
        raw = value.double().contiguous().cpu().numpy().astype("<f8").tobytes()
        return {"shape": list(value.shape), "float64": base64.b64encode(raw).decode()}
    if isinstance(value, Mapping):
        return {name: encode(v) for name, v in value.items()}
    if isinstance(value, tuple):
        return [encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def decode(cls: Any, values: Mapping[str, Any]) -> Any:
    """Make a report of what `encode` made of one, whose fields are known by their types.

    Raises:
        KeyError, TypeError, AttributeError, ValueError, RuntimeError: it is not what `encode` makes.
    """
    out: dict[str, Any] = {}
    for f in fields(cls):
        value, kind = values.get(f.name, ...), cast(Any, f.type)
        if value is ...:
            continue
        if f.name in ("groups", "heads", "layers", "iterates"):
            out[f.name] = {name: decode(cls, report) for name, report in value.items()}
        elif f.name == "conventions":
            out[f.name] = {paper: {k: _real(v) for k, v in found.items()} for paper, found in value.items()}
        elif f.name in ("means", "weight"):
            out[f.name] = None if value is None else _matrix(value)
        elif isinstance(value, list) != (get_origin(kind) is tuple):
            raise TypeError(f"{f.name} must {'' if isinstance(value, list) else 'not '}be one number, got {value!r}")
        elif isinstance(value, list):
            out[f.name] = tuple(v if isinstance(v, int) else _real(v) for v in value)
        elif kind is float:
            out[f.name] = _real(value)
        elif isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{f.name} must be {kind}, got {value!r}")
        else:
            out[f.name] = value
    return cls(**out)


def replace_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, or leave the one that was there: where the disk is full, or the process is killed."""
    path = path.resolve()  # where a link points to
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _matrix(value: Mapping[str, Any]) -> Tensor:
    raw = bytearray(base64.b64decode(value["float64"]))
    return (
        torch.frombuffer(raw, dtype=torch.float64).view(value["shape"]) if raw else torch.zeros(value["shape"]).double()
    )


def _real(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
