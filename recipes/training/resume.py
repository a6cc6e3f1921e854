"""The start of a run: in a new folder, or where it, or another, was interrupted."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import UserError
from recipes.settings.config import TrainConfig
from recipes.training.checkpoint import draft_of, new_folder, remove_folder, to_json, whole_folder, write_text
from recipes.training.state import Progress, list_states, read_state, state_name

# What a run may change when it goes on.
FREE = ("output", "resume", "checkpoint_every", "keep_checkpoints")
FREE += ("push_to_hub", "private", "revision", "message", "overwrite", "push_states")


@dataclass(frozen=True)
class Start:
    """`folder` is that of the run, `state` the checkpoint to go on from, if any; `new` says that the folder is to be
    made, and `finished` that the run has nothing left to do."""

    folder: Path
    state: Path | None = None
    new: bool = False
    finished: bool = False

    def check_images(self, manifest: str) -> None:
        """Refuse to go on with other images than those of the checkpoint, whose manifest has another hash.

        Raises:
            UserError: the data set has changed.
        """
        if self.state and (before := read_state(self.state)["manifest"]) != manifest:
            raise UserError(
                f"the images chosen have sha256 {manifest}, which was {before}; allowed: the data set as it was"
            )

    def prepare(self, config: TrainConfig, manifest: str) -> None:
        """Make the folder, or leave in it nothing but what the checkpoint knows of. For the main process alone.

        Args:
            config: settings, which `--config` can read back.
            manifest: text of `manifest.json`.
        """
        if not self.new:
            return self._clean()
        with whole_folder(self.folder) as draft:
            write_text(draft / "config.yaml", with_no_resume(config).to_yaml())
            write_text(draft / "manifest.json", manifest)
            if self.state is None:
                return
            progress = Progress(**read_state(self.state)["progress"])
            write_text(draft / "metrics.jsonl", lines(progress))
            for name in {self.state.name, state_name(progress.best_updates)}:  # that of the best epoch may be kept
                if (source := self.state.with_name(name)).exists():
                    shutil.copytree(source, draft / "states" / name)

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
        best = state.with_name(state_name(content["progress"]["best_updates"]))
        if config.select == "best" and not best.exists():
            raise UserError(f"{str(best)!r}, the checkpoint of the best epoch, is not there; allowed: one beside it")
        return Start(folder, state, new)
    settings = folder / "config.yaml"
    if not settings.is_file():
        raise UserError(
            f"output {config.output!r} exists and has no config.yaml; allowed: the folder of a run, or none"
        )
    state = next(reversed(list_states(folder / "states")), None)
    content = read_state(state) if state else {"config": yaml.safe_load(settings.read_text())}
    compare(config, conditions, content, config.output)
    return Start(folder, state, finished=(folder / "results.json").exists())


def compare(config: TrainConfig, conditions: Mapping[str, Any], content: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with other settings, or under other conditions, than those of a checkpoint."""
    mine = {**asdict(config), **conditions}
    theirs = {**content["config"], **content.get("conditions", conditions)}
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
