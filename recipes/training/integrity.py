"""Checksums of a training state, so that a damaged one is never resumed from."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Add checksums to the content of `state.json`: of the files of its folder, and of the content itself.

    Args:
        folder: with all files of the state but `state.json`.
    """
    files = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    sealed = json.loads(json.dumps({**content, "files": files}))  # as it will be read
    return {**sealed, "sha256": _content_hash(sealed)}


def find_damage(content: Mapping[str, Any], folder: Path) -> str | None:
    """Return what is wrong with a state, if anything is; one of an earlier version has no checksums, and is trusted.

    Args:
        content: of its `state.json`.
        folder: of the state.
    """
    if "sha256" not in content:
        return None
    if content["sha256"] != _content_hash({key: value for key, value in content.items() if key != "sha256"}):
        return "state.json was changed"
    for name, expected in content["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_hash(folder / name) != expected:
            return f"{name} was changed"
    return None


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
