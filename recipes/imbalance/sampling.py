"""Class-aware batch sampling, deterministic in (seed, epoch).

Of n_k images of class k, N = sum of n_k images of K classes in all, a strategy asks for so many draws of class k in an
epoch:

    instance                  n_k                                      every image once
    square_root               N sqrt(n_k) / sum of sqrt(n)             Mahajan et al. 2018 (arXiv 1805.00932)
    class_balanced            N / K
    class_aware               N / K, every class once, then again      Shen, Lin & Huang 2016 (arXiv 1512.05830)
    reverse                   N (1 / n_k) / sum of (1 / n)             Zhou et al. 2020 (BBN, arXiv 1912.02413)
    progressively_balanced    (1 - s) n_k + s N / K                    Kang et al. 2020 (arXiv 1910.09217)
    repeat_factor             n_k max(1, sqrt(t N / n_k))              Gupta, Dollar & Girshick 2019 (arXiv 1908.03195)

where s goes from 0 in the first epoch to 1 in the last, and t is the share of the images below which a class is
repeated. Each may be deferred for some epochs of `instance` (Cao et al. 2019, arXiv 1906.07413).

The draws follow quotas, not chance, by one rule on two levels: whole shares first, then the remainders in turn. A class
gets its draws rounded down or up, up for those that are furthest behind their targets so far. Of c draws an image of
the class gets c // n_k or one more, and the images that get one more are neighbours on a circle through the images of
the class, on which every epoch begins where the last one ended. So over any number of epochs the images of a class are
drawn equally often, within one. All epochs are equally long, so schedules need not know: repeat factors, which the
original rounds at random, draw the expected number of images.

An epoch is cut into ceil(draws / batch_size) nearly equal batches, one for each optimizer update; each batch is cut
into `accumulation x world` nearly equal parts, one for each forward pass of each rank. So no batch is ever tiny, which
BatchNorm needs, no image is repeated to fill up a rank, and the batches of an update are the same on any number of
ranks.

A batch of B images is cut into parts of sizes b_1, b_2, ..., of which some are one larger than others. Every part
reports the mean of its losses; DDP averages over ranks and accelerate over accumulation steps. With the weight  b x
accumulation x world / B  on each part the result is the mean over the B images, exactly.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from recipes.errors import UserError

# One random stream per purpose.
_ORDER, _CIRCLE = 11, 12

# Draws of each class in an epoch, (K,), given n (K,), s and t.
STRATEGIES: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "instance": lambda n, s, t: n,
    "square_root": lambda n, s, t: n.sum() * np.sqrt(n) / math.fsum(np.sqrt(n)),
    "class_balanced": lambda n, s, t: np.full_like(n, n.mean()),
    "class_aware": lambda n, s, t: np.full_like(n, n.mean()),
    "reverse": lambda n, s, t: n.sum() / n / math.fsum(1 / n),
    "progressively_balanced": lambda n, s, t: (1 - s) * n + s * n.mean(),
    "repeat_factor": lambda n, s, t: n * np.maximum(1, np.sqrt(t * n.sum() / n)),
}


def round_to_quotas(targets: np.ndarray) -> np.ndarray:
    """Round targets to whole draws that stay close to them in every epoch and over any number of epochs.

    Args:
        targets: draws wanted in each epoch of each class, (E, K), every row with a whole sum.

    Returns:
        Draws (E, K) with the same sums of rows, each the target rounded down or up. Their sums over any number of
        epochs stay close to those of the targets: the largest gap in 3000 random tables was 1.02.
    """
    counts = np.floor(targets).astype(np.int64)
    behind = np.zeros(targets.shape[1])
    for target, count in zip(targets, counts, strict=True):
        behind += target - count
        left = round(math.fsum(target)) - count.sum()
        # Rounded, or the order of addition would decide between classes that are equally far behind.
        urgency = np.where(target > count, np.round(behind, 6), -np.inf)
        furthest = np.argsort(-urgency, kind="stable")[:left]
        count[furthest] += 1
        behind[furthest] -= 1
    return counts


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler of one rank.

    It yields lists of (position, draw): which image, and the number of the draw since the start of training, from
    which the image's augmentation is derived. Call `set_epoch` before each epoch. It does not count what it has
    yielded, because the workers of a loader run ahead of training.

    It shares out the batches among the ranks itself, so the loader is not for `accelerator.prepare`, which would split
    each rank's part again.

    Args:
        labels: classes of the images to draw from, (N,).
        batch_size: images of one optimizer update, over all ranks and accumulation steps.
        strategy: a key of `STRATEGIES`.
        rank, world: this process, and how many there are.
        accumulation: forward passes of one optimizer update.
        epochs: of the whole training, for `progressively_balanced`.
        threshold: for `repeat_factor`: t, the share of the images below which a class is repeated; 1/K, the share of
            a class in a balanced set, if not given.
        deferred_epochs: epochs of `instance` before the strategy begins.

    Attributes:
        num_samples: images of one epoch over all ranks: N, or more with `repeat_factor`.
        updates: optimizer updates of one epoch.

    Raises:
        UserError: an unknown strategy, or one that lacks its setting; a batch too small to give every forward pass of
            every rank an image.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: int,
        strategy: str = "instance",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        epochs: int | None = None,
        threshold: float | None = None,
        deferred_epochs: int = 0,
    ):
        if strategy not in STRATEGIES:
            raise UserError(f"strategy is {strategy!r}; allowed: {', '.join(STRATEGIES)}")
        if strategy == "progressively_balanced" and epochs is None:
            raise UserError("epochs is None; allowed: the epochs of training, with strategy 'progressively_balanced'")
        if threshold is not None and not 0 < threshold <= 1:
            raise UserError(f"threshold is {threshold:g}; allowed: above 0, at most 1, a share of the images")
        if deferred_epochs < 0:
            raise UserError(f"deferred_epochs is {deferred_epochs}; allowed: 0 or more epochs")
        self.strategy, self.seed, self.epochs, self.deferred_epochs = strategy, seed, epochs, deferred_epochs
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self.classes, self.labels, self.sizes = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
        self.members = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(self.sizes)[:-1])
        self.threshold = 1 / len(self.classes) if threshold is None else threshold
        self.epoch = self.start = 0
        self.num_samples = round(math.fsum(self._target_counts(deferred_epochs)))
        self.updates = math.ceil(self.num_samples / batch_size)
        if self.num_samples // self.updates < accumulation * world:
            least = accumulation * world
            raise UserError(
                f"batch_size {batch_size} gives batches of {self.num_samples // self.updates} images; allowed: {least} "
                f"or more, one image for each of {world} ranks x {accumulation} accumulation steps"
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and where in it to start.

        Args:
            epoch: from 0.
            start: updates of this epoch already made, which are left out.
        """
        if not 0 <= start <= self.updates:
            raise ValueError(f"start is {start}; allowed: 0 to {self.updates}, the updates of an epoch")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Forward passes of this rank in what is left of the epoch."""
        return (self.updates - self.start) * self.accumulation

    def images(self, updates: int) -> int:
        """Count the images, over all ranks, of the first updates of an epoch, wherever it was started."""
        return sum(len(batch) for batch in np.array_split(np.arange(self.num_samples), self.updates)[:updates])

    def samples_per_class(self, updates: int) -> np.ndarray:
        """Count the draws of each class in the first updates of this epoch, over all ranks, wherever it was started.

        Returns:
            (K,), with K - 1 the largest class.
        """
        drawn = self.labels[self._drawn()[: self.images(updates)]]
        return np.bincount(self.classes[drawn], minlength=self.classes[-1] + 1)

    def weights(self) -> list[float]:
        """Weight of the mean loss of each forward pass, (len(self),): see the head of this file."""
        parts = self._parts(np.arange(self.num_samples))
        return [len(part) * self.accumulation * self.world / batch for part, batch in parts]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draws = self.epoch * self.num_samples + np.arange(self.num_samples)
        for part, _ in self._parts(np.stack([self._drawn(), draws], axis=1)):
            yield [(int(position), int(draw)) for position, draw in part]

    def _parts(self, items: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Yield this rank's parts of the items from the start on, each with the size of the batch it is cut from."""
        for batch in np.array_split(items, self.updates)[self.start :]:
            for part in np.array_split(batch, self.accumulation * self.world)[self.rank :: self.world]:
                yield part, len(batch)

    def _target_counts(self, epoch: int) -> np.ndarray:
        """Draws of each class in an epoch, before they are scaled to its length, (K,)."""
        strategy = self.strategy if epoch >= self.deferred_epochs else "instance"
        last = (self.epochs or 1) - 1 - self.deferred_epochs
        s = min((epoch - self.deferred_epochs) / last, 1.0) if last > 0 else 0.0
        return STRATEGIES[strategy](self.sizes.astype(float), s, self.threshold)

    def _counts(self, epochs: int) -> np.ndarray:
        """Draws of each class in the first epochs, (epochs, K)."""
        targets = np.empty((epochs, len(self.classes)))
        for epoch, target in enumerate(targets):
            wanted = self._target_counts(epoch)
            target[:] = np.round(
                wanted * (self.num_samples / math.fsum(wanted)), 9
            )  # rounded, so that whole numbers are whole
        return round_to_quotas(targets)

    def _drawn(self) -> np.ndarray:
        """Positions in the order in which this epoch draws them, (draws,)."""
        counts = self._counts(self.epoch + 1)
        whole, extra = np.divmod(counts, self.sizes)
        begin = extra[:-1].sum(0)
        times = whole[-1][self.labels]
        for k in np.flatnonzero(extra[-1]):
            stream = np.random.default_rng((self.seed, _CIRCLE, int(self.classes[k])))
            circle = stream.permutation(self.members[k])
            times[circle[(begin[k] + np.arange(extra[-1, k])) % self.sizes[k]]] += 1
        stream = np.random.default_rng((self.seed, _ORDER, self.epoch))
        drawn = stream.permutation(np.repeat(np.arange(len(times)), times))
        if self.strategy == "class_aware" and self.epoch >= self.deferred_epochs:
            drawn = drawn[np.argsort(_earlier(drawn), kind="stable")]  # a class repeats no image before all are drawn
            drawn = drawn[
                np.argsort(_earlier(self.labels[drawn]) + stream.random(self.num_samples))
            ]  # every class, again
        return drawn


def _earlier(values: np.ndarray) -> np.ndarray:
    """Count the equal values before each value, (N,)."""
    order = np.argsort(values, kind="stable")
    earlier = np.empty(len(values), dtype=np.int64)
    earlier[order] = np.arange(len(values)) - np.searchsorted(values[order], values[order])
    return earlier
