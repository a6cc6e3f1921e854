"""Images that are decoded once and stay on the device: batches without workers, and without Python for each image.

An image is framed as in evaluation (resized and cropped by timm) and kept in 8 bits per channel, as PIL leaves it, so
that evaluation gets the tensors that workers would give it.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import tqdm
from timm.data import create_transform
from torch import Tensor

from recipes.images.augment import Augmentation, crop_and_flip, erase
from recipes.images.sources import ImageSplit
from recipes.images.views import ImageView, eval_loader

_AT_ONCE = 1 << 20  # bytes that a worker hands over at a time: shared memory may be scarce


@dataclass(frozen=True)
class ResidentImages:
    """Images before normalisation, (N, C, H, W) uint8, and their classes, (N,) int64, on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def decode(
    split: ImageSplit,
    indices: Sequence[int] | np.ndarray,
    data_config: dict[str, Any],
    *,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> ResidentImages:
    """Decode some rows of a split, with a progress bar on the main process.

    Args:
        split: the images.
        indices: rows of the split, (N,).
        data_config: of the model, as `timm.data` resolves it.
        workers: processes that decode; chosen by the number of images if not given.

    Raises:
        CorruptImageError: an image cannot be decoded.
        WorkerDiedError: a process that decodes has died.
    """
    size = tuple(data_config["input_size"])
    frame = create_transform(**data_config, is_training=False, normalize=False)
    view = ImageView(split, indices, frame, channels=size[0])
    pixels = torch.empty((len(view), *size), dtype=torch.uint8, device=device)
    batch_size = max(1, _AT_ONCE // int(np.prod(size)))
    loader = eval_loader(view, batch_size=batch_size, rank=0, world=1, workers=workers)
    with tqdm(total=len(view), desc=f"decoding {split.name}", unit="image", mininterval=0.5, leave=False) as bar:
        done = 0  # the bar does not count where it is not shown, which is on all ranks but one
        for images, _ in loader:
            pixels[done : done + len(images)] = images
            done += len(images)
            bar.update(len(images))
    return ResidentImages(pixels, torch.from_numpy(view.labels).to(device))


class Batches(Sized, Iterable[Sequence[Any]], Protocol):
    """A batch sampler, or a list of batches."""


class ResidentLoader:
    """Batches (images (B, C, H, W) float32, labels (B,)) on the device of the images.

    Args:
        images: what to take batches from.
        batches: lists of positions; with an augmentation, lists of (position, draw).
        data_config: of the model; its mean and standard deviation normalise the channels.
        augmentation: what is done to the images at random; nothing if not given.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: ResidentImages,
        batches: Batches,
        data_config: dict[str, Any],
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        self.images, self.batches, self.augmentation, self.seed = images, batches, augmentation, seed
        # 255 is a tensor because a GPU multiplies by the reciprocal of a number, which rounds differently.
        self.white, self.mean, self.std = (
            torch.tensor(x, dtype=torch.float32, device=images.pixels.device).view(-1, 1, 1)
            for x in (255.0, data_config["mean"], data_config["std"])
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            if self.augmentation is None:
                pixels, labels = self._rows(np.asarray(batch))
                yield self._normalise(pixels), labels
            else:
                positions, draws = np.asarray(batch).T
                pixels, labels = self._rows(positions)
                yield self._augment(self.augmentation, pixels, draws), labels

    def _rows(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(positions).to(self.images.pixels.device)
        return self.images.pixels[rows], self.images.labels[rows]

    def _normalise(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).div_(self.white).sub_(self.mean).div_(self.std)

    def _augment(self, augmentation: Augmentation, pixels: Tensor, draws: np.ndarray) -> Tensor:
        height, width = pixels.shape[2:]
        choices = torch.from_numpy(augmentation.choose(self.seed, draws, height, width)).to(pixels.device)
        top, left, flip = choices[:, :3].unbind(1)
        images = self._normalise(crop_and_flip(pixels, top, left, flip.bool(), augmentation.crop_pad))
        for boxes in choices[:, 3:].split(4, dim=1):
            erase(images, boxes)
        return images
