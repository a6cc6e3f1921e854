"""A finished run on the Hub: one commit that holds the model, its card and the evidence, or none."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

import timm_deq
from recipes.errors import UserError, check
from recipes.results.card import Facts, model_card
from recipes.settings.command_line import words_of
from recipes.settings.config import TrainConfig
from recipes.settings.hub_name import check_destination, check_license, is_hub_name, parse_hub_name
from recipes.training import hub_client
from recipes.training.checkpoint import load_run, read_config
from recipes.training.hub_client import check_token, patiently
from recipes.training.manifest import Manifest

DOCUMENTS = ("config.yaml", "manifest.json", "metrics.jsonl", "results.json")
PICTURE = re.compile(r"\w[\w.-]*\.png", re.ASCII)
STATE = re.compile(r"\d{8}/(state|rank-\d+)\.(json|safetensors)")


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
    license: str | None = None,
    twin: str | None = None,
) -> Pushed:
    """Push a finished run in one commit. What the repository has already is not sent again, and where it has everything
    there is no commit.

    Args:
        folder: of the run.
        message: title of the commit.
        states: whether the checkpoints for `--resume` go with it.
        license: of the weights, as the Hub names it; apache-2.0 if None.
        twin: repository of the run's twin, for the card.

    Raises:
        HubError: it cannot be pushed; the repository is as it was.
        UserError: the folder is not that of a finished run of a model that timm can build, or a card that says what
            the Hub does not know.
    """
    files = collect(folder, destination.repo, states=states, license=license, twin=twin)
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


def collect(
    folder: Path, repo: str, *, states: bool = False, license: str | None = None, twin: str | None = None
) -> dict[str, bytes | str]:
    """Everything that a run is pushed as: content, or the path of a file, by its path in the repository.

    Raises:
        UserError: the folder is not that of a finished run of a model that timm can build.
    """
    for name in DOCUMENTS:
        if not (folder / name).is_file():
            raise UserError(f"run {str(folder)!r} has no {name}; allowed: a run that has finished")
    config, manifest = read_config(folder), Manifest.load(folder / "manifest.json")
    if license is not None:
        check_license(license)
    if twin is not None:
        check_destination(twin, setting="twin")
    kind = config.classifier
    check(kind == "linear", "classifier", kind, "'linear' in a run to push, as timm can build no other")
    net = load_run(folder)
    settings = json.loads((folder / "checkpoint" / "config.json").read_text())
    settings |= _about_equilibria(net, settings["architecture"])
    pictures = {
        f"figures/{path.name}": path for path in _plain_files(folder / "figures") if PICTURE.fullmatch(path.name)
    }
    facts = Facts(
        repo=repo,
        architecture=settings["architecture"],
        plugin="plugin" in settings,
        solver=settings.get("equilibrium", {}),
        config=asdict(config),
        results=json.loads((folder / "results.json").read_text()),
        profile=(manifest.profile, manifest.parameters),
        counts=manifest.counts,
        groups={name: classes for name, classes in manifest.groups.items() if classes},
        manifest_sha256=manifest.sha256,
        command=["accelerate", "launch", "recipes/train.py", *words_of(_with_no_home(config))],
        pictures=sorted(pictures),
        dataset_id=_dataset_id(config),
        base_model=_base_model(config),
        license=license or "apache-2.0",
        twin=twin,
    )
    content: dict[str, bytes | str] = {
        "README.md": model_card(facts).encode(),
        "config.json": json.dumps(settings, indent=2).encode(),
        "model.safetensors": str(folder / "checkpoint" / "model.safetensors"),
        **{name: str(folder / name) for name in DOCUMENTS},
        **{name: str(path) for name, path in pictures.items()},
    }
    if states:
        root = folder / "states"
        paths = {path.relative_to(root).as_posix(): path for each in root.glob("*") for path in _plain_files(each)}
        content |= {f"states/{name}": str(path) for name, path in sorted(paths.items()) if STATE.fullmatch(name)}
    return content


def _plain_files(folder: Path) -> list[Path]:
    """Files of a folder, but no links, which may lead anywhere."""
    return [path for path in sorted(folder.glob("*")) if path.is_file() and not path.is_symlink()]


def _about_equilibria(net: Any, architecture: str) -> dict[str, Any]:
    """What config.json says beside what timm reads: the settings of solver and gradient with their defaults, and the
    plugin that the architecture needs."""
    about: dict[str, Any] = {}
    if timm.model_entrypoint(architecture).__module__.startswith("timm_deq."):
        about["plugin"] = {"package": "timm-deq", "import": "timm_deq"}
    layer = next((module for module in net.modules() if isinstance(module, timm_deq.Equilibrium)), None)
    if layer is not None:
        about["equilibrium"] = {"solver": _named(layer.solver), "gradient": _named(layer.gradient)}
    return about


def _named(part: Any) -> dict[str, Any]:
    settings = {
        key: _named(value) if hasattr(value, "__dataclass_fields__") else value for key, value in vars(part).items()
    }
    return {"name": type(part).__name__, **settings}


def _with_no_home(config: TrainConfig) -> TrainConfig:
    """The settings without the path of somebody's home."""
    output = Path(config.output)
    return replace(config, output=f"runs/{output.name}") if output.is_absolute() else config


def _dataset_id(config: TrainConfig) -> str | None:
    """The data set's repository on the Hub, if that is where it comes from."""
    name = config.dataset
    return None if name == "digits" or Path(name).exists() or name.count("/") != 1 else name


def _base_model(config: TrainConfig) -> str | None:
    """The repository of the weights that training started from, if they come from the Hub."""
    if is_hub_name(config.model):
        return parse_hub_name(config.model).repo
    if config.pretrained and timm.is_model(config.model):
        return timm.get_pretrained_cfg(config.model).hf_hub_id
    return None
