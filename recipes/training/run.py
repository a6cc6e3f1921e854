"""A training run: its parts, prepared so that whatever does not fit together is refused before anything is written."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from nc_probe import CollapseReport, NCProbe
from recipes.errors import check, user_errors
from recipes.settings.config import TrainConfig
from recipes.settings.contradictions import SCALE
from recipes.training.batches import Batches, RunImages
from recipes.training.hub import prepare_push
from recipes.training.integrity import file_hash
from recipes.training.network import Network
from recipes.training.objective import Objective, create_criterion
from recipes.training.resume import Start
from recipes.training.state import Progress, States
from recipes.training.tracking import start_tracker


@dataclass(kw_only=True)
class Run:
    """The parts of a run, and how far it has come.

    Attributes:
        started: when the run began, on the clock `time.perf_counter`, less the epochs of the runs that it goes on from.
        model: the model as accelerate wraps it, for training.
        optimizer, prepared: timm's optimizer, and the same as accelerate wraps it.
        progress: position and metrics.
        loss_sum: sum of this rank's losses in the epoch under way, read only now and then.
        gradient_norm: of the last update, before clipping, ().
        report: the latest measurement of neural collapse in this process.
        checkpoint: the model saved last, in words.
        postfix: numbers that the progress bar shows.
    """

    config: TrainConfig
    accelerator: Accelerator
    folder: Path
    started: float
    images: RunImages
    network: Network
    probe: NCProbe
    batches: Batches
    objective: Objective
    model: nn.Module
    optimizer: torch.optim.Optimizer
    prepared: Any
    scheduler: Scheduler | None
    states: States
    progress: Progress
    loss_sum: Tensor
    gradient_norm: Tensor | None = None
    report: CollapseReport | None = None
    checkpoint: str = "none"
    postfix: dict[str, str] = field(default_factory=dict)
    _epoch_started: float = 0.0

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        updates = self.config.epochs * self.batches.sampler.updates
        return min(updates, self.config.max_updates or updates)

    @property
    def done(self) -> bool:
        """Whether the last epoch has been trained."""
        return self.progress.epoch == self.config.epochs or self.progress.updates == self.updates

    @property
    def seconds(self) -> float:
        """Time spent in the epoch under way, interruptions left out."""
        return time.perf_counter() - self._epoch_started

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left, each made the one under way; epoch 0 measures the initial model."""
        progress = self.progress
        for epoch in range(progress.epoch, self.config.epochs + 1):
            if epoch and progress.updates == self.updates:
                return
            progress.epoch = epoch
            progress.record = progress.record or {"epoch": epoch, "train_loss": None, "lr": None, "seconds": 0.0}
            self._epoch_started = time.perf_counter() - progress.record["seconds"]
            yield epoch


