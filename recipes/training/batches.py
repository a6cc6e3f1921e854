"""The images of a run, and the batches in which the model sees them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from recipes.errors import user_errors
from recipes.images.augment import BatchMix
from recipes.images.pipeline import Loader, choose_pipeline
from recipes.images.sources import load_splits, open_dataset
from recipes.images.views import eval_transform, train_transform
from recipes.imbalance.sampling import EpochSampler
from recipes.settings.config import TrainConfig
from recipes.training.manifest import Manifest, choose_images

AUGMENTATION = ("crop_pad", "crop_scale", "hflip", "color_jitter", "auto_augment", "re_prob", "cutout")


class RunImages:
    """The images of a run, chosen but not decoded yet.

    Validation is carved out before the imbalance is made, so it is as balanced as the data set is.

    Attributes:
        class_names: names of the K classes.
        manifest: which images are trained on and validated on.
        rows: the splits 'train', 'val' and 'test', each a split of the data set and the rows taken from it.

    Raises:
        UserError: no such data set, split or column, or images that do not allow the imbalance.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        columns = config.only("train_split", "test_split", "image_column", "label_column")
        with user_errors():
            with accelerator.main_process_first():
                source = open_dataset(config.dataset, config.dataset_config, config.dataset_revision)
            train, test = load_splits(source, **columns)
        self.class_names = train.class_names
        self.manifest: Manifest = choose_images(config, train)
        self.rows = {
            "train": (train, np.asarray(self.manifest.indices, dtype=np.int64)),
            "val": (train, np.asarray(self.manifest.validation, dtype=np.int64)),
            "test": (test, np.arange(len(test.labels))),
        }


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

    def load(self) -> None:
        """Decode what is to stay in memory, and make the loaders."""
        sets = {name: self.pipeline.load(*rows) for name, rows in self.rows.items()}
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
