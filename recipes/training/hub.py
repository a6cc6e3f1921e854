"""A finished run on the Hub: one commit that holds the model, its card and the evidence, or none."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

from recipes.errors import NotPushedError, UserError, check
from recipes.settings.config import TrainConfig
from recipes.settings.hub_name import check_destination
from recipes.training import hub_client
from recipes.training.bundle import collect
from recipes.training.hub_client import check_token, patiently


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a run is pushed to, and what may happen there.

    Attributes:
        repo: ORG/NAME.
        revision: branch; it is created if it is not there, and main if None.
        private: whether the repository, which is created if it is not there, is for its owners alone.
        overwrite: whether the model of another architecture may be replaced.
    """

    repo: str
    revision: str | None = None
    private: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_destination(self.repo, self.revision)

    def __str__(self) -> str:
        return f"hf-hub:{self.repo}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Pushed:
    """Where a run is on the Hub; `changed` is False if it had been there already."""

    destination: Destination
    url: str
    changed: bool

    def __str__(self) -> str:
        state = "pushed" if self.changed else "had been pushed, nothing has changed"
        return f"{self.destination} ({state}: {self.url})"


def prepare(destination: Destination, architecture: str, *, waits: tuple[float, ...] = (1.0, 4.0)) -> None:
    """Make sure that a model can be pushed, before hours are spent on it: the token, its rights, the network, and what
    the repository holds. Creates the repository and the branch where they are not there.

    Raises:
        HubError: it cannot be pushed.
        UserError: the repository is public and a private one is asked for, or it holds another architecture.
    """
    check_token(f"push_to_hub {destination.repo!r}")
    api, branch = HfApi(token=True), destination.revision

    def ask() -> None:
        try:
            info = api.model_info(destination.repo, timeout=hub_client.TIMEOUT)
        except RepositoryNotFoundError:
            api.create_repo(destination.repo, private=destination.private or None)
        else:
            api.auth_check(destination.repo, write=True)
            check(
                bool(info.private) or not destination.private,
                "private",
                True,
                f"not given for {destination.repo!r}, which is public",
            )
        if branch is not None:
            api.create_branch(destination.repo, branch=branch, exist_ok=True)
        _check_architecture(api, destination, architecture, branch)

    patiently(ask, _about(destination), waits=waits)


def push(
    folder: Path,
    destination: Destination,
    *,
    message: str | None = None,
    states: bool = False,
    evaluation: Path | None = None,
    license: str | None = None,
    twin: str | None = None,
) -> Pushed:
    """Push a finished run in one commit. What the repository has already is not sent again, and where it has everything
    there is no commit.

    Args:
        folder: of the run.
        message: title of the commit.
        states: whether the checkpoints for `--resume` go with it.
        evaluation: output of recipes/evaluate.py on the run's test split, whose curve and pictures go with it.
        license: of the weights, as the Hub names it; apache-2.0 if None.
        twin: repository of the run's twin, for the card.

    Raises:
        HubError: it cannot be pushed; the repository is as it was.
        UserError: the folder is not that of a finished run of a model that timm can build, or a card that says what
            the Hub does not know.
    """
    files = collect(folder, destination.repo, states=states, evaluation=evaluation, license=license, twin=twin)
    architecture = json.loads(files["config.json"])["architecture"]
    prepare(destination, architecture, waits=hub_client.WAITS)
    api, first = HfApi(token=True), ""

    def commit() -> Any:
        nonlocal first
        head = api.model_info(destination.repo, revision=destination.revision, timeout=hub_client.TIMEOUT)
        assert head.sha is not None
        first = first or head.sha
        _check_architecture(api, destination, architecture, head.sha)
        present = {sibling.rfilename for sibling in head.siblings or ()}
        owned = ("figures/", "states/") if states else ("figures/",)
        stale = [path for path in present if path.startswith(owned) and path not in files]
        return api.create_commit(
            destination.repo,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in sorted(stale)),
            ],
            commit_message=message or f"Add the run {folder.resolve().name}",
            revision=destination.revision,
            parent_commit=head.sha,
        )

    made = patiently(commit, _about(destination))
    return Pushed(destination, made.commit_url, made.oid != first)


def destination_of(config: TrainConfig) -> Destination | None:
    """Where a run is to be pushed to, if anywhere."""
    if config.push_to_hub is None:
        return None
    return Destination(repo=config.push_to_hub, **config.only("revision", "private", "overwrite"))


def prepare_push(config: TrainConfig, architecture: str) -> None:
    """`prepare`, if the run is to be pushed."""
    if (destination := destination_of(config)) is not None:
        prepare(destination, architecture)


def push_finished(config: TrainConfig, folder: Path, accelerator: Accelerator) -> None:
    """Push a run that has finished, if it is to be pushed, from the main process, and say where it is.

    Raises:
        NotPushedError: it could not be pushed; names the command that does it.
    """
    destination = destination_of(config)
    if destination is None or not accelerator.is_main_process:
        return
    try:
        pushed = push(folder, destination, message=config.message, states=config.push_states)
    except (OSError, UserError) as error:
        words = ["python", "recipes/push.py", str(folder), destination.repo]
        for flag, value in config.only("revision", "message", "private", "overwrite", "push_states").items():
            if value:
                words += [f"--{flag.replace('_', '-')}", *([] if value is True else [value])]
        raise NotPushedError(f"{error}; the run is complete, and can be pushed by {shlex.join(words)}") from None
    print(f"pushed           {pushed}")


def _about(destination: Destination) -> str:
    return f"{destination} cannot be pushed to"


def _check_architecture(api: HfApi, destination: Destination, architecture: str, revision: str | None) -> None:
    if destination.overwrite:
        return
    try:
        path = api.hf_hub_download(destination.repo, "config.json", revision=revision)
    except RemoteEntryNotFoundError:
        return
    try:
        held = json.loads(Path(path).read_text()).get("architecture")
    except (ValueError, AttributeError):
        held = None
    if held != architecture:
        what = "a model that is not timm's" if held is None else f"the architecture {held!r}"
        raise UserError(f"{destination} holds {what}; allowed: {architecture!r}, or --overwrite")
