"""A model measured in one call."""

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nc_probe.hooks.pooling import tensors
from nc_probe.loops.batches import Entry, keyword_names, read_batch, to_device
from nc_probe.loops.samplers import check_once, counted
from nc_probe.loops.state import evaluation_mode, random_state_kept
from nc_probe.moments.ranks import is_distributed
from nc_probe.moments.validation import as_tensor
from nc_probe.ood import OODProbe, OODReport
from nc_probe.probe import NCProbe
from nc_probe.report import CollapseReport

__all__ = ["measure_model", "measure_ood"]


def measure_model(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    inputs: Entry | Sequence[str] | None = None,
    labels: Entry | None = None,
    mask: Entry | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
    second_pass: bool = False,
    **settings: Any,
) -> CollapseReport:
    """Show a loader to a model and measure its collapse, over all ranks, every one of which must call it.

    >>> import torch
    >>> from nc_probe import measure_model
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> loader = [{"image": torch.randn(6, 1, 2, 2), "label": torch.arange(6) % 3} for _ in range(2)]
    >>> report = measure_model(model, loader, groups={"rare": [2]})
    >>> report.samples, report.groups["rare"].samples, model.training
    (12, 4, True)

    The model is switched to evaluation mode, and each of its modules back into its own afterwards; no gradients; random
    generators are left as they were, so that training goes on as if it had not been measured. Duplicates with which
    accelerate or a `DistributedSampler` fill the last batches are not counted.

    Args:
        model: see `NCProbe`.
        loader: batches of this rank: (images, labels, ...) in a tuple or a list, or a mapping. Of a mapping the model
            is given the entries that are keywords of its `forward`, such as `pixel_values`, or else its images.
        inputs: what the model is given, where it is something else: the key or the position of an entry, or several
            keys, which are given as keywords.
        labels: key or position of the labels, where they are called something else or are not second.
        mask: key or position of (B,) bool, False for a sample that is not to be counted; not needed for "mask".
        device: of the model. Default: that of its first parameter.
        autocast: precision of the model, e.g. torch.bfloat16. Default: as it is.
        progress: show a bar, on the first rank, where standard error is a terminal.
        second_pass: iterate over the loader once more where features were too many to keep, for NC4.
        settings: of `NCProbe`, such as `groups`, `layers`, `conventions`.

    Raises:
        ValueError: a batch without labels, samples drawn more than once, or what `NCProbe` refuses.
    """
    if second_pass and isinstance(loader, Iterator):
        raise ValueError(
            f"loader must be one that can be iterated twice for second_pass, got a {type(loader).__name__}"
        )
    probe = NCProbe(model, **settings)
    shown = _Shown(model, device, autocast, progress, {"inputs": inputs, "labels": labels, "mask": mask})
    with shown.evaluation([loader]):
        with probe:
            shown.add(loader, probe.update)
        if second_pass and probe.wants_second_pass():
            with probe.second_pass():
                shown.add(loader, probe.update, name="nc_probe, again")
    return probe.compute()


def measure_ood(
    model: nn.Module,
    loader: Iterable[Any],
    ood_loader: Iterable[Any],
    known_loader: Iterable[Any] | None = None,
    *,
    inputs: Entry | Sequence[str] | None = None,
    labels: Entry | None = None,
    ood_labels: Entry | None = None,
    mask: Entry | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
    components: int | None = None,
    standardize: bool = True,
    **settings: Any,
) -> tuple[CollapseReport, OODReport]:
    """Measure the collapse of a model, and how well it tells samples of no class from those of the classes.

    >>> import torch
    >>> from nc_probe import measure_ood
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> images = torch.tensor([[9.0, 0, 0, 0], [8, 1, 0, 0], [0, 9, 0, 0], [1, 8, 0, 0]])
    >>> loader = [(images, torch.tensor([0, 0, 1, 1]))]
    >>> collapse, ood = measure_ood(model, loader, [torch.tensor([[0, 0, 5.0, 1], [0, 0, 1, 5]])])
    >>> ood.known, ood.unknown, ood.nc5, ood.auroc["nearest_mean"], collapse.samples
    (4, 2, 0.0, 1.0, 4)

    Over all ranks, every one of which must call it; the model is left as by `measure_model`.

    Args:
        model: see `NCProbe`.
        loader: of the samples of the classes that the model was trained on, with their labels.
        ood_loader: of samples of no class: tensors, or batches as in `loader`, whose labels are not read.
        known_loader: of held-out samples of the classes, which are as fair as accuracy on them; labels are not read.
            Default: those of `loader` are scored, which flatter every score.
        inputs, labels, mask, device, autocast, progress: as for `measure_model`.
        ood_labels: key or position of labels in `ood_loader`, if they have the numbers of `loader`: none of them may be
            one of the classes then.
        components, standardize: of `OODProbe`.
        settings: of `NCProbe`.

    Returns:
        The collapse on `loader`, and the detection.

    Raises:
        ValueError: what `measure_model`, `NCProbe` or `OODProbe` refuse; a loader without samples.
    """
    reading = {"inputs": inputs, "labels": labels, "mask": mask}
    probe, known = NCProbe(model, **settings), known_loader
    shown = _Shown(model, device, autocast, progress, reading)
    ood = OODProbe(probe, components=components, standardize=standardize)
    with shown.evaluation([loader, ood_loader, *([] if known is None else [known])]):
        with probe:
            shown.add(loader, probe.update)
        with ood:
            if known is not None:
                shown.add(known, lambda _, mask: ood.update_known(mask), name="known samples", labels=None)
            shown.add(ood_loader, ood.update, name="samples of no class", labels=ood_labels)
    return probe.compute(), ood.compute()


