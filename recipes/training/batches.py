"""The images of a run, and the batches in which the model sees them."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from recipes.errors import check, user_errors
from recipes.images.augment import BatchMix
from recipes.images.duplicates import shared_images
from recipes.images.labels import shorten
from recipes.images.pipeline import Loader, choose_pipeline
from recipes.images.sources import CorruptImageError, ImageSplit, load_like, load_split, open_dataset
from recipes.images.views import eval_transform, find_corrupt, train_transform
from recipes.imbalance.sampling import EpochSampler
from recipes.settings.config import TrainConfig
from recipes.training.checkpoint import saved_class_names
from recipes.training.manifest import Manifest, choose_images

AUGMENTATION = ("crop_pad", "crop_scale", "hflip", "color_jitter", "auto_augment", "re_prob", "cutout")


class RunImages:
    """The images of a run, chosen but not decoded yet.

    Validation is carved out before the imbalance is made, so it is as balanced as the data set is.

    Attributes:
        class_names: names of the K classes.
        manifest: which images are trained on and validated on.
        rows: the splits 'train', 'val' and 'test', each a split of the data set and the rows taken from it.
        notes: lines for the log, on what is not as it is mostly.

    Raises:
        UserError: no such data set, split or column, or images that do not allow the imbalance.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        with user_errors(), accelerator.main_process_first():
            source = open_dataset(config.dataset, config.dataset_config, config.dataset_revision)
        has_test = check_splits(config, source)
        names = None if config.manifest is None else Manifest.load(config.manifest).class_names
        columns = config.only("image_column", "label_column")
        train = load_split(source, config.train_split, class_names=names, whose="the manifest", **columns)
        train = match_model(config, train)
        self.notes: list[str] = []
        if saved_class_names(config.model) not in (None, [*train.class_names]):
            self.notes.append(f"classes          of other names than those of model {config.model}, taken by number")
        self.class_names = train.class_names
        self.manifest: Manifest = choose_images(config, train)
        chosen = {"train": self.manifest.indices, "val": self.manifest.validation, "test": self.manifest.test or []}
        self.rows = {name: (train, np.asarray(indices, dtype=np.int64)) for name, indices in chosen.items()}
        for name, split in (("val", config.val_split), ("test", config.test_split if has_test else None)):
            if split is None and name == "test":
                self.notes.append(f"test images      {len(chosen[name])}, taken from split {train.name!r}")
            elif split is not None:
                images = load_like(source, split, train)
                self.rows[name] = images, np.arange(len(images.labels))
        if config.skip_corrupt:
            self._skip_corrupt(config, accelerator)

    def _skip_corrupt(self, config: TrainConfig, accelerator: Accelerator) -> None:
        """Leave out images that cannot be decoded, and list them.

        Raises:
            CorruptImageError: there are too many.
        """
        sharing = {"rank": accelerator.process_index, "world": accelerator.num_processes}
        most, skipped = config.skip_corrupt, dict[str, dict[int, str]]()
        for name, (split, indices) in self.rows.items():
            skipped[name] = find_corrupt(split, indices, workers=config.workers, most=most, **sharing)
            most -= len(skipped[name])
            if most < 0:
                messages = [message for found in skipped.values() for message in found.values()]
                raise CorruptImageError(
                    f"skip_corrupt is {config.skip_corrupt}, and there are more: {'; '.join(messages[:5])}"
                )
            left = np.setdiff1d(indices, [*skipped[name]])
            self.rows[name] = split, left
            self.notes += [f"skipped          {message}" for message in skipped[name].values()]
        self.manifest = self.manifest.without(skipped, self.rows)

    def shared(self) -> list[str]:
        """Say which of the three have images in common."""
        return shared_images({name: rows for name, rows in self.rows.items() if len(rows[1])})


def check_splits(config: TrainConfig, source: Mapping[str, Any]) -> bool:
    """Make sure that there are images to train, to validate and to test on, each their own.

    Returns:
        Whether the data set has a test split, so that none is to be carved from the train split.

    Raises:
        UserError: a split is not there, or is asked for twice.
    """
    given = {name: getattr(config, name) for name in ("train_split", "val_split", "test_split")}
    for i, (name, split) in enumerate(given.items()):
        others = [other for other in source if other not in [*given.values()][:i]]
        absent = name == "test_split" and split not in source
        if absent and config.test_fraction is not None or split is None:
            continue
        hint = ", or --test_fraction 0.2 to take the test images from the train split" if absent else ""
        check(split in others, name, split, f"{shorten(others)}{hint}")
    fraction = config.test_fraction
    has_test = config.test_split in source
    check(not (has_test and fraction), "test_fraction", fraction, f"not given, with a split {config.test_split!r}")
    return has_test


