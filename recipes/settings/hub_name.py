"""Names of repositories and revisions on the Hub, which become parts of URLs and paths in its cache."""

import re
from typing import NamedTuple

from recipes.errors import check

PREFIX = "hf-hub:"


class HubName(NamedTuple):
    """A repository, and a branch, tag or commit of it; its latest commit if None."""

    repo: str
    revision: str | None = None


def is_hub_name(word: str) -> bool:
    return word.startswith(PREFIX)


def parse_hub_name(word: str, *, setting: str = "model") -> HubName:
    """Read `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION`.

    Args:
        word: what the setting says.
        setting: named by errors.

    Raises:
        UserError: not such a name.
    """
    repo, at, revision = word.removeprefix(PREFIX).partition("@")
    allowed = f"{PREFIX}ORG/NAME, or {PREFIX}ORG/NAME@REVISION"
    check(is_hub_name(word) and _is_repo(repo), setting, word, allowed)
    check(not at or _is_revision(revision), setting, word, allowed)
    return HubName(repo, revision or None)


def check_destination(repo: str, revision: str | None = None, *, setting: str = "push_to_hub") -> None:
    """Refuse a repository or branch that cannot be pushed to, by their names.

    Raises:
        UserError: not ORG/NAME, or characters and lengths that the Hub does not have.
    """
    allowed = "ORG/NAME, of letters, digits, '-', '_' and '.', at most 96 characters"
    check(_is_repo(repo) and "/" in repo and len(repo) <= 96, setting, repo, allowed)
    branch = revision is None or (_is_revision(revision) and not revision.startswith("refs/"))
    check(branch, "revision", revision, "the name of a branch")


def check_license(license: str) -> None:
    """Refuse a license that cannot be one of the Hub's identifiers.

    Raises:
        UserError: it cannot.
    """
    allowed = "an identifier of the Hub such as apache-2.0, mit or other"
    check(bool(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license)), "license", license, allowed)


def _is_repo(name: str) -> bool:
    """Whether the Hub may have a repository of that name; the rules of `huggingface_hub.utils.validate_repo_id`."""
    parts = name.split("/")
    word = re.compile(r"\w([\w.-]{0,94}\w)?", re.ASCII)
    plain = len(parts) <= 2 and all(word.fullmatch(part) for part in parts)
    return plain and "--" not in name and ".." not in name and not name.endswith(".git")


def _is_revision(name: str) -> bool:
    """Whether git may have a branch, tag or commit of that name; stricter, as it becomes a path."""
    parts = name.split("/")
    word = re.compile(r"\w[\w.+-]*", re.ASCII)
    return len(name) <= 200 and ".." not in name and all(word.fullmatch(p) and not p.endswith(".lock") for p in parts)
