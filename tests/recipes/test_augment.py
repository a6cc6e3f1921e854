"""Batched augmentation against PIL, timm and plain loops that are given the same random numbers."""

import math
from functools import partial

import numpy as np
import pytest
import timm.data.random_erasing
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from recipes.images.augment import (
    Augmentation,
    BatchMix,
    Cutout,
    crop_and_flip,
    erase,
    random_words,
    seeded,
    splitmix64,
)

DRAWS = np.arange(20_000)


def python_splitmix64(state, count):
    """The generator as its authors print it, in integers of any size."""
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def test_splitmix64_gives_the_published_numbers():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(np.array([1234567], dtype=np.uint64), 5)[0].tolist() == known


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.integers(1, 9))
def test_splitmix64_is_the_scalar_generator(states, count):
    words = splitmix64(np.array(states, dtype=np.uint64), count)
    assert words.tolist() == [list(python_splitmix64(state, count)) for state in states]


@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (7, 12345), (2**32 - 1, 10**12)])
def test_words_are_those_of_a_generator_for_each_draw(seed, draw):
    """Written with scalars: so the same run, years later, sees the same images."""
    (key,) = python_splitmix64(seed, 1)
    # A generator's first output is the hash of its state and the constant, which is taken off here.
    (state,) = python_splitmix64((key + draw - 0x9E3779B97F4A7C15) % 2**64, 1)
    assert random_words(seed, np.array([draw]), 5)[0].tolist() == list(python_splitmix64(state, 5))


def test_words_depend_on_seed_and_draw_alone():
    words = random_words(3, DRAWS, 4)
    order = np.random.default_rng(0).permutation(len(DRAWS))
    assert np.array_equal(random_words(3, DRAWS[order], 4), words[order])
    assert np.array_equal(random_words(3, DRAWS[7:8], 2)[0], words[7, :2])
    others = [random_words(4, DRAWS, 4), random_words(3, DRAWS + len(DRAWS), 4)]
    assert len(np.unique(np.concatenate([words, *others]))) == 3 * words.size  # no word twice


def test_words_are_uniform_and_independent():
    """Every bit is even, and uncorrelated with every bit of the next draw, word and seed."""
    words = random_words(0, DRAWS, 3)
    bits = (words[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(DRAWS))
    signs = 2.0 * bits - 1
    other_seed = 2.0 * ((random_words(1, DRAWS, 3)[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)) - 1
    pairs = (signs[:-1, 0], signs[1:, 0]), (signs[:, 0], signs[:, 1]), (signs[:, 0], other_seed[:, 0])
    for first, second in pairs:
        assert abs(first.T @ second / len(first)).max() < 6 / math.sqrt(len(first))


def chi_square(values, cells):
    """Of values in 0..cells-1 against equal frequencies, as standard deviations above its mean."""
    counts, expected = np.bincount(values, minlength=cells), len(values) / cells
    assert len(counts) == cells
    return ((counts - expected) ** 2 / expected).sum() / math.sqrt(2 * (cells - 1)) - math.sqrt((cells - 1) / 2)


def test_crops_and_flips_are_equally_frequent():
    top, left, flip = Augmentation(crop_pad=3, hflip=0.25).choose(0, DRAWS, 8, 8)[:, :3].T
    assert chi_square(7 * top + left, 49) < 5
    assert abs(flip.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(DRAWS))
    for corner in (top, left):
        assert abs(np.corrcoef(corner, flip)[0, 1]) < 5 / math.sqrt(len(DRAWS))


def test_one_augmentation_never_moves_another():
    alone = [dict(crop_pad=2), dict(hflip=0.5), dict(cutout=3), dict(re_prob=0.7)]
    columns = [slice(0, 2), slice(2, 3), slice(3, 7), slice(7, 11)]
    together = Augmentation(**{k: v for one in alone for k, v in one.items()}).choose(1, DRAWS[:99], 8, 9)
    for arguments, some in zip(alone, columns, strict=True):
        assert np.array_equal(Augmentation(**arguments).choose(1, DRAWS[:99], 8, 9)[:, some], together[:, some])


def test_nothing_is_done_unless_asked():
    choices = Augmentation().choose(0, DRAWS, 8, 9)
    assert not choices[:, :3].any()
    for box in (choices[:, 3:7], choices[:, 7:]):
        assert ((box[:, 0] == box[:, 1]) | (box[:, 2] == box[:, 3])).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", [0, 3])
def test_crop_and_flip_is_pils(channels, pad):
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randint, generator=generator)
    images = random(256, (40, channels, 7, 10)).to(torch.uint8)
    top, left, flip = random(2 * pad + 1, (40,)), random(2 * pad + 1, (40,)), random(2, (40,)).bool()
    top[:2], left[:2] = torch.tensor([0, 2 * pad]), torch.tensor([2 * pad, 0])  # the corners
    wanted = []
    for image, y, x, mirror in zip(images, top.tolist(), left.tolist(), flip.tolist(), strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
        picture = ImageOps.expand(picture, pad).crop((x, y, x + 10, y + 7))
        pixels = np.asarray(ImageOps.mirror(picture) if mirror else picture)
        wanted.append(torch.from_numpy(pixels.copy()).view(7, 10, channels).permute(2, 0, 1))
    assert torch.equal(crop_and_flip(images, top, left, flip, pad), torch.stack(wanted))


def test_erase_is_a_slice():
    images = torch.rand(4, 2, 5, 6) + 1
    boxes = [(0, 5, 0, 6), (1, 3, 2, 3), (2, 2, 0, 6), (4, 5, 5, 6)]
    wanted = images.clone()
    for image, (top, bottom, left, right) in zip(wanted, boxes, strict=True):
        image[:, top:bottom, left:right] = 0
    assert torch.equal(erase(images, torch.tensor(boxes)), wanted)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 40), (2, 80)])