def prepare(config: TrainConfig, accelerator: Accelerator, start: Start) -> Run:
    """Build the parts of a run, refuse what does not fit, decode images, and only then make the run folder.

    Raises:
        UserError: settings that do not fit together, the data set or the model.
        HubError: the run could not be pushed where it is to be pushed to.
    """
    started = time.perf_counter()
    images = RunImages(config, accelerator)
    start.check_images(images.manifest)
    set_seed(config.seed)
    network = Network(config, len(images.class_names), accelerator)
    names = network.net.pretrained_cfg.get("label_names")
    kept = config.stage is not None and isinstance(names, list | tuple)
    check(not kept or [*names] == [*images.class_names], "model", config.model, "one with the classes of the data set")
    groups = {name: classes for name, classes in images.manifest.groups.items() if classes}
    probe = NCProbe(network.measured, groups=groups, class_counts=images.manifest.counts)
    batches = Batches(config, images, network.data_config, accelerator)

    # The optimizer is built from the unprepared model, whose parameter names timm's groups go by.
    criterion = create_criterion(config, images.manifest.counts).to(accelerator.device)
    optimizer = create_optimizer(config, network.net)
    scheduler = create_scheduler(config, optimizer, batches.sampler.updates)
    model, prepared = accelerator.prepare(network.net, optimizer)
    objective = Objective(network.net, criterion, **config.only("jacobian_weight", "correction_at"))

    if accelerator.is_main_process:
        prepare_push(config, network.net.pretrained_cfg["architecture"])
        start.try_folder()
    accelerator.print("\n".join([*images.notes, f"pipeline         {batches.pipeline.describe()}"]))
    batches.load(check=start.state is None)
    if accelerator.is_main_process:
        for sentence in images.shared():
            print(f"warning          {sentence}")
        start.prepare(config, images.manifest.to_json())
    accelerator.wait_for_everyone()
    set_seed(config.seed, device_specific=True)  # dropout differs between ranks

    parts = {"model": network.net, "average": network.average, "optimizer": optimizer, "criterion": criterion}
    parts |= {"scheduler": scheduler, "scaler": accelerator.scaler}
    states = States(
        start.folder / "states",
        {name: part for name, part in parts.items() if part is not None},
        accelerator,
        identity={
            "config": asdict(config),
            "conditions": conditions(accelerator),
            "manifest": images.manifest.sha256,
            "folder": {name: file_hash(start.folder / name) for name in ("config.yaml", "manifest.json")},
        },
        keep=config.keep_checkpoints,
        keep_best=config.select == "best",
    )
    progress, loss_sum = Progress(), torch.zeros((), device=accelerator.device)
    if start.restored:
        progress, loss_sum = states.restore(start.restored)
        started -= sum(record["seconds"] for record in progress.records)
    start_tracker(accelerator, config.tracker, start.folder, asdict(config), progress.updates)
    return Run(
        config=config,
        accelerator=accelerator,
        folder=start.folder,
        started=started,
        images=images,
        network=network,
        probe=probe,
        batches=batches,
        objective=objective,
        model=model,
        optimizer=optimizer,
        prepared=prepared,
        scheduler=scheduler,
        states=states,
        progress=progress,
        loss_sum=loss_sum,
    )


def as_launched(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """Return the settings with what `accelerate launch` or its configuration file have set instead."""
    plugin: Any = accelerator.state.dynamo_plugin
    compiles = plugin.backend != DynamoBackend.NO
    steps = accelerator.gradient_accumulation_steps
    return replace(config, gradient_accumulation_steps=steps, compile=compiles)


def chosen_settings(run: Run) -> dict[str, Any]:
    """Return the settings that were left open, with the values that the run has used."""
    config, split = run.config, run.images.rows["train"][0]
    preprocessing, manifest = run.network.data_config, run.images.manifest
    used = {name: preprocessing[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    used |= {"img_size": preprocessing["input_size"][-1], "imbalance": manifest.profile, **manifest.parameters}
    used |= {"image_column": split.image_column, "label_column": split.label_column}
    used["pipeline"] = "resident" if run.batches.pipeline.resident else "workers"
    if config.classifier != "linear":
        used["classifier_scale"] = SCALE
    if run.batches.mix is not None:
        used["mix_prob"] = 1.0
    if config.sampler == "repeat_factor":
        used["repeat_threshold"] = run.batches.sampler.threshold
    return {name: value for name, value in used.items() if getattr(config, name, 0) in (None, "auto")}


def conditions(accelerator: Accelerator) -> dict[str, Any]:
    """Return the conditions, other than settings, that must stay the same in a run that is resumed."""
    return {"ranks": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}


def create_optimizer(config: TrainConfig, net: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer.

    Raises:
        UserError: one that this machine or these settings do not allow.
    """
    settings = config.only("lr", "weight_decay", "momentum")
    what = f"opt {config.opt!r} cannot be created with {', '.join(f'{k} {v:g}' for k, v in settings.items())}: "
    with user_errors(Exception, what=what):
        return create_optimizer_v2(net, opt=config.opt, **settings)


def create_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, updates: int) -> Scheduler | None:
    """Create the schedule of the learning rate, stepped at every update; none where nothing is trained.

    Args:
        updates: of one epoch.
    """
    if not config.epochs:
        return None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=config.epochs,
        warmup_lr=config.lr * 1e-3,
        **config.only("sched", "warmup_epochs", "min_lr", "decay_epochs", "decay_milestones", "decay_rate"),
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return scheduler
