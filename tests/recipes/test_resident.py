"""Resident images and the choice between them and workers, against PIL and the loaders that decode anew."""

import io
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from accelerate.utils import tqdm
from PIL import Image, ImageOps

from recipes.images.augment import Augmentation
from recipes.images.pipeline import choose_pipeline
from recipes.images.resident import ResidentLoader, decode
from recipes.images.sources import CorruptImageError, ImageSplit
from recipes.images.views import ImageView, eval_loader, eval_transform
from recipes.imbalance.sampling import EpochSampler

CONFIG = dict(input_size=(3, 12, 10), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), interpolation="bicubic", crop_pct=0.9)
GREY = CONFIG | {"input_size": (1, 12, 10), "mean": (0.45,), "std": (0.22,)}
INDICES = np.arange(40, 3, -1)


@pytest.fixture(autouse=True, scope="module")
def impatient():
    """Torch looks every 5 seconds whether a worker is alive, and waits as long for one that has met an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
        yield


def encoded(sizes):
    """A split of pictures of several sizes, grey and coloured ones, as PNG."""
    rng = np.random.default_rng(0)
    images = []
    for i, (height, width) in enumerate(sizes):
        shape = (height, width) if i % 5 == 0 else (height, width, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(buffer := io.BytesIO(), "png")
        images.append({"bytes": buffer.getvalue(), "path": None})
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))
    return ImageSplit("train", rows, "image", np.arange(len(images)) % 3, ("a", "b", "c"))


@pytest.fixture(scope="module")
def split():
    return encoded([(8 + i % 7, 16 - i % 5) for i in range(50)])


@pytest.mark.parametrize("config", [CONFIG, GREY, CONFIG | {"crop_mode": "border"}, CONFIG | {"crop_mode": "squash"}])
def test_evaluation_gets_the_tensors_that_workers_give(split, config):
    images = decode(split, INDICES, config)
    view = ImageView(split, INDICES, eval_transform(config), channels=config["input_size"][0])
    dealing = dict(batch_size=9, rank=1, world=2)
    wanted = list(eval_loader(view, **dealing, workers=0))
    pipelines = (  # which augment in training alone
        choose_pipeline(mode, images=37, data_config=config, augmentation={"crop_pad": 2, "hflip": 1.0})
        for mode in ("resident", "workers")
    )
    for loader in (
        ResidentLoader(images, [range(9, 18), range(27, 36)], config),
        *(pipeline.load(split, INDICES).eval_loader(**dealing) for pipeline in pipelines),
    ):
        assert len(loader) == len(wanted) == 2
        for (x, labels), (other, other_labels) in zip(loader, wanted, strict=True):
            assert x.dtype == torch.float32 and labels.dtype == torch.int64
            assert torch.equal(x, other) and torch.equal(labels, other_labels)


def test_decoding_in_processes_changes_nothing(split, monkeypatch):
    alone = decode(split, INDICES, CONFIG, workers=0)
    monkeypatch.setattr("recipes.images.resident._AT_ONCE", 4 * 360 + 5)  # batches of four
    assert torch.equal(decode(split, INDICES, CONFIG, workers=2).pixels, alone.pixels)
    assert len(alone) == 37 and alone.pixels.dtype == torch.uint8


def by_pil(split, row, choice, pad):
    """One augmented image: timm's frame, then PIL, NumPy and slices."""
    picture = split.read(int(row), "RGB")
    for transform in eval_transform(CONFIG).transforms[:-2]:
        picture = transform(picture)
    top, left, flip, *boxes = choice.tolist()
    picture = ImageOps.expand(picture, pad).crop((left, top, left + 10, top + 12))
    picture = ImageOps.mirror(picture) if flip else picture
    mean, std = (np.array(CONFIG[key], dtype=np.float32) for key in ("mean", "std"))
    pixels = (np.asarray(picture, dtype=np.float32) / np.float32(255) - mean) / std
    for a, b, c, d in (boxes[:4], boxes[4:]):
        pixels[a:b, c:d] = 0
    return torch.from_numpy(pixels).permute(2, 0, 1)


AUGMENTATION = dict(crop_pad=3, hflip=0.5, cutout=4, re_prob=0.5)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_decodes_the_images_whether_it_shows_a_bar_or_not(split, monkeypatch, rank):
    monkeypatch.setattr("recipes.images.resident._AT_ONCE", 2000)  # several batches
    monkeypatch.setattr("recipes.images.resident.tqdm", partial(tqdm, disable=rank > 0))
    frame = eval_transform(CONFIG).transforms[:-2]
    for picture, index in zip(decode(split, INDICES, CONFIG).pixels, INDICES, strict=True):
        image = split.read(int(index), "RGB")
        for part in frame:
            image = part(image)
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), np.asarray(image))


def test_training_images_are_pils_by_seed_and_draw(split):
    training = choose_pipeline(images=37, data_config=CONFIG, augmentation=AUGMENTATION, seed=9)
    images = training.load(split, INDICES)
    assert len(images) == 37 and images.labels.tolist() == [i % 3 for i in range(40, 3, -1)]
    (sampler := EpochSampler(images.labels, batch_size=10, seed=2)).set_epoch(3)
    loader = images.train_loader(sampler)
    assert len(loader) == len(sampler)
    for (x, labels), batch in zip(loader, sampler, strict=True):
        for image, label, (position, draw) in zip(x, labels, batch, strict=True):
            choice = Augmentation(**AUGMENTATION).choose(9, np.array([draw]), 12, 10)[0]
            assert torch.equal(image, by_pil(split, INDICES[position], choice, 3))
            assert label == split.labels[INDICES[position]]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 2)])
