"""What a run is pushed as: its files, the card, and a config.json that says what it takes to build the model."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm

import timm_deq
from recipes.errors import UserError, check
from recipes.results.card import Facts, model_card
from recipes.settings.command_line import words_of
from recipes.settings.config import TrainConfig
from recipes.settings.hub_name import check_destination, check_license, is_hub_name, parse_hub_name
from recipes.training.checkpoint import load_run, read_config
from recipes.training.manifest import Manifest

DOCUMENTS = ("config.yaml", "manifest.json", "metrics.jsonl", "results.json")
PICTURE = re.compile(r"\w[\w.-]*\.png", re.ASCII)
STATE = re.compile(r"\d{8}/(state|rank-\d+)\.(json|safetensors)")


def collect(
    folder: Path,
    repo: str,
    *,
    states: bool = False,
    evaluation: Path | None = None,
    license: str | None = None,
    twin: str | None = None,
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
    results = json.loads((folder / "results.json").read_text())
    shown = _plain_files(folder / "figures")
    if evaluation is not None:
        results["anytime"] = _anytime(evaluation, folder, config)
        shown += _plain_files(evaluation)
    pictures = {f"figures/{path.name}": path for path in shown if PICTURE.fullmatch(path.name)}
    aside = len(manifest.test or ())
    tested = {"test_split": f"{config.train_split}, {aside} images kept aside"} if aside else {}
    facts = Facts(
        repo=repo,
        architecture=settings["architecture"],
        plugin="plugin" in settings,
        solver=settings.get("equilibrium", {}),
        config=asdict(config) | tested,
        results=results,
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


def _anytime(evaluation: Path, folder: Path, config: TrainConfig) -> list[dict[str, Any]]:
    """The points of an evaluation of this run.

    Raises:
        UserError: it is of another model, or of other images.
    """
    allowed = (
        f"the output of recipes/evaluate.py for {str(folder)!r}, on {config.dataset!r}, split {config.test_split!r}"
    )
    try:
        found = json.loads((evaluation / "results.json").read_text())
        same = Path(found["model"]).resolve() == folder.resolve()
        same = same and (found["dataset"], found["split"]) == (config.dataset, config.test_split)
        same = same and found["adjust_tau"] is found["tau_normalise"] is None
        points = [point for point in found["points"] if point["max_steps"] is not None]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    check(same, "evaluation", str(evaluation), allowed)
    return points


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
        known = timm.get_pretrained_cfg(config.model)
        return known and known.hf_hub_id
    return None
