"""Random crops, flips and erased boxes of whole batches, on the device that holds the images.

What happens to an image is a function of (seed, draw) alone, of no other image and no state: word w of draw d is output
w of the generator SplitMix64 whose initial state is a hash of seed and d. So training sees the same pixels on any
number of ranks, however batches are cut, and after any interruption. The words are drawn by NumPy and turned into whole
numbers of pixels before they go to the device, hence are the same on every device.

Sources: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (numbers as a hash of a
counter); Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torch.nn import functional as F

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd

# Which words of a draw serve which purpose, so that one augmentation never moves another.
_TOP, _LEFT, _FLIP, _CUT_Y, _CUT_X, _ERASE, _ERASE_TOP, _ERASE_LEFT = range(8)
_TRIES = 10  # boxes that are tried until one is smaller than the image
_AREAS, _ASPECTS = slice(8, 8 + _TRIES), slice(8 + _TRIES, 8 + 2 * _TRIES)
_WORDS = 8 + 2 * _TRIES


def splitmix64(states: np.ndarray, count: int) -> np.ndarray:
    """The first outputs of a SplitMix64 generator for each initial state.

    Args:
        states: (B,), uint64.

    Returns:
        (B, count), uint64.
    """
    return _mix(states[:, None] + _GAMMA * np.arange(1, count + 1, dtype=np.uint64))


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> 31)


def random_words(seed: int, draws: np.ndarray, count: int) -> np.ndarray:
    """Random words of each draw, of which row b depends on `seed` and `draws[b]` alone.

    Args:
        draws: numbers of draws, (B,), 0 or more.

    Returns:
        (B, count), uint64.
    """
    key = splitmix64(np.array([seed], dtype=np.uint64), 1)[0]
    return splitmix64(_mix(key + draws.astype(np.uint64)), count)


def _below(words: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
    """Integers uniform in 0..limit-1 for limits below 2^32, by the upper 32 bits (Lemire, arXiv 1805.10941)."""
    return ((words >> 32) * np.asarray(limits, dtype=np.uint64) >> 32).astype(np.int64)


def _uniform(words: np.ndarray) -> np.ndarray:
    """Numbers uniform in [0, 1), float64."""
    return (words >> 11) * 2.0**-53


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may happen to an image: it is cropped out of padding, flipped, and loses boxes of pixels.

    Args:
        crop_pad: pixels of black padding on every side before a random crop to the image's size.
        hflip: probability of a horizontal flip.
        cutout: side in pixels of a square around a random pixel that is set to the mean; 0 for none (DeVries & Taylor,
            arXiv 1708.04552).
        re_prob: probability of random erasing, which sets a box of 2 % to 33 % of the area and aspect 0.3 to 3.3 to
            the mean, as timm does it (Zhong et al., arXiv 1708.04896).
    """

    crop_pad: int = 0
    hflip: float = 0.0
    cutout: int = 0
    re_prob: float = 0.0

    def choose(self, seed: int, draws: np.ndarray, height: int, width: int) -> np.ndarray:
        """What happens to the image of each draw.

        Args:
            draws: numbers of draws, (B,).
            height, width: of the images, in pixels.

        Returns:
            (B, 11), int64: top and left corner of the crop in the padded image; 1 for a flip; and two boxes (top,
            bottom, left, right), empty ones for nothing to erase.
        """
        words = random_words(seed, draws, _WORDS)
        crop = _below(words[:, [_TOP, _LEFT]], 2 * self.crop_pad + 1)
        flip = _uniform(words[:, _FLIP]) < self.hflip
        sizes = np.array([height, width])
        centre = _below(words[:, [_CUT_Y, _CUT_X]], sizes)
        first = centre - self.cutout // 2
        cut = np.clip(np.stack([first, first + self.cutout], axis=2), 0, sizes[:, None])  # (B, y or x, first or last)
        return np.column_stack([crop, flip, cut.reshape(-1, 4), self._erased(words, height, width)])

    def _erased(self, words: np.ndarray, height: int, width: int) -> np.ndarray:
        """Box of random erasing, (B, 4): the first of some that is smaller than the image in both directions."""
        areas = height * width * (0.02 + (1 / 3 - 0.02) * _uniform(words[:, _AREAS]))
        aspects = np.exp(np.log(0.3) * (1 - 2 * _uniform(words[:, _ASPECTS])))
        heights, widths = (np.rint(np.sqrt(x)).astype(np.int64) for x in (areas * aspects, areas / aspects))
        fits = (heights < height) & (widths < width)
        first = np.arange(len(words)), fits.argmax(1)
        erase = fits[first] & (_uniform(words[:, _ERASE]) < self.re_prob)
        h, w = (np.where(erase, x[first], 0) for x in (heights, widths))
        top, left = _below(words[:, _ERASE_TOP], height - h + 1), _below(words[:, _ERASE_LEFT], width - w + 1)
        return np.stack([top, top + h, left, left + w], axis=1)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Crop each image to its size out of `pad` pixels of zeros on every side, then flip some.

    Args:
        images: (B, C, H, W).
        top, left: corner of each crop in the padded image, (B,), 0 to 2 pad.
        flip: whether to flip each image left to right, (B,), bool.
    """
    channels, height, width = images.shape[1:]
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], columns.flip(0), columns)
    padded = F.pad(images, (pad,) * 4)
    strips = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
    return strips.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set a box of each image, (B, C, H, W), to zero in place; boxes (B, 4) are top, bottom, left, right."""
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    y, x = (torch.arange(size, device=images.device) for size in images.shape[2:])
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class Cutout:
    """`Augmentation.cutout` of one normalised image (C, H, W), from torch's generator: a transform for workers."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        spans = []
        for side in image.shape[1:]:
            first = int(torch.randint(side, ())) - self.size // 2
            spans += [max(first, 0), first + self.size]
        return erase(image[None], torch.tensor([spans]))[0]


class BatchMix:
    """Mixup or cutmix of a batch with its reverse, by timm's `Mixup`.

    A batch is mixed with itself, so unlike the other augmentations this one depends on how batches are cut, but on
    nothing else: equal keys mix equally. The last image of an odd batch, which timm does not take, stays as it is.

    Args:
        num_classes: K.
        mixup_alpha: parameter of the beta distribution of mixup's weights; 0 for no mixup (Zhang et al., arXiv
            1710.09412).
        cutmix_alpha: the same for cutmix (Yun et al., arXiv 1905.04899). With both, each batch gets one of them.
        prob: probability that a batch is mixed.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        seed: int = 0,
    ):
        if not (mixup_alpha > 0 or cutmix_alpha > 0):
            raise ValueError(
                f"mixup_alpha is {mixup_alpha} and cutmix_alpha {cutmix_alpha}; allowed: at least one above 0"
            )
        self.num_classes, self.seed = num_classes, seed
        self.mixup = Mixup(mixup_alpha, cutmix_alpha, prob=prob, label_smoothing=0.0, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Mix a batch in place.

        Args:
            images: (B, C, H, W), normalised.
            labels: (B,).
            key: numbers of this batch among all of training, such as the epoch, and of the part in it.

        Returns:
            The images, and the share of each class, (B, K), which label smoothing may still be applied to.
        """
        even = len(labels) // 2 * 2
        with seeded(self.seed, *key):
            _, shares = self.mixup(images[:even], labels[:even])
        return images, torch.cat([shares, mixup_target(labels[even:], self.num_classes)])


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed the three generators that transforms draw from, and put their states back afterwards."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
