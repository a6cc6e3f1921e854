"""The probe against three passes of accumulators, and what it costs beside what it measures.

1. features in memory: classes of Gaussian features, in float32, through a linear classifier. The peer is the method of
   rhubarbwu/neural-collapse (2024, MIT), written anew: a pass for the means, one for the covariance and the variances
   about them, one for the decisions, then its measures; in float32, its default, and in float64, which is our
   precision. Ours is NCProbe with the convention that has the peer's NC3. The peer has no ranks of features, so ours
   are in a row of their own. Errors of NC1 are relative to the full batch in float64;
2. many classes: the same for K = 1000 against the peer's float32, which takes 8 GB for differences of means there, and
   for K = 21,841, where it would take 1.5 TB, beside the forward pass of the classifier alone;
3. share of an evaluation: passes over images with and without the probe, in turns, and a report at the end;
4. share of training: an epoch of the default run of recipes/train.py on images that are decoded already, and a pass
   over the same images in evaluation mode, with and without the probe and its report, which are timed inside it too.
"""

import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import timm
import torch
from timm.data.model_config import resolve_input_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import timm_deq  # noqa: F401  registers the models
from nc_probe import CollapseReport, NCProbe
from recipes.benchmarks.tables import Row, compared, in_turn, milliseconds
from recipes.images.sources import load_splits, open_dataset
from recipes.images.views import eval_transform
from recipes.settings.config import TrainConfig
from recipes.training.checkpoint import create_model
from recipes.training.manifest import choose_images

__all__ = ["features_in_memory", "full_batch_nc1", "many_classes", "peer", "share_of_evaluation", "share_of_training"]

Batches = Sequence[tuple[Tensor, Tensor]]
"""Features or images (B, ...) and labels (B,)."""

SAMPLES, FEATURES, CLASSES = 50_000, 512, 100
BATCH_SIZES = (1000, 128)
MANY = ((20_000, 2048, 1000), (5000, 768, 21_841))  # N, d and K
MODEL, IMAGES, BATCHES = "resnet50", (32, 3, 224, 224), 6


@torch.no_grad()
def features_in_memory(device: torch.device, rounds: int) -> Iterator[Row]:
    """Milliseconds from features to all measures, for every batch size and precision of the peer."""
    x, labels, head = gaussian_classes(SAMPLES, FEATURES, CLASSES)
    truth = full_batch_nc1(x, labels)
    x, labels, head = x.to(device), labels.to(device), head.to(device)
    for size in BATCH_SIZES:
        batches = list(zip(x.split(size), labels.split(size), strict=True))
        runs: dict[str, Any] = {
            "no": partial(ours, batches, head, spectrum=False),
            "yes": partial(ours, batches, head, spectrum=True),
            "float32": partial(peer, batches, head.weight, torch.float32),
            "float64": partial(peer, batches, head.weight, torch.float64),
        }
        found = {name: run() for name, run in runs.items()}  # a warm-up
        error = {name: abs(_nc1(value) / truth - 1) for name, value in found.items()}
        times = in_turn(runs, rounds, device)
        for ranks, precision in (("no", "float32"), ("no", "float64"), ("yes", "float64")):
            row: Row = {"batch": size, "peer": precision, "ranks, ours": ranks}
            row |= compared("ms", times[ranks], times[precision])
            yield row | {"NC1 error, ours": error[ranks], "NC1 error, peer": error[precision]}


@torch.no_grad()
def many_classes(device: torch.device, rounds: int) -> Iterator[Row]:
    """Milliseconds from features to all measures for many classes, in batches of 1000."""
    for samples, features, classes in MANY:
        x, labels, head = gaussian_classes(samples, features, classes)
        if classes > samples:  # some classes twice or more, most of them never
            labels = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(0))
        x, labels, head = x.to(device), labels.to(device), head.to(device)
        batches = list(zip(x.split(1000), labels.split(1000), strict=True))
        runs: dict[str, Any] = {"ours": partial(ours, batches, head, spectrum=False)}
        runs["head"] = lambda batches=batches, head=head: [head(x) for x, _ in batches]
        if classes <= samples:
            runs["peer"] = partial(peer, batches, head.weight, torch.float32)
        runs["head"]()  # a warm-up
        ours(batches[:1], head, spectrum=False)
        times = in_turn(runs, rounds, device)
        row: Row = {
            "N": samples,
            "d": features,
            "K": classes,
            "ms, head alone": times["head"],
            "ms, ours": times["ours"],
        }
        peers = times.get("peer")
        yield row | {"ms, peer": peers, "ratio": None if peers is None else times["ours"] / peers}


