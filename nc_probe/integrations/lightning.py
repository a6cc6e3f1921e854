"""Neural collapse in training with the Trainer of Lightning."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset, Subset

from nc_probe.loops.model import measure_model
from nc_probe.report import CollapseReport

__all__ = ["CollapseCallback"]


class CollapseCallback(Callback):
    """Measure the module at the end of epochs on the images that it is trained on, and log it as the module logs.

        Trainer(callbacks=[CollapseCallback(groups={"rare": [7, 8, 9]})]).fit(module, loader)
        # nc/nc1, nc/rare/nc1, ... in trainer.callback_metrics and in every logger

    Args:
        loader: to measure on, of this rank's images. Default: the training data set, in order, each image once, its
            transforms, random ones too, applied.
        model: name of the classifier in the module, where the module's own `forward` is not one.
        every: measure every so many epochs.
        settings: of `measure_model` and `NCProbe`.

    Attributes:
        reports: by epoch, of which the first is 0.
    """

    def __init__(
        self, loader: Iterable[Any] | None = None, *, model: str = "", every: int = 1, **settings: Any
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.loader, self.model, self.every, self.settings = loader, model, every, settings
        self.reports: dict[int, CollapseReport] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if (epoch + 1) % self.every:
            return
        loader = _in_order(trainer) if self.loader is None else self.loader
        model = pl_module.get_submodule(self.model)
        with trainer.precision_plugin.forward_context():  # autocast, where training has it
            report = self.reports[epoch] = measure_model(model, loader, device=pl_module.device, **self.settings)
        pl_module.log_dict(report.scalars("nc/"))


def _in_order(trainer: Trainer) -> DataLoader:
    """This rank's part of the training data set, batched as it is for training, without its sampler.

    Raises:
        ValueError: there is no such data set.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"loader must be given where training is not by one DataLoader of a data set with a length, got "
            f"{type(loader).__name__}"
        )
    dataset: Any = loader.dataset
    mine = Subset(dataset, range(trainer.global_rank, len(dataset), trainer.world_size))
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    return DataLoader(mine, batch_size=size, num_workers=loader.num_workers, collate_fn=loader.collate_fn)
