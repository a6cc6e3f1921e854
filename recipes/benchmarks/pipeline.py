"""Measure how fast images reach the model, beside how fast the model trains on them.

A pipeline is fast enough if it gives several times the images per second that training takes: then it is never waited
for, and what it costs of the same processors is small.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import psutil
import timm
import torch
from PIL import Image
from timm.data.model_config import resolve_input_data_config
from torch import nn
from torch.nn import functional as F

import timm_deq  # noqa: F401  registers the models
from recipes.benchmarks.tables import Row
from recipes.images.pipeline import choose_pipeline
from recipes.images.sources import ImageSplit, load_splits, open_dataset
from recipes.imbalance.sampling import EpochSampler

AUGMENTATION = {"crop_pad": 4, "hflip": 0.5}


def noise(images: int, size: int = 32) -> ImageSplit:
    """Encoded images of random pixels in ten classes, of the size of CIFAR's."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 10
    pictures = [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(images)]
    rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features(image=datasets.Image()))
    return ImageSplit("noise", rows, "image", labels, tuple(map(str, range(10))))


def images_of(dataset: str | None) -> ImageSplit:
    """The train split of a data set of the Hub or of a folder, or 10000 images of `noise`."""
    return noise(10_000) if dataset is None else load_splits(open_dataset(dataset))[0]


def pipeline_rows(
    split: ImageSplit,
    *,
    device: torch.device | str = "cpu",
    model: str = "deq_resnet8_cifar",
    batch_size: int = 128,
    workers: int = 2,
    seconds: float = 5.0,
) -> list[Row]:
    """Images per second of each pipeline alone, in training, and of the model that trains on resident images.

    Args:
        split: the images.
        device: of the model and of resident images.
        model: a timm model.
        batch_size: images of an update.
        workers: processes that decode.
        seconds: least time that each is measured for.

    Returns:
        A row for each of: decoding all images once, batches of resident images, training on them, batches of workers;
        with images per second, how often that is the rate of training, and MiB of memory.
    """
    net: Any = timm.create_model(model, num_classes=len(split.class_names)).to(device)
    rates: dict[str, float] = {}
    memory: dict[str, float] = {}

    def load(mode: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        pipeline = choose_pipeline(
            mode,
            images=len(split.labels),
            data_config=resolve_input_data_config(net),
            augmentation=AUGMENTATION,
            device=device,
            workers=workers,
        )
        images = pipeline.load(split, np.arange(len(split.labels)))
        return images.train_loader(EpochSampler(images.labels, batch_size=batch_size))

    def rate(loader: Any, use: Callable[[torch.Tensor, torch.Tensor], None]) -> float:
        return images_per_second(loader, use, device=device, seconds=seconds)

    with measured_memory(memory, "decode once"):
        started = time.perf_counter()
        loader = load("resident")
        rates["decode once"] = len(split.labels) / (time.perf_counter() - started)
    with measured_memory(memory, "resident"):
        rates["resident"] = rate(loader, lambda images, labels: None)
    with measured_memory(memory, "train"):
        rates["train"] = rate(loader, training_step(net))
    del loader
    with measured_memory(memory, "workers"):
        rates["workers"] = rate(load("workers"), lambda images, labels: None)
    return [
        {"pipeline": name, "images/s": rate, "times training": rate / rates["train"], "MiB": memory[name]}
        for name, rate in rates.items()
    ]


@contextmanager
def measured_memory(peaks: dict[str, float], name: str, *, every: float = 0.5) -> Iterator[None]:
    """Puts into `peaks` under `name` the most MiB that this process and those it has started hold meanwhile, looked at
    every so many seconds. A page that processes share counts once (PSS, on Linux) or for each (RSS, elsewhere)."""
    done, peaks[name] = threading.Event(), _memory()

    def look() -> None:
        while not done.wait(every):
            peaks[name] = max(peaks[name], _memory())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        peaks[name] = max(peaks[name], _memory())


def _memory() -> float:
    total, process = 0, psutil.Process()
    for each in (process, *process.children(recursive=True)):
        try:
            info = each.memory_full_info()
        except psutil.NoSuchProcess:  # it has ended since
            continue
        total += getattr(info, "pss", info.rss)
    return total / 2**20


def training_step(net: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Forward and backward pass and update of a model."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def images_per_second(
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    use: Callable[[torch.Tensor, torch.Tensor], None],
    *,
    device: torch.device | str,
    seconds: float,
) -> float:
    """Rate at which batches are made and used, after one that is not counted, over passes as long as `seconds`."""
    images, started = -1, 0.0
    while True:
        for x, labels in loader:
            use(x, labels)
            if images < 0:  # the first batch starts workers, and warms up the model
                _wait(device)
                images, started = 0, time.perf_counter()
                continue
            images += len(labels)
            if time.perf_counter() - started > seconds:
                _wait(device)
                return images / (time.perf_counter() - started)


def _wait(device: torch.device | str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
