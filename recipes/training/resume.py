"""The start of a run: in a new folder, or where it, or another, was interrupted."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import UserError
from recipes.settings.config import TrainConfig
from recipes.training.checkpoint import draft_of, new_folder, remove_folder, to_json, whole_folder, write_text
from recipes.training.integrity import file_hash, find_damage
from recipes.training.lock import lock_folder
from recipes.training.manifest import Manifest
from recipes.training.state import Progress, list_states, read_state, state_name

# What a run may change when it goes on.
FREE = ("output", "resume", "checkpoint_every", "keep_checkpoints")
FREE += ("push_to_hub", "private", "revision", "message", "overwrite", "push_states")


@dataclass(frozen=True)
class Start:
    """`folder` is that of the run, `state` the checkpoint to go on from, if any; `new` says that the folder is to be
    made, and `finished` that the run has nothing left to do; `warning` is for the user, if not empty.

    Used as a context, it ends the lock on the folder that `prepare` takes.
    """

    folder: Path
    state: Path | None = None
    new: bool = False
    finished: bool = False
    warning: str = ""
    _held: ExitStack = field(default_factory=ExitStack, compare=False)

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def check_images(self, manifest: Manifest) -> None:
        """Refuse to go on with other images than those of the checkpoint, whose manifest has another hash.

        The manifest of an earlier version says less; what it says must be the same.

        Raises:
            UserError: the data set has changed.
        """
        if self.state is None or (before := read_state(self.state)["manifest"]) == manifest.sha256:
            return
        if (file := self.state.parents[1] / "manifest.json").is_file():
            earlier = Manifest.load(file)
            unsaid = {name: None for name, value in asdict(earlier).items() if value is None}
            if earlier.sha256 == before and earlier == replace(manifest, **unsaid):
                return
        raise UserError(
            f"the images chosen have sha256 {manifest.sha256}, which was {before}; allowed: the data set as it was"
        )

    def try_folder(self) -> None:
        """Make sure that a new folder can be made, before images are decoded for it, and leave nothing.

        Raises:
            OSError: it cannot.
        """
        if self.new:
            parent = next(path for path in self.folder.absolute().parents if path.is_dir())
            draft = parent / draft_of(self.folder).name
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            draft.rmdir()

    def prepare(self, config: TrainConfig, manifest: str) -> None:
        """Make the folder, or leave in it nothing but what the checkpoint knows of. For the main process alone.

        Args:
            config: settings, which `--config` can read back.
            manifest: text of `manifest.json`.
        """
        if not self.new:
            self._held.enter_context(lock_folder(self.folder))
            return self._clean()
        with whole_folder(self.folder) as draft:
            write_text(draft / "config.yaml", with_no_resume(config).to_yaml())
            write_text(draft / "manifest.json", manifest)
            if self.state is not None:
                self._copy_state(self.state, draft)
        self._held.enter_context(lock_folder(self.folder))

    @staticmethod
    def _copy_state(state: Path, folder: Path) -> None:
        progress = Progress(**read_state(state)["progress"])
        write_text(folder / "metrics.jsonl", lines(progress))
        for name in {state.name, state_name(progress.best_updates)}:  # that of the best epoch may be kept
            if (source := state.with_name(name)).exists():
                shutil.copytree(source, folder / "states" / name)

    def _clean(self) -> None:
        for path in self.folder.glob(".*.draft"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
        shutil.rmtree(draft_of(self.folder), ignore_errors=True)
        for path in (self.folder / "states").glob(".*"):
            shutil.rmtree(path)
        for path in list_states(self.folder / "states"):
            if self.state is None or path.name > self.state.name:
                remove_folder(path)
        progress = Progress(**read_state(self.state)["progress"]) if self.state else Progress()
        write_text(self.folder / "metrics.jsonl", lines(progress))
        (self.folder / "results.json").unlink(missing_ok=True)

    @property
    def restored(self) -> Path | None:
        """The checkpoint, in the folder that `prepare` has made."""
        return self.folder / "states" / self.state.name if self.state else None


def with_no_resume(config: TrainConfig) -> TrainConfig:
    return TrainConfig(**{**asdict(config), "resume": None})


def lines(progress: Progress) -> str:
    """metrics.jsonl of the epochs that are done."""
    return "".join(to_json(record) + "\n" for record in progress.records)


def find_start(config: TrainConfig, conditions: Mapping[str, Any]) -> Start:
    """Find where a run starts, by `--resume`: nothing, 'auto' or a folder.

    Args:
        config: settings of this run.
        conditions: what else must be as it was, by name; JSON.

    Raises:
        UserError: the folder exists and may not be touched, there is no such checkpoint, or the run that is to go on
            had other settings.
    """
    folder = Path(config.output)
    if config.resume is None or (config.resume == "auto" and not folder.exists()):
        return Start(new_folder(config.output), new=True)
    if config.resume != "auto":
        state = Path(config.resume)
        content = read_state(state)
        if new := state.resolve().parent != (folder / "states").resolve():
            new_folder(config.output)
        compare(config, conditions, content, config.resume)
        if damage := damage_of(state, config):
            raise UserError(f"{str(state)!r} cannot be resumed: {damage}; allowed: a whole folder of RUN/states")
        return Start(folder, state, new)
    return resume_folder(config, conditions, folder)


def resume_folder(config: TrainConfig, conditions: Mapping[str, Any], folder: Path) -> Start:
    """Find the newest whole state of a run folder; a run that has not come to its first starts over.

    Raises:
        UserError: the folder is not that of a run, was changed since, or has lost its states.
    """
    settings, finished = folder / "config.yaml", (folder / "results.json").exists()
    if not settings.is_file():
        raise UserError(
            f"output {config.output!r} exists and has no config.yaml; allowed: the folder of a run, or none"
        )
    damages: dict[str, str] = {}
    for state in reversed(list_states(folder / "states")):
        if not (damage := damage_of(state, config)):
            break
        damages[state.name] = damage
    else:
        state = None
    found = "; ".join(f"state {name} is damaged, as {damage}" for name, damage in damages.items())
    if state is None and not finished:
        metrics = folder / "metrics.jsonl"
        epochs = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
        if found or epochs > 0:
            reason = found or f"it has the metrics of {epochs} epochs and no state"
            raise UserError(f"output {config.output!r} cannot be resumed: {reason}; allowed: another folder")
    content = read_state(state) if state else {"config": yaml.safe_load(settings.read_text())}
    compare(config, conditions, content, config.output)
    for name, expected in content.get("folder", {}).items():
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            raise UserError(f"{str(folder / name)!r} was changed after the run had begun; allowed: the file as it was")
    warning = f"warning: {found}: going on from state {state.name}" if found and state and not finished else ""
    return Start(folder, state, finished=finished, warning=warning)


def damage_of(state: Path, config: TrainConfig) -> str | None:
    """Return what keeps a run from going on from a state, if anything does: its own damage, or that of the best."""
    try:
        content = read_state(state)
        if damage := find_damage(content, state):
            return damage
        best = state.with_name(state_name(content["progress"]["best_updates"]))
        if config.select != "best" or best == state:
            return None
        damage = find_damage(read_state(best), best)
    except UserError as error:
        return str(error)
    return damage and f"{damage} in {best.name}, the state of the best epoch"


def compare(config: TrainConfig, conditions: Mapping[str, Any], content: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with other settings, or under other conditions, than those of a checkpoint.

    What the version that wrote it had no setting for is as it is by default.
    """
    mine = {**asdict(config), **conditions}
    theirs = {**asdict(TrainConfig(output="-")), **content["config"], **content.get("conditions", conditions)}
    missing = object()
    differing = [
        f"{name} {theirs.get(name, 'none')!r}, now {mine.get(name, 'none')!r}"
        for name in dict.fromkeys([*mine, *theirs])
        if name not in FREE and mine.get(name, missing) != theirs.get(name, missing)
    ]
    if differing:
        raise UserError(
            f"the run of {where!r} had other settings: {'; '.join(differing)}; allowed: the same, but for "
            f"{', '.join(FREE)}"
        )
