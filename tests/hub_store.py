"""What the loopback Hub of hub_server.py keeps: users, repositories, commits and files."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class User(NamedTuple):
    """The owner of a token: `role` is that of the token, `orgs` the user's roles by organisation."""

    name: str
    orgs: dict[str, str] = {}
    role: str = "write"


class File(NamedTuple):
    """A file of a commit: `sha256` is that of the stored object if it is an LFS file."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        """Git's name of the blob, which for an LFS file is that of its pointer."""
        blob = self.content
        if self.sha256 is not None:
            blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(blob)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


class Commit(NamedTuple):
    oid: str
    parent: str | None
    title: str
    changed: tuple[str, ...]
    files: dict[str, File]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        before = self.commits[parent].files if parent else {}
        changed = tuple(sorted(path for path in {*before, *files} if before.get(path) != files.get(path)))
        oid = hashlib.sha1(repr((len(self.commits), branch, title, changed)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, changed, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits from the latest to the first, without the one that creates the repository."""
        found, commit = [], self.find(revision)
        while commit is not None and commit.parent is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent)
        return found


class Refusal(Exception):
    """An answer that is not a success."""

    def __init__(self, code: int, message: str, error_code: str = "", **body: Any):
        super().__init__(message)
        self.code, self.body = code, {"error": message, **body}
        self.headers = {"X-Error-Message": " ".join(message.split())} | (
            {"X-Error-Code": error_code} if error_code else {}
        )


def card_errors(data: Any) -> list[str]:
    """Mistakes in the metadata of a model card, by the rules of docs/hub/model-cards."""
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    errors = []
    if not re.fullmatch(r"[a-z0-9.\-]+", str(data.get("license", "other"))):
        errors.append('"license" must be one of the identifiers of the Hub')
    for name in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    ids = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
    for name in ("datasets", "base_model"):
        listed = data.get(name, [])
        for value in listed if isinstance(listed, list) else [listed]:
            if not ids.fullmatch(str(value)):
                errors.append(f'"{name}" must be the id of a repository, got {value!r}')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[].name" must be a string')
        for result in model["results"]:
            for path in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance(result.get(path[0], {}).get(path[1]), str):
                    errors.append(f'"model-index[].results[].{".".join(path)}" must be a string')
            for metric in result.get("metrics", [{}]):
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float | str):
                    errors.append('"model-index[].results[].metrics[]" must have a type and a value')
    return errors
