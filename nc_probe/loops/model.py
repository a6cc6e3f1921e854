"""A model measured in one call."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nc_probe.loops.batches import Entry, keyword_names, read_batch, to_device
from nc_probe.loops.samplers import check_once, counted
from nc_probe.loops.state import evaluation_mode, random_state_kept
from nc_probe.moments.ranks import is_distributed
from nc_probe.moments.validation import as_tensor
from nc_probe.probe import NCProbe
from nc_probe.report import CollapseReport

__all__ = ["measure_model"]


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
        settings: of `NCProbe`, such as `groups`, `layers`, `conventions`.

    Raises:
        ValueError: a batch without labels, samples drawn more than once, or what `NCProbe` refuses.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    device = torch.device(device or (weights[0].device if weights else "cpu"))
    # A model of one precision takes no other; one of several knows what to do.
    dtypes = {p.dtype for p in weights}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    keywords, before = keyword_names(model), 0
    check_once(loader)
    probe = NCProbe(model, **settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state_kept(loader, device))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(probe)
        for batch in _bar(loader, progress):
            args, kwargs, classes, shown = read_batch(batch, keywords, inputs=inputs, labels=labels, mask=mask)
            with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
                model(*to_device(args, device, dtype), **to_device(kwargs, device, dtype))
            classes = as_tensor("labels", classes)
            size = len(classes) if classes.ndim else 0
            own, before = counted(loader, size, before), before + size
            if own is not None:
                shown = own if shown is None else as_tensor("mask", shown).cpu() & own
            probe.update(classes, shown)
    if not before and not is_distributed():
        raise ValueError("loader must give at least one sample, got none: an iterator can be used once alone")
    return probe.compute()


def _bar(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
    """The batches, shown by a bar on the first rank."""
    if not progress or (is_distributed() and dist.get_rank() > 0):
        return loader
    from tqdm.auto import tqdm

    return tqdm(loader, desc="nc_probe", unit="batch", leave=False, disable=None)
