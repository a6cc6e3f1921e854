"""Which image is drawn when: batches whose order is a function of (seed, epoch) alone.

An epoch draws N images and cuts them into ceil(N / batch_size) nearly equal batches, one for each optimizer update;
each batch is cut into `accumulation x world` nearly equal parts, one for each forward pass of each rank. So no batch
is ever tiny, which BatchNorm needs, no image is repeated to fill up a rank, and the batches of an update are the same
on any number of ranks.

A batch of B images is cut into parts of sizes b_1, b_2, ..., of which some are one larger than others. Every part
reports the mean of its losses; DDP averages over ranks and accelerate over accumulation steps. With the weight  b x
accumulation x world / B  on each part the result is the mean over the B images, exactly.
"""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

# One random stream per purpose.
_INSTANCE, _CLASS, _CYCLE = 11, 12, 13


def instance_order(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Every image once, in random order.

    Args:
        labels: classes, (N,).

    Returns:
        Positions, (N,).
    """
    return np.random.default_rng((seed, _INSTANCE, epoch)).permutation(len(labels))


def class_balanced_order(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Every class equally often, every image of a class equally often, in random order.

    Think of one endless sequence of draws, of which epoch e takes those from eN to (e+1)N: draw t is of class t mod
    K, and is the (t // K)-th draw of that class, which goes through its images in one permutation after another. So
    counts are within one of each other, between the classes in any epoch and between the images of a class over any
    number of epochs.

    Args:
        labels: classes, (N,).

    Returns:
        Positions, (N,).
    """
    classes = np.unique(labels)
    draws = epoch * len(labels) + np.arange(len(labels))
    order = np.empty(len(labels), dtype=np.int64)
    for slot, k in enumerate(classes):
        members = np.flatnonzero(labels == k)
        mine = draws % len(classes) == slot
        cycle, place = np.divmod(draws[mine] // len(classes), len(members))
        picked = np.empty(len(place), dtype=np.int64)
        for c in np.unique(cycle):
            permutation = np.random.default_rng((seed, _CYCLE, int(k), int(c))).permutation(members)
            picked[cycle == c] = permutation[place[cycle == c]]
        order[mine] = picked
    return np.random.default_rng((seed, _CLASS, epoch)).permutation(order)


ORDERS = {"instance": instance_order, "class_balanced": class_balanced_order}


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler of one rank.

    It yields lists of (position, draw): which image, and the number of the draw since the start of training, from
    which the image's augmentation is derived. Call `set_epoch` before each epoch.

    Args:
        labels: classes of the images to draw from, (N,).
        batch_size: images of one optimizer update, over all ranks and accumulation steps.
        order: a key of `ORDERS`.
        rank, world: this process, and how many there are.
        accumulation: forward passes of one optimizer update.

    Raises:
        ValueError: a batch is too small to give every forward pass of every rank an image.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: int,
        order: str = "instance",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
    ):
        self.labels, self.order, self.seed = np.asarray(labels), order, seed
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self.epoch = self.start = 0
        self.updates = math.ceil(len(self.labels) / batch_size)
        if len(self.labels) // self.updates < accumulation * world:
            least = accumulation * world
            raise ValueError(
                f"batch_size {batch_size} gives batches of {len(self.labels) // self.updates} images; allowed: {least} "
                f"or more, one image for each of {world} ranks x {accumulation} accumulation steps"
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch to draw next, from an update on: a run that is resumed has done the first ones."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Forward passes of this rank in what is left of the epoch."""
        return (self.updates - self.start) * self.accumulation

    def images(self, updates: int) -> int:
        """Images, over all ranks, of the first updates of an epoch."""
        return sum(len(batch) for batch in np.array_split(np.arange(len(self.labels)), self.updates)[:updates])

    def _parts(self, items: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """This rank's parts of the N items, each with the size of the batch it is cut from."""
        for batch in np.array_split(items, self.updates):
            for part in np.array_split(batch, self.accumulation * self.world)[self.rank :: self.world]:
                yield part, len(batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = ORDERS[self.order](self.labels, seed=self.seed, epoch=self.epoch)
        draws = self.epoch * len(order) + np.arange(len(order))
        parts = self._parts(np.stack([order, draws], axis=1))
        for part, _ in islice(parts, self.start * self.accumulation, None):
            yield [(int(position), int(draw)) for position, draw in part]

    def weights(self) -> list[float]:
        """Weight of the mean loss of each forward pass, (len(self),): see the head of this file."""
        parts = islice(self._parts(np.arange(len(self.labels))), self.start * self.accumulation, None)
        return [len(part) * self.accumulation * self.world / batch for part, batch in parts]