def gaussian_classes(samples: int, features: int, classes: int) -> tuple[Tensor, Tensor, nn.Linear]:
    """Features (N, d) float32 about random means, labels (N,) in random order, and a classifier near the means."""
    gen = torch.Generator().manual_seed(0)
    means = torch.randn(classes, features, generator=gen)
    labels = (torch.arange(samples) % classes)[torch.randperm(samples, generator=gen)]
    head = nn.Linear(features, classes).eval()
    head.weight.data = means + torch.randn(classes, features, generator=gen)
    head.bias.data.zero_()  # the peer's decisions have none
    return means[labels] + torch.randn(samples, features, generator=gen), labels, head


def full_batch_nc1(x: Tensor, labels: Tensor) -> float:
    """tr(S_W S_B^+)/K for classes of equal counts: with S_B = M^T M / K it is the mean of ||(x_i - mu_k) M^+||^2."""
    x = x.double()
    means = torch.stack([x[labels == k].mean(0) for k in range(int(labels.max()) + 1)])
    inverse = torch.linalg.pinv(means - means.mean(0), rtol=1e-10)
    return float(((x - means[labels]) @ inverse).square().sum(1).mean())


def ours(batches: Batches, head: nn.Module, *, spectrum: bool) -> CollapseReport:
    with NCProbe(head, spectrum=spectrum, conventions=["zhu2021"]) as probe:
        for x, labels in batches:
            head(x)
            probe.update(labels)
    return probe.compute()


