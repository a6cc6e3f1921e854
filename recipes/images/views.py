"""Rows of a split as tensors: transforms, and loaders that decode in worker processes."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm
from timm.data import create_transform
from torch.utils.data import Dataset, Sampler
from torchvision import transforms

from recipes.errors import UserError
from recipes.images.augment import Cutout, seeded
from recipes.images.sources import CorruptImageError, ImageSplit
from recipes.images.workers import ImageLoader


def eval_transform(data_config: dict[str, Any]) -> Any:
    """PIL image to normalised tensor (C, H, W), as timm evaluates."""
    return create_transform(**data_config, is_training=False)


def train_transform(
    data_config: dict[str, Any],
    *,
    crop_pad: int = 0,
    crop_scale: float | None = None,
    hflip: float = 0.0,
    color_jitter: float = 0.0,
    auto_augment: str | None = None,
    re_prob: float = 0.0,
    cutout: int = 0,
) -> Any:
    """PIL image to randomly augmented, normalised tensor (C, H, W), by timm's transforms.

    Without `crop_scale` the image is framed as in evaluation, then cropped at random out of `crop_pad` pixels of
    padding.
    """
    jitter: Any = color_jitter or None
    parts: Any = create_transform(
        **data_config,
        is_training=True,
        separate=True,
        scale=(crop_scale or 1.0, 1.0),
        hflip=hflip,
        color_jitter=jitter,
        auto_augment=auto_augment,
        re_prob=re_prob,
    )
    primary, secondary, final = (part.transforms for part in parts)
    frame = primary[:1]  # the random resized crop
    if crop_scale is None:
        frame = eval_transform(data_config).transforms[:-2]  # all but the conversion to a tensor and its normalisation
        if crop_pad:
            frame.append(transforms.RandomCrop(data_config["input_size"][-2:], padding=crop_pad))
    return transforms.Compose([*frame, *primary[1:], *secondary, *final, *([Cutout(cutout)] if cutout else [])])


def image_mode(channels: int) -> str:
    """PIL's mode of images of that many channels.

    Raises:
        UserError: it has none for them.
    """
    if channels not in (1, 3):
        raise UserError(f"the model takes images of {channels} channels; allowed: 1 or 3")
    return {1: "L", 3: "RGB"}[channels]


class ImageView(Dataset[tuple[torch.Tensor, int]]):
    """Some rows of a split, decoded and transformed: item i is (image (C, H, W), class).

    An item asked for as (i, draw) is augmented by random numbers that depend on `seed` and `draw` alone, so that
    training sees the same pixels on any number of ranks and workers.

    Args:
        split: the images.
        indices: rows of the split, (N,).
        transform: from `train_transform` or `eval_transform`.
        channels: of the model's input, 1 (grey) or 3 (colour); images are converted.
    """

    def __init__(self, split: ImageSplit, indices: Any, transform, *, channels: int = 3, seed: int = 0):
        self.split, self.indices = split, np.asarray(indices, dtype=np.int64)
        self.labels = split.labels[self.indices]
        self.transform, self.mode, self.seed = transform, image_mode(channels), seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        position, draw = item if isinstance(item, tuple) else (item, None)
        image = self.split.read(int(self.indices[position]), self.mode)
        if draw is None:
            return self.transform(image), int(self.labels[position])
        with seeded(self.seed, draw):
            return self.transform(image), int(self.labels[position])


class _Check(Dataset[str]):
    """Item i says what is wrong with image i of a view, or nothing."""

    def __init__(self, split: ImageSplit, indices: np.ndarray):
        self.split, self.indices = split, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> str:
        try:
            self.split.read(int(self.indices[position]), "RGB")
        except CorruptImageError as error:
            return str(error)
        return ""


def find_corrupt(
    split: ImageSplit, indices: np.ndarray, *, workers: int | None = None, most: int = 0, rank: int = 0, world: int = 1
) -> dict[int, str]:
    """Decode images once, with a progress bar on the main process, to find those that cannot be decoded.

    Args:
        indices: rows of the split, (N,).
        workers: processes that decode; chosen by the number of images if not given.
        most: how many may be found; one more ends the search.
        rank, world: every rank looks at its share, and all get what any has found.

    Returns:
        What is wrong with an image, by its row.
    """
    check, found = _Check(split, indices), {}
    batches = eval_batches(len(check), batch_size=32, rank=rank, world=world)
    loader = ImageLoader(check, batches, workers=workers, pin_memory=False, persistent=False)
    total = sum(map(len, batches))
    with tqdm(total=total, desc=f"checking {split.name}", unit="image", mininterval=0.5, leave=False) as bar:
        for positions, messages in zip(batches, loader, strict=True):
            found |= {int(indices[i]): message for i, message in zip(positions, messages, strict=True) if message}
            bar.update(len(messages))
            if len(found) > most:
                break
    if world > 1:
        shares: list[Any] = [None] * world
        torch.distributed.all_gather_object(shares, found)
        found = {row: message for share in shares for row, message in share.items()}
    return dict(sorted(found.items()))


def train_loader(view: ImageView, sampler: Sampler, *, workers: int | None, pin_memory: bool = False) -> ImageLoader:
    """Batches (images (B, C, H, W), labels (B,)) of one rank in the order of its sampler."""
    return ImageLoader(view, sampler, workers=workers, pin_memory=pin_memory, persistent=True)


def eval_batches(images: int, *, batch_size: int, rank: int, world: int) -> list[range]:
    """Positions of every image once over all ranks: rank r takes batches r, r + world, ... of batches that do not
    depend on `world`.

    So an image has the same batch mates, hence bit-equal features, on any number of ranks, and none is repeated to
    fill up a batch.
    """
    return [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)][rank::world]


def eval_loader(
    view: ImageView, *, batch_size: int, rank: int, world: int, workers: int | None, pin_memory: bool = False
) -> ImageLoader:
    """Batches (images (B, C, H, W), labels (B,)) of one rank, as `eval_batches` deals them out."""
    batches = eval_batches(len(view), batch_size=batch_size, rank=rank, world=world)
    return ImageLoader(view, batches, workers=workers, pin_memory=pin_memory, persistent=False)
