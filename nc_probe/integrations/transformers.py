"""Neural collapse in training with the Trainer of transformers."""

from typing import Any

from transformers import Trainer, TrainerCallback

from nc_probe.loops.model import measure_model
from nc_probe.report import CollapseReport

__all__ = ["CollapseCallback"]


class CollapseCallback(TrainerCallback):
    """Measure the model at the end of epochs on the images that it is trained on, and log it as the Trainer logs.

        trainer = Trainer(model=model, args=args, train_dataset=dataset)
        trainer.add_callback(CollapseCallback(trainer, groups={"rare": [7, 8, 9]}))
        trainer.train()  # nc/nc1, nc/rare/nc1, ... in trainer.state.log_history and in every tracker

    The images are loaded as those of an evaluation: in order, each once, by all ranks.

    Args:
        trainer: of transformers.
        dataset: to measure on. Default: the Trainer's `train_dataset`, whose transforms, random ones too, are applied.
        every: measure every so many epochs.
        settings: of `measure_model` and `NCProbe`.

    Attributes:
        reports: by epoch, of which the first is 1.
    """

    def __init__(self, trainer: Trainer, *, dataset: Any = None, every: int = 1, **settings: Any) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.trainer: Any = trainer
        self.dataset, self.every, self.settings = dataset, every, settings
        self.reports: dict[int, CollapseReport] = {}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch, trainer = round(state.epoch), self.trainer
        if epoch % self.every:
            return
        loader = trainer.get_eval_dataloader(trainer.train_dataset if self.dataset is None else self.dataset)
        settings = {"progress": not args.disable_tqdm, **self.settings}
        self.reports[epoch] = measure_model(trainer.model, loader, **settings)
        trainer.log(self.reports[epoch].scalars("nc/"))