def test_ranks_and_accumulation_share_the_images_of_one_process(split, world, accumulation):
    images = choose_pipeline(images=37, data_config=CONFIG, augmentation=AUGMENTATION, seed=9).load(split, INDICES)

    def batches(**arguments):
        (sampler := EpochSampler(images.labels, batch_size=10, **arguments)).set_epoch(1)
        return [x for x, _ in images.train_loader(sampler)]

    ranks = [batches(rank=rank, world=world, accumulation=accumulation) for rank in range(world)]
    parts = [ranks[rank][i] for i in range(len(ranks[0])) for rank in range(world)]
    assert torch.equal(torch.cat(parts), torch.cat(batches()))


def test_without_augmentation_both_ways_train_on_what_evaluation_sees(split):
    sets = [choose_pipeline(mode, images=37, data_config=CONFIG).load(split, INDICES) for mode in ("auto", "workers")]
    sampler = EpochSampler(sets[0].labels, batch_size=10)
    for (x, _), (other, _), batch in zip(*(s.train_loader(sampler) for s in sets), sampler, strict=True):
        assert torch.equal(x, other)
        positions = [position for position, _ in batch]
        assert torch.equal(x, next(iter(ResidentLoader(sets[0].images, [positions], CONFIG)))[0])


def test_the_budget_decides_to_the_byte():
    arguments = dict(images=7, data_config=CONFIG, augmentation=dict(crop_pad=2, hflip=0.5, re_prob=0.1))
    need = 7 * 3 * 12 * 10
    fits, exceeds = (choose_pipeline(**arguments, budget_bytes=need - less) for less in (0, 1))
    assert fits.resident and not exceeds.resident
    wide = choose_pipeline(images=1 << 20, data_config=CONFIG | {"input_size": (3, 32, 32)})
    assert wide.describe() == (
        "workers: 1048576 images of 3 x 32 x 32 bytes take 3 GiB on cpu, above the budget of 2 GiB"
    )
    assert (
        choose_pipeline("resident", **arguments, budget_bytes=0).describe().startswith("resident: as asked; 7 images")
    )
    assert choose_pipeline("workers", **arguments).describe() == "workers: as asked"


@pytest.mark.parametrize("extra", [dict(auto_augment="rand-m9-mstd0.5"), dict(color_jitter=0.4), dict(crop_scale=0.3)])
def test_what_changes_one_image_at_a_time_needs_workers(split, extra):
    ((name, value),) = extra.items()
    arguments = dict(images=37, data_config=CONFIG, augmentation=AUGMENTATION | extra, workers=0)
    pipeline = choose_pipeline(**arguments)
    assert pipeline.describe() == f"workers: {name} {value!r} augments each image by itself"
    images = pipeline.load(split, INDICES)
    x, labels = next(iter(images.train_loader(EpochSampler(images.labels, batch_size=10))))
    assert x.shape == (len(labels), 3, 12, 10)
    with pytest.raises(ValueError, match=f"pipeline is 'resident' with {name} .*; allowed: 'auto' or 'workers'"):
        choose_pipeline("resident", **arguments)
    unused = dict.fromkeys(["auto_augment", "crop_scale"]) | {"color_jitter": 0.0}
    assert choose_pipeline("resident", **arguments | {"augmentation": unused}).resident


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="pipeline is 'gpu'; allowed: 'auto', 'resident', 'workers'"):
        choose_pipeline("gpu", images=1, data_config=CONFIG)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["resident", "workers"])
def test_an_unknown_augmentation_is_an_error(split, mode):
    images = choose_pipeline(mode, images=2, data_config=CONFIG, augmentation={"zoom": 2}).load(split, [0, 1])
    with pytest.raises(TypeError, match="zoom"):
        images.train_loader(EpochSampler(images.labels, batch_size=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_when_it_is_decoded(split, workers):
    content = split.rows.with_format("arrow")[:]["image"].to_pylist()
    content[33]["bytes"] = content[33]["bytes"][:60]
    rows = datasets.Dataset.from_dict({"image": content}, features=split.rows.features)
    damaged = ImageSplit("train", rows, "image", split.labels, split.class_names)
    with pytest.raises(CorruptImageError) as raised:
        decode(damaged, INDICES, CONFIG, workers=workers)
    assert str(raised.value).startswith("image 33 of split 'train' cannot be decoded: ")
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_images(split):
    arguments = dict(images=37, data_config=CONFIG, augmentation=AUGMENTATION)
    here, there = (choose_pipeline(**arguments, device=device).load(split, INDICES) for device in ("cpu", "cuda"))
    sampler = EpochSampler(here.labels, batch_size=10)
    for (x, labels), (other, other_labels) in zip(here.train_loader(sampler), there.train_loader(sampler), strict=True):
        assert other.is_cuda and torch.equal(x, other.cpu()) and torch.equal(labels, other_labels.cpu())
