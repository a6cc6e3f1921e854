"""How images reach the model: decoded once and kept on the device, or decoded by workers whenever they are drawn.

Both ways give evaluation the same tensors, and training the same distribution of images, from different random numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from recipes.images.augment import Augmentation
from recipes.images.resident import ResidentImages, ResidentLoader, decode
from recipes.images.sources import CorruptImageError, ImageSplit
from recipes.images.views import (
    ImageView,
    eval_batches,
    eval_loader,
    eval_transform,
    find_corrupt,
    image_mode,
    train_loader,
    train_transform,
)
from recipes.imbalance.sampling import EpochSampler

Mode = Literal["auto", "resident", "workers"]

BUDGET = 2 << 30
"""Bytes that resident images may take, unless said otherwise."""

# Augmentations that PIL does, one image at a time, from the encoded image's own pixels.
_BY_WORKERS = ("crop_scale", "color_jitter", "auto_augment")


class Loader(Protocol):
    """Batches (images (B, C, H, W), labels (B,)) of one rank, anew at each iteration."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A way from rows of a data set to batches; see `choose_pipeline`."""

    resident: bool
    why: str
    data_config: dict[str, Any]
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device
    seed: int = 0
    workers: int | None = None

    def describe(self) -> str:
        """One line for the log: the way taken, and why."""
        return f"{'resident' if self.resident else 'workers'}: {self.why}"

    def load(self, split: ImageSplit, indices: Any, *, check: bool = True, rank: int = 0, world: int = 1) -> "ImageSet":
        """Some rows of a split, (N,), decoded now if they are to be resident.

        Args:
            check: whether images that workers will decode are decoded once now, so that none can end a training.
            rank, world: of the processes that call this, which share that work.

        Raises:
            CorruptImageError: an image cannot be decoded.
            WorkerDiedError: a process that decodes has died.
        """
        indices = np.asarray(indices, dtype=np.int64)
        images = None
        if self.resident:
            images = decode(split, indices, self.data_config, device=self.device, workers=self.workers)
        elif check:
            corrupt = find_corrupt(split, indices, workers=self.workers, rank=rank, world=world)
            for message in corrupt.values():
                raise CorruptImageError(message)
        return ImageSet(self, split, indices, images)


@dataclass(frozen=True)
class ImageSet:
    """Rows of a split that can be looped over, in training and in evaluation."""

    pipeline: Pipeline
    split: ImageSplit
    indices: np.ndarray
    images: ResidentImages | None

    @property
    def labels(self) -> np.ndarray:
        """Classes, (N,)."""
        return self.split.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def train_loader(self, sampler: EpochSampler) -> Loader:
        """Augmented batches in the order of a sampler."""
        pipe = self.pipeline
        if self.images is None:
            view = self._view(train_transform(pipe.data_config, **pipe.augmentation))
            return train_loader(view, sampler, workers=pipe.workers, pin_memory=pipe.device.type == "cuda")
        augmentation = Augmentation(**{k: v for k, v in pipe.augmentation.items() if k not in _BY_WORKERS})
        return ResidentLoader(self.images, sampler, pipe.data_config, augmentation=augmentation, seed=pipe.seed)

    def eval_loader(self, *, batch_size: int, rank: int, world: int) -> Loader:
        """Every image once over all ranks, in the batches of `eval_batches`."""
        pipe, dealing = self.pipeline, {"batch_size": batch_size, "rank": rank, "world": world}
        if self.images is None:
            view = self._view(eval_transform(pipe.data_config))
            return eval_loader(view, **dealing, workers=pipe.workers, pin_memory=pipe.device.type == "cuda")
        return ResidentLoader(self.images, eval_batches(len(self), **dealing), pipe.data_config)

    def _view(self, transform: Any) -> ImageView:
        channels = self.pipeline.data_config["input_size"][0]
        return ImageView(self.split, self.indices, transform, channels=channels, seed=self.pipeline.seed)


def choose_pipeline(
    mode: Mode = "auto",
    *,
    images: int,
    data_config: dict[str, Any],
    augmentation: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    workers: int | None = None,
    budget_bytes: int = BUDGET,
) -> Pipeline:
    """Keep images on the device where they fit and their augmentation can be done there; else decode in workers.

    The choice depends on the arguments alone, so that all ranks make the same.

    Args:
        mode: 'auto', or the way to take; then the budget does not matter.
        images: number of images of all sets together.
        data_config: of the model, as `timm.data` resolves it.
        augmentation: keywords of `recipes.images.sources.train_transform`; none for evaluation.
        device: where resident images live.
        seed: of the augmentation.
        workers: processes that decode; chosen by the number of images if not given.
        budget_bytes: most that resident images may take, in 8 bits per channel.

    Raises:
        ValueError: an unknown mode, a model that takes neither 1 nor 3 channels, or images that are to be resident with
            an augmentation that workers must do.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"pipeline is {mode!r}; allowed: {', '.join(map(repr, get_args(Mode)))}")
    augmentation, device = dict(augmentation or {}), torch.device(device)
    size = data_config["input_size"]
    image_mode(size[0])
    need = images * int(np.prod(size))
    tensor = f"{images} images of {' x '.join(map(str, size))} bytes take {need / 2**30:.3g} GiB on {device}"
    obstacles = [f"{name} {augmentation[name]!r}" for name in _BY_WORKERS if augmentation.get(name)]
    if mode == "resident" and obstacles:
        raise ValueError(
            f"pipeline is 'resident' with {', '.join(obstacles)}; allowed: 'auto' or 'workers', which augment each "
            "image by itself"
        )
    resident = mode == "resident" or (mode == "auto" and not obstacles and need <= budget_bytes)
    if mode != "auto":
        why = f"as asked; {tensor}" if resident else "as asked"
    elif obstacles:
        why = f"{', '.join(obstacles)} augments each image by itself"
    else:
        why = f"{tensor}, {'within' if resident else 'above'} the budget of {budget_bytes / 2**30:.3g} GiB"
    return Pipeline(
        resident=resident,
        why=why,
        data_config=data_config,
        augmentation=augmentation,
        device=device,
        seed=seed,
        workers=workers,
    )
