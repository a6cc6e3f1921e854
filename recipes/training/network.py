"""The model of a run: the one that is trained, and the one that is measured and saved."""

from typing import Any

import torch
from accelerate import Accelerator
from timm.data.model_config import resolve_input_data_config
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn

from recipes.errors import UserError, user_errors
from recipes.imbalance.classifiers import second_stage
from recipes.settings.config import TrainConfig
from recipes.training.checkpoint import create_model
from recipes.training.sharding import gather, unsharded_copy


class Network:
    """The model that is trained, and the weights that are measured and saved.

    Attributes:
        net: the model that is trained, without the wrapper of `accelerator.prepare`, which may shard its parameters.
        measured: the moving average of its weights if there is one, else the model itself, or an unsharded copy of it.
        data_config: preprocessing of its images, as `timm.data` resolves it.

    Raises:
        UserError: a model that cannot be built, or that does not fit the data set.
    """

    def __init__(self, config: TrainConfig, num_classes: int, accelerator: Accelerator):
        self.world = accelerator.num_processes
        self.net: Any = create_model(config, num_classes).to(accelerator.device)
        if config.stage is not None:
            second_stage(self.net, config.stage)
        _try_forward(self.net, config, num_classes, accelerator.device)
        self._ema = None
        if config.ema_decay is not None:
            self._ema = ModelEmaV3(self.net, decay=config.ema_decay, use_warmup=True)
        self._unsharded = unsharded_copy(self.net, accelerator)
        self.measured = self._unsharded if self._ema is None else self._ema.module
        settings = config.only("img_size", "mean", "std", "interpolation", "crop_pct")
        with user_errors():
            self.data_config = resolve_input_data_config(self.net, settings)

    @property
    def average(self) -> nn.Module | None:
        """The moving average of the weights, if there is one."""
        return None if self._ema is None else self._ema.module

    def update_average(self, updates: int) -> None:
        """Let the moving average follow after an update; to be called on all ranks."""
        if self._ema is not None:
            gather(self.net, self._unsharded)
            self._ema.update(self._unsharded, step=updates)

    def gather(self) -> None:
        """Bring the weights of `measured` up to date; to be called on all ranks."""
        if self._ema is None:
            gather(self.net, self._unsharded)

    def average_statistics(self) -> None:
        """Average the running statistics of `measured` over ranks, each of which gathers its own."""
        if self.world > 1:
            distribute_bn(self.measured, self.world, reduce=True)


@torch.no_grad()
def _try_forward(net: Any, config: TrainConfig, num_classes: int, device: torch.device) -> None:
    """Show one black image to the model, so that one that does not work is refused before anything is written.

    Raises:
        UserError: the model fails, or does not give one logit for each class.
    """
    size = resolve_input_data_config(net, config.only("img_size"))["input_size"]
    image = " x ".join(map(str, size))
    what = f"model {config.model!r} with model_args {config.model_args} fails on an image of {image}: "
    training = net.training
    with user_errors(Exception, what=what):
        shape = tuple(net.eval()(torch.zeros(1, *size, device=device)).shape)
    net.train(training)
    if shape != (1, num_classes):
        raise UserError(f"{what}logits have shape {shape}; allowed: {(1, num_classes)}")