def match_model(config: TrainConfig, train: ImageSplit) -> ImageSplit:
    """Give the classes the numbers that the outputs of a trained model have, by their names.

    Raises:
        UserError: a classifier that is to be kept is of other classes, or a manifest has them in another order.
    """
    names = saved_class_names(config.model)
    if names is None or names == [*train.class_names]:
        return train
    if set(names) != set(train.class_names):
        same = f"model {config.model!r} has classes {shorten(names)}"
        check(config.stage is None, "dataset", config.dataset, f"one of the same classes with a stage, as {same}")
        return train
    check(
        config.manifest is None, "manifest", config.manifest, f"one with the classes in the order of {config.model!r}"
    )
    return train.renumbered(names, f"model {config.model!r}")


class Batches:
    """The batches of one rank, in training and in evaluation.

    Loaders are not given to `accelerator.prepare`, which would repeat images to fill up ranks.

    Args:
        data_config: preprocessing of the model, as `timm.data` resolves it.

    Attributes:
        sampler: the order of training.
        pipeline: how images are decoded and augmented.
        sizes: after `load`: images of each split.
        evaluation: after `load`: a loader of each split, every image once over all ranks.

    Raises:
        UserError: an augmentation, a batch size or a pipeline that the images or the model do not allow.
    """

    def __init__(self, config: TrainConfig, images: RunImages, data_config: dict[str, Any], accelerator: Accelerator):
        self.rank, self.world, self.device = accelerator.process_index, accelerator.num_processes, accelerator.device
        self.accumulation, self.eval_batch_size = config.gradient_accumulation_steps, config.eval_batch_size
        self.rows = images.rows
        with user_errors():
            self.pipeline = choose_pipeline(
                config.pipeline,
                images=sum(len(indices) for _, indices in images.rows.values()),
                data_config=data_config,
                augmentation=config.only(*AUGMENTATION),
                device=self.device,
                budget_bytes=int(config.budget * 2**20),
                **config.only("seed", "workers"),
            )
        self._try_transforms(config, data_config)
        train, indices = images.rows["train"]
        self.sampler = EpochSampler(
            train.labels[indices],
            strategy=config.sampler,
            rank=self.rank,
            world=self.world,
            accumulation=self.accumulation,
            threshold=config.repeat_threshold,
            deferred_epochs=config.defer,
            **config.only("batch_size", "seed", "epochs"),
        )
        self.mix = None
        if config.mixup_alpha or config.cutmix_alpha:
            prob = 1.0 if config.mix_prob is None else config.mix_prob
            alphas = config.only("mixup_alpha", "cutmix_alpha", "seed")
            self.mix = BatchMix(len(images.class_names), prob=prob, **alphas)

    def _try_transforms(self, config: TrainConfig, data_config: dict[str, Any]) -> None:
        """Transform a black image, so that settings that do not work are refused before anything is written."""
        picture = Image.new({1: "L", 3: "RGB"}[data_config["input_size"][0]], (64, 64))
        with user_errors(Exception, what=f"interpolation {data_config['interpolation']!r} cannot be used: "):
            eval_transform(data_config)(picture)
        if not self.pipeline.resident:
            with user_errors(Exception, what=f"auto_augment {config.auto_augment!r} cannot be used: "):
                train_transform(data_config, **config.only(*AUGMENTATION))(picture)

    def load(self, *, check: bool) -> None:
        """Decode what is to stay in memory, and make the loaders.

        Args:
            check: whether to look for corrupt images among those that are decoded later.

        Raises:
            CorruptImageError: an image cannot be decoded.
        """
        ranks = {"rank": self.rank, "world": self.world}
        sets = {name: self.pipeline.load(*rows, check=check, **ranks) for name, rows in self.rows.items()}
        sharing = {"batch_size": self.eval_batch_size, "rank": self.rank, "world": self.world}
        self.sizes = {name: len(images) for name, images in sets.items()}
        self.training: Loader = sets["train"].train_loader(self.sampler)
        self.evaluation: dict[str, Loader] = {name: each.eval_loader(**sharing) for name, each in sets.items()}

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield the training batches of an epoch, on the device.

        Args:
            epoch: from 1.
            start: updates of the epoch already made, whose batches are left out.

        Yields:
            Images (B, C, H, W), labels (B,) or distributions over the classes (B, K), and the weight of their mean loss
            in the update.
        """
        self.sampler.set_epoch(epoch - 1, start=start)
        weights = self.sampler.weights()
        first = start * self.accumulation
        for forward, ((images, labels), weight) in enumerate(zip(self.training, weights, strict=True), first):
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            if self.mix is not None:  # this part of the epoch, counted over all ranks
                images, labels = self.mix(images, labels, epoch, forward * self.world + self.rank)
            yield images, labels, weight