def peer(batches: Batches, weight: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The measures of rhubarbwu/neural-collapse by its passes over features (B, d), for classifier rows (K, d).

    Returns:
        nc1, with the pseudo-inverse of the d x d covariance; cdnv; etf and alignment, distances of M M^T and W M^T to
        the simplex ETF; log_kernel and its variance, of the distances between directions; agreement.
    """
    W = weight.detach().to(dtype)
    K, d = W.shape
    every = torch.arange(K, device=W.device)

    # MeanAccumulator: a product with one-hot labels.
    n, sums = W.new_zeros(K), torch.zeros_like(W)
    for x, y in batches:
        member = y[:, None] == every
        n += member.sum(0)
        sums += member.T.to(dtype) @ x.to(dtype)
    M = sums / n[:, None]

    # CovarAccumulator, then VarNormAccumulator: each takes the differences, makes sure of its means, counts again.
    scatter, variances = W.new_zeros(d, d), W.new_zeros(K)
    counts, means_seen = [torch.zeros_like(n), torch.zeros_like(n)], set()
    for x, y in batches:
        means_seen.add(_digest(M))
        counts[0] += (y[:, None] == every).sum(0)
        difference = x - M[y]
        scatter += difference.T @ difference
        means_seen.add(_digest(M))
        member = y[:, None] == every
        counts[1] += member.sum(0)
        variances += (member.T.to(dtype) @ (x - M[y]).square()).sum(1)
    S_W, variances = scatter / counts[0].sum(), variances / counts[1]

    # DecAccumulator: the nearest mean by expanded squares, and the classifier.
    count, agree = torch.zeros_like(n), torch.zeros_like(every)
    for x, y in batches:
        means_seen.add(_digest(M))
        _digest(W)
        x = x.to(dtype)
        squares = x.norm(dim=1).square()[:, None] + M.norm(dim=1).square() - 2 * x @ M.T
        same = squares.argmin(1) == (x @ W.T).argmax(1)
        count += (y[:, None] == every).sum(0)
        agree.scatter_add_(0, y, same.long())
    assert len(means_seen) == 1

    M_c = M - M.mean(0)
    ideal = (torch.eye(K, dtype=dtype, device=W.device) - 1 / K) / math.sqrt(K - 1)
    off = ~torch.eye(K, dtype=torch.bool, device=W.device)
    gaps = (M[:, None] - M).square().sum(2)
    directions = M_c / M_c.norm(dim=1, keepdim=True)
    logs = -(directions[:, None] - directions).norm(dim=2)[off].log()
    etf, alignment = ((G / G.norm() - ideal).norm() for G in (M_c @ M_c.T, W @ M_c.T))
    values = {
        "nc1": (torch.linalg.pinv(M_c.T @ M_c / K) @ S_W).trace() / K,
        "cdnv": ((variances[:, None] + variances) / 2 / gaps)[off].mean(),
        "etf": etf,
        "alignment": alignment,
        "log_kernel": logs.mean(),
        "log_kernel_variance": logs.var(correction=0),
        "agreement": (agree / count).mean(),
    }
    return {name: float(value) for name, value in values.items()}


def _digest(matrix: Tensor) -> str:
    """By which the peer makes sure, batch after batch, that a matrix is still the same."""
    return hashlib.sha256(matrix.cpu().numpy().tobytes()).hexdigest()


def _nc1(found: CollapseReport | dict[str, float]) -> float:
    return found["nc1"] if isinstance(found, dict) else found.nc1


@torch.no_grad()
def share_of_evaluation(device: torch.device, rounds: int) -> Iterator[Row]:
    """Milliseconds of a pass over images without and with the probe, of the updates alone, and of one report."""
    net: Any = timm.create_model(MODEL).eval().to(device)
    images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(0)).to(device)
    batches = [(images, (torch.arange(len(images)) + i * len(images)) % net.num_classes) for i in range(BATCHES)]
    probe, updates, single = NCProbe(net), [], []

    def plain() -> None:
        for x, _ in batches:
            net(x)

    def probed() -> None:
        spent = []
        with ExitStack() as stack:
            stack.enter_context(probe)
            for x, labels in batches:
                net(x)
                spent.append(milliseconds(partial(probe.update, labels), device))
            end = milliseconds(stack.close, device)  # where batches that wait are looked at
        updates.append(sum(spent) + end)
        single.append((sum(spent[1:]) + end) / len(spent[1:]))  # the first of a pass copies the weights too

    probed()  # a warm-up
    probe.compute()
    updates.clear()
    single.clear()
    times = in_turn({"pass": plain, "probed": probed, "report": probe.compute}, rounds, device)
    spent = statistics.median(updates)
    yield {
        "model": MODEL,
        "images": BATCHES * len(images),
        "pass ms": times["pass"],
        "with the probe ms": times["probed"],
        "updates ms": spent,
        "one update ms": statistics.median(single),
        "updates %": 100 * spent / times["pass"],
        "one report ms": times["report"],
    }


def share_of_training(rounds: int) -> Iterator[Row]:
    """Milliseconds of an epoch of the default run, of an evaluation of its training images, and what a probe with its
    report adds."""
    config = TrainConfig(output="-")
    net, images, labels, groups, counts = default_run(config)
    optimizer = create_optimizer_v2(net, **config.only("opt", "lr", "weight_decay", "momentum"))
    gen = torch.Generator().manual_seed(0)
    probe = NCProbe(net, groups=groups, class_counts=counts)

    def epoch() -> None:
        net.train()
        for chosen in torch.randperm(len(labels), generator=gen).split(config.batch_size):
            nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()

    spent: list[float] = []

    @torch.no_grad()
    def evaluation(probe: NCProbe | None = None) -> None:
        net.eval()
        spent.append(0.0)
        with probe or nullcontext():
            for x, y in zip(images.split(config.eval_batch_size), labels.split(config.eval_batch_size), strict=True):
                net(x)
                if probe is not None:
                    spent[-1] += milliseconds(partial(probe.update, y), device)
        if probe is not None:
            spent[-1] += milliseconds(probe.compute, device)

    device = torch.device("cpu")
    runs = {"epoch": epoch, "evaluation": evaluation, "probed": partial(evaluation, probe)}
    for run in runs.values():  # a warm-up
        run()
    spent.clear()
    times = in_turn(runs, rounds, device)
    probed = statistics.median(value for value in spent if value)
    yield {
        "model": config.model,
        "images": len(labels),
        "epoch ms": times["epoch"],
        "evaluation ms": times["evaluation"],
        "with the probe ms": times["probed"],
        "probe and report ms": probed,
        "% of epoch and evaluation": 100 * probed / (times["epoch"] + times["evaluation"]),
    }


def default_run(config: TrainConfig) -> tuple[nn.Module, Tensor, Tensor, dict[str, Any], Any]:
    """Model, images (N, C, H, W), labels (N,), groups and class counts of a run of recipes/train.py."""
    split, _ = load_splits(open_dataset(config.dataset))
    manifest = choose_images(config, split)
    torch.manual_seed(config.seed)
    net = create_model(config, len(split.class_names))
    data_config = resolve_input_data_config(net)
    transform, mode = eval_transform(data_config), "L" if data_config["input_size"][0] == 1 else "RGB"
    images = torch.stack([transform(split.read(int(i), mode)) for i in manifest.indices])
    return net, images, torch.from_numpy(split.labels[manifest.indices]), dict(manifest.groups), manifest.counts