def test_random_erasing_is_timms(monkeypatch, height, width):
    """Timm's own code, which asks for random numbers, is given ours in its order; a long image makes it try
    again, or in vain."""
    draws, tries = np.arange(300), []
    words = random_words(5, draws, 28)
    choices = Augmentation(re_prob=0.6).choose(5, draws, height, width)
    real = words / 2**64  # to 53 bits

    class Ours:
        def __init__(self, row):
            self.row, self.shapes, self.corners, self.attempts = row, [], [6, 7], 0

        def random(self):
            return self.row[5]

        def uniform(self, low, high):
            column = (8 if high < 1 else 18) + self.attempts  # an area is below 1, an aspect has log 0.3 to -log 0.3
            self.attempts += column >= 18
            return low + (high - low) * self.row[column]

        def randint(self, low, high):
            return low + int(self.row[self.corners.pop(0)] * (high - low + 1))

    eraser = timm.data.random_erasing.RandomErasing(0.6, device="cpu")
    for row, choice in zip(real, choices, strict=True):
        numbers = Ours(row)
        monkeypatch.setattr(timm.data.random_erasing, "random", numbers)
        wanted = eraser(torch.ones(1, height, width))
        tries.append(numbers.attempts)
        top, bottom, left, right = choice[7:]
        ours = torch.ones(1, height, width)
        ours[:, top:bottom, left:right] = 0
        assert torch.equal(ours, wanted)
    erased = choices[:, 8] > choices[:, 7]
    assert 0 < erased.mean() < 0.7
    assert max(tries) > 3 or width == height
    assert (max(tries) == 10) == (height == 2)


