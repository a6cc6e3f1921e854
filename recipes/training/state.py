"""The training state of a run, from which it goes on as if it had not been interrupted.

A checkpoint is a folder in `states`, named after the updates that were done:

    states/00000024/state.json, state.safetensors     settings, position and metrics; weights, optimizer, moving average
    states/00000024/rank-0.json, rank-0.safetensors   of each process: random generators, loss so far

Tensors lie in safetensors files, all else in JSON; nothing is unpickled. The folder is complete or absent.
"""

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.errors import UserError
from recipes.training.checkpoint import draft_of, publish, remove_folder, write_tensors, write_text
from recipes.training.integrity import seal
from recipes.training.sharding import shard_like, whole


@dataclass
class Progress:
    """Position and metrics of a run.

    `epoch` is under way or next, `step` the updates of it that are done, `updates` those of all epochs, `record` the
    metrics of the epoch so far, `records` those of the epochs before, `best` the highest validation accuracy, and
    `best_epoch` and `best_updates` say when it was reached.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    best: float = -1.0
    best_epoch: int = 0
    best_updates: int = 0

    def __str__(self) -> str:
        return f"epoch {self.epoch}, update {self.step}" if self.step else f"epoch {self.epoch - 1}"


def state_name(updates: int) -> str:
    """Return the name of the folder of the state after that many updates."""
    return f"{updates:08d}"


class States:
    """The checkpoints of one run.

    Args:
        folder: `states` in the run folder.
        parts: what has a state, by name: modules, and objects with `state_dict` and `load_state_dict`. Of the models,
            'average' is measured if it is there, else 'model'.
        identity: what else `state.json` says of the run: settings, conditions, images.
        keep: how many checkpoints are kept, the latest ones.
        keep_best: whether that of the best epoch is kept too.
    """

    def __init__(
        self,
        folder: Path,
        parts: Mapping[str, Any],
        accelerator: Accelerator,
        *,
        identity: Mapping[str, Any],
        keep: int,
        keep_best: bool,
    ):
        self.folder, self.parts, self.accelerator = folder, dict(parts), accelerator
        self.identity, self.keep, self.keep_best = dict(identity), keep, keep_best
        self.saved = "none"  # the last good one, in words

    def save(self, progress: Progress, sums: Tensor) -> None:
        """Write a checkpoint, and remove those that are not to be kept. To be called on all ranks.

        Args:
            progress: position and metrics of the run.
            sums: this rank's sums of losses in the epoch under way.

        Raises:
            OSError: it cannot be written; those before are as they were.
        """
        rank, main = self.accelerator.process_index, self.accelerator.is_main_process
        folder = self.folder / state_name(progress.updates)
        draft = draft_of(folder)
        try:
            if main:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            mine = {"random": random_state(self.accelerator.device), "sums": sums, "buffers": self._buffers()}
            write_tree(draft / f"rank-{rank}", mine)
            tensors: dict[str, Tensor] | None = {} if main else None  # only one rank needs the copies
            content = pack({name: part.state_dict() for name, part in self.parts.items()}, tensors)
            self.accelerator.wait_for_everyone()
            if tensors is not None:
                write_tensors(draft / "state.safetensors", tensors)
                sealed = seal({**self.identity, "progress": asdict(progress), "parts": content}, draft)
                write_text(draft / "state.json", json.dumps(sealed))
                publish(draft, folder)
                self._prune(progress)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        self.saved = f"{folder} ({progress})"

    def _prune(self, progress: Progress) -> None:
        kept = {path.name for path in list_states(self.folder)[-self.keep :]}
        if self.keep_best:
            kept.add(state_name(progress.best_updates))
        for path in list_states(self.folder):
            if path.name not in kept:
                remove_folder(path)

    def restore(self, folder: Path) -> tuple[Progress, Tensor]:
        """Put everything into the state of a checkpoint.

        Returns:
            What `save` was given.
        """
        content = read_state(folder)
        tensors = read_tensors(folder / "state.safetensors")
        states = unpack(content["parts"], tensors)
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                load_weights(part, states[name])
            elif isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, states[name])
            else:
                part.load_state_dict(states[name])
        mine = read_tree(folder / f"rank-{self.accelerator.process_index}")
        self._set_buffers(mine["buffers"])
        set_random_state(mine["random"], self.accelerator.device)
        progress = Progress(**content["progress"])
        self.saved = f"{folder} ({progress})"
        return progress, mine["sums"].to(self.accelerator.device)

    def weights(self, updates: int) -> dict[str, Tensor]:
        """State of the measured model after that many updates, whose checkpoint must be there."""
        folder = self.folder / state_name(updates)
        states = unpack(read_state(folder)["parts"], read_tensors(folder / "state.safetensors"))
        return states["average" if "average" in states else "model"]

    def _buffers(self) -> dict[str, dict[str, Tensor]]:
        """Running statistics, which every rank gathers for itself."""
        modules = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        return {name: dict(module.named_buffers()) for name, module in modules.items()}

    def _set_buffers(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, buffers in saved.items():
            for key, buffer in self.parts[name].named_buffers():
                buffer.copy_(buffers[key])


def random_state(device: torch.device) -> dict[str, Any]:
    """State of every random generator of this process."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    module = torch.get_device_module(device)
    return state | ({"device": module.get_rng_state()} if hasattr(module, "get_rng_state") else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put every random generator of this process into a state that `random_state` has given."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave every random generator of this process as it was, whatever is drawn in the block."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def list_states(folder: Path) -> list[Path]:
    """List the checkpoints of a run, the latest last; a folder that is being written or removed is none."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def read_state(folder: Path) -> dict[str, Any]:
    """Content of `state.json`.

    Raises:
        UserError: the folder is not a checkpoint.
    """
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(folder)!r} is no checkpoint: {error}; allowed: a folder of RUN/states") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}; allowed: a safetensors file") from None


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`module.load_state_dict`, of whole tensors into one that may be sharded."""
    mine = module.state_dict()
    module.load_state_dict({name: shard_like(value, mine[name]) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, of whole tensors into one whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state["state"].items():
        parameter = parameters[index]
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[name] = shard_like(value, parameter)
    optimizer.load_state_dict(state)


def write_tree(path: Path, tree: Any) -> None:
    """Write PATH.json and PATH.safetensors, from which `read_tree` makes the tree again."""
    content = pack(tree, tensors := {})
    write_tensors(path.with_suffix(".safetensors"), tensors)
    write_text(path.with_suffix(".json"), json.dumps(content))


def read_tree(path: Path) -> Any:
    return unpack(json.loads(path.with_suffix(".json").read_text()), read_tensors(path.with_suffix(".safetensors")))


def pack(tree: Any, tensors: dict[str, Tensor] | None, path: str = "") -> Any:
    """Write dicts, lists and tuples of numbers, strings and tensors as JSON; to be called on all ranks.

    A tensor is gathered from its shards, and copied to the host into `tensors`, unless that is None.

    Whatever JSON would confuse with an object of its own is an object of one key: {"tensor": its name}, {"tuple":
    [...]}, and {"dict": [[key, value], ...]} for every dict, as keys need not be strings.
    """
    if isinstance(tree, Tensor):
        gathered = whole(tree.detach())
        if tensors is not None:
            tensors[path] = gathered.to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(tree, Mapping):
        return {"dict": [[key, pack(value, tensors, f"{path}.{key}")] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        items = [pack(value, tensors, f"{path}.{i}") for i, value in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    assert tree is None or isinstance(tree, bool | int | float | str), f"{path} is {tree!r}"
    return tree


def unpack(content: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the tree that `pack` was given."""
    if isinstance(content, list):
        return [unpack(item, tensors) for item in content]
    if not isinstance(content, dict):
        return content
    ((kind, value),) = content.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in value)
    return {key: unpack(item, tensors) for key, item in value}