class _Shown:
    """Loaders shown to a model.

    Args:
        model: see `NCProbe`.
        device: of the model; None for that of its first parameter.
        autocast: precision of the model, or None.
        progress: whether a bar is shown.
        reading: keywords of `read_batch`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None,
        autocast: torch.dtype | None,
        progress: bool,
        reading: dict[str, Any],
    ) -> None:
        weights = [p for p in model.parameters() if p.is_floating_point()]
        self.model, self.autocast, self.progress, self.reading = model, autocast, progress, reading
        self.device = torch.device(device or (weights[0].device if weights else "cpu"))
        # A model of one precision takes no other; one of several knows what to do.
        dtypes = {p.dtype for p in weights}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None

    @contextlib.contextmanager
    def evaluation(self, loaders: Sequence[Iterable[Any]]) -> Iterator[None]:
        """Evaluate the model, and leave all as it was.

        Raises:
            ValueError: a loader shows samples more than once.
        """
        for loader in loaders:
            check_once(loader)
        with contextlib.ExitStack() as stack:
            for loader in loaders:
                stack.enter_context(random_state_kept(loader, self.device))
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(torch.no_grad())
            yield

    def add(self, loader: Iterable[Any], update: Any, *, name: str = "nc_probe", **labels: Entry | None) -> None:
        """Show a loader, and call `update(labels, mask)` after each batch.

        Args:
            loader: of this rank.
            update: takes labels and a mask, or None for either.
            name: beside the bar.
            labels: `labels=` the entry of those that are read, if there need not be any.

        Raises:
            ValueError: there is no sample, or a batch cannot be read.
        """
        keywords, before = keyword_names(self.model), 0
        reading = {**self.reading, **labels, "labelled": not labels}
        for batch in _bar(loader, self.progress, name):
            args, kwargs, classes, shown = read_batch(batch, keywords, **reading)
            with torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext():
                self.model(*to_device(args, self.device, self.dtype), **to_device(kwargs, self.device, self.dtype))
            classes = None if classes is None else as_tensor("labels", classes)
            sized = next(iter(tensors([args, kwargs])), torch.empty(())) if classes is None else classes
            size = len(sized) if sized.ndim else 0
            own, before = counted(loader, size, before), before + size
            if own is not None:
                shown = own if shown is None else as_tensor("mask", shown).cpu() & own
            update(classes, shown)
        if not before and not is_distributed():
            raise ValueError("loader must give at least one sample, got none: an iterator can be used once alone")


def _bar(loader: Iterable[Any], progress: bool, name: str) -> Iterator[Any]:
    """The batches, shown by a bar on the first rank."""
    if not progress or (is_distributed() and dist.get_rank() > 0):
        yield from loader
        return
    from tqdm.auto import tqdm

    # Given the loader itself it would be iterated over twice, and start its workers twice.
    with tqdm(total=operator.length_hint(loader) or None, desc=name, unit="batch", leave=False, disable=None) as bar:
        for batch in loader:
            yield batch
            bar.update()