@pytest.mark.parametrize("size", [1, 4, 5, 30])
def test_cutout_is_a_clipped_square(size):
    choices = Augmentation(cutout=size).choose(2, DRAWS[:200], 8, 12)
    words = random_words(2, DRAWS[:200], 5)
    for (top, bottom, left, right), (*_, y, x) in zip(choices[:, 3:7].tolist(), words.tolist(), strict=True):
        y, x = (y >> 32) * 8 >> 32, (x >> 32) * 12 >> 32
        inside = {r for r in range(y - size // 2, y - size // 2 + size) if 0 <= r < 8}
        across = {c for c in range(x - size // 2, x - size // 2 + size) if 0 <= c < 12}
        assert (top, bottom, left, right) == (min(inside), max(inside) + 1, min(across), max(across) + 1)
    assert chi_square(Augmentation(cutout=1).choose(0, DRAWS, 4, 6)[:, [3, 5]] @ [6, 1], 24) < 5


@pytest.mark.parametrize(("size", "before", "after"), [(1, 0, 0), (2, 1, 0), (3, 1, 1), (4, 2, 1)])
def test_both_cutouts_are_a_square_of_that_side(size, before, after):
    """Pixels before and after the centre; of an even number, the odd one is before, as DeVries & Taylor have it."""
    torch.manual_seed(0)
    images = [Cutout(size)(torch.ones(2, 6, 9)) for _ in range(200)]
    torch.manual_seed(0)
    areas = set()
    for image in images:
        y, x = int(torch.randint(6, ())), int(torch.randint(9, ()))
        wanted = torch.ones(2, 6, 9)
        wanted[:, max(y - before, 0) : y + after + 1, max(x - before, 0) : x + after + 1] = 0
        assert torch.equal(image, wanted)
        areas.add(int((wanted[0] == 0).sum()))
    boxes = Augmentation(cutout=size).choose(0, DRAWS, 6, 9)[:, 3:7]
    top, bottom, left, right = boxes.T
    assert max(areas) == ((bottom - top) * (right - left)).max() == size**2
    for first, last, side in ((top, bottom, 6), (left, right, 9)):  # over all centres
        assert set(first) == set(range(side - before)) and set(last) == set(range(after + 1, side + 1))
        pixels = sum(min(before, centre) + 1 + min(after, side - 1 - centre) for centre in range(side))
        assert (last - first).mean() == pytest.approx(pixels / side, abs=0.03)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 8, 8, generator=generator), torch.tensor([0, 2, 1, 2, 0])


def test_mixup_is_one_convex_combination_with_the_reverse(batch):
    images, labels = batch
    mixed, shares = BatchMix(3, mixup_alpha=1.0)(images.clone(), labels, 4, 1)
    # Two of the four that are mixed, 1 and 2, have different classes: their shares tell the weight.
    weight = shares[1, 2].item()
    assert 0 < weight < 1
    hot = torch.eye(3)[labels]
    torch.testing.assert_close(mixed[:4], weight * images[:4] + (1 - weight) * images[:4].flip(0))
    torch.testing.assert_close(shares[:4], weight * hot[:4] + (1 - weight) * hot[:4].flip(0))
    assert torch.equal(mixed[4], images[4]) and torch.equal(shares[4], hot[4])  # the odd one


def test_cutmix_shares_are_those_of_the_pixels(batch):
    images, labels = batch
    seen = set()
    for key in range(20):
        mixed, shares = BatchMix(3, cutmix_alpha=1.0)(images.clone(), labels, key)
        own, other = mixed[1] == images[1], mixed[1] == images[2]
        assert (own | other).all()
        torch.testing.assert_close(shares[1], torch.tensor([0, 1 - own.float().mean(), own.float().mean()]))
        seen.add(own.float().mean().item())
    assert len(seen) > 10


def test_mixing_depends_on_its_key_alone_and_disturbs_no_generator(batch):
    images, labels = batch
    mix = BatchMix(3, mixup_alpha=0.4, cutmix_alpha=1.0, seed=1)
    np.random.seed(5)
    wanted = np.random.rand(4).tolist()
    np.random.seed(5)
    numbers = np.random.rand(2).tolist()
    first = mix(images.clone(), labels, 0, 7)
    numbers += np.random.rand(2).tolist()
    assert numbers == wanted
    assert all(map(torch.equal, first, mix(images.clone(), labels, 0, 7)))
    for other in (mix(images.clone(), labels, 1, 7), BatchMix(3, mixup_alpha=0.4, cutmix_alpha=1.0)(*batch, 0, 7)):
        assert not torch.equal(first[0], other[0])


def test_mixing_takes_a_single_image_and_may_never_happen(batch):
    images, labels = batch
    hot = torch.eye(3)[labels]
    for count, prob in ((1, 1.0), (4, 0.0)):
        mixed, shares = BatchMix(3, mixup_alpha=1.0, prob=prob)(images[:count].clone(), labels[:count], 0)
        assert torch.equal(mixed, images[:count]) and torch.equal(shares, hot[:count])
    with pytest.raises(ValueError, match="mixup_alpha is 0.0 and cutmix_alpha 0.0; allowed: at least one above 0"):
        BatchMix(3)


def test_seeding_is_undone_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(SystemExit), seeded(1):
        torch.rand(1)
        raise SystemExit
    assert torch.equal(torch.get_rng_state(), state)
