"""NCProbe: measures the collapse of a model while it is evaluated."""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from nc_probe.hooks.heads import count_classes, find_head, is_compiled, unwrap
from nc_probe.hooks.streams import ClassifierStream, TapStream, classifier_streams
from nc_probe.hooks.taps import HeadTap, OutputTap, layer_taps, solve_taps
from nc_probe.measures.agreement import Agreement
from nc_probe.measures.assembly import CENTERS, Measurement, atoms, check_groups
from nc_probe.measures.conventions import check_conventions
from nc_probe.moments import ranks
from nc_probe.moments.cache import FeatureCache, Kept
from nc_probe.moments.checks import check_samples
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.second_look import SecondLook
from nc_probe.report import CollapseReport, measure

__all__ = ["NCProbe"]

# Largest difference, relative to the largest logit, between weight @ feature + bias and what the model gave.
LINEAR_ERROR = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}


class NCProbe:
    """Hooks the classifier of a model, accumulates what enters it, and reports.

        with NCProbe(model) as probe:
            for images, labels in loader:
                model(images)
                probe.update(labels)
        report = probe.compute()

    Entering starts a pass; leaving removes the hooks and keeps the sums. The model is not changed: no buffer, no
    attribute. The features are those that the classifier received, in their own precision (bfloat16 under autocast);
    all arithmetic on them is float64, which neither autocast nor TF32 touches.

    A compiled model runs eagerly inside the `with`, because compiled code ignores hooks that were added later.

    What needs the final class means takes a second look at the features (NC1, NC4, the rank of the features), which are
    kept: on the host up to `cache_bytes` of this rank, then on disk up to `spill_bytes`. Beyond both, or with
    `cache_bytes=0`, NC1 comes from a within-class scatter summed in the one pass, and NC4 is absent unless the samples
    are shown again:

        with probe.second_pass():
            for images, labels in loader:
                model(images)
                probe.update(labels)

    `report.nc1_source` and `report.nc4_source` say which it was.

    Args:
        model: a classifier whose logits are linear in its last features, wrapped in DistributedDataParallel or
            torch.compile or not. The mean of several heads is measured, and each in `report.heads`.
        groups: classes of each group by name, e.g. {"majority": [0, 1, 2], "minority": range(3, 10)}.
        center: "balanced" (every class counts once: default) or "empirical" (by its count).
        class_counts: (K,) samples of each class in the whole pass, over all ranks, if known. A within-class scatter is
            then kept per group instead of per class, which is needed for "balanced" beyond 256 MiB of K d^2 float64.
            `class_nc1` is then absent, and a pass over other samples an error. "empirical" has no use for it.
        num_classes: K of a model that has no classifier. What needs one is then absent from the report.
        head: name of the classifier, where `find_head` cannot find it, or names of several whose mean the logits are.
        layers: names of modules whose pooled outputs are measured too, or "stages" for those that the model names:
            `report.layers`.
        iterates: whether the iterates of an equilibrium model are measured too: `report.iterates`.
        conventions: named formulas of papers to report besides, see `nc_probe.measures.conventions`.
        spectrum: whether a second look sums the d x d covariance, for the ranks of the features: d^2 a sample.
        cache_bytes: host memory for features on this rank; 0 keeps none, on disk neither.
        spill_bytes: disk for features on this rank, in a temporary file.
        cache_dtype: to keep features in. Default: their own. float16 and bfloat16 halve float32, and round: NC4 is then
            that of the rounded features, and NC1 comes from the scatter.

    Raises:
        ValueError: no linear classifier found, or a bad argument.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: Mapping[str, Iterable[int]] | None = None,
        center: str = "balanced",
        class_counts: Tensor | Sequence[int] | None = None,
        num_classes: int | None = None,
        head: str | Sequence[str] | None = None,
        layers: str | Sequence[str] = (),
        iterates: bool = False,
        conventions: Sequence[str] = (),
        spectrum: bool = True,
        cache_bytes: int = 2**30,
        spill_bytes: int = 2**34,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        if center not in CENTERS:
            raise ValueError(f"center must be one of {CENTERS}, got {center!r}")
        self.model, self.center = model, center
        self.conventions, self.spectrum = check_conventions(conventions), spectrum
        self.head = find_head(model, name=head)
        self.num_classes = K = count_classes(self.head, num_classes)
        self.groups = {name: classes.tolist() for name, classes in check_groups(groups, K).items()}
        self._cache = FeatureCache(cache_bytes, spill_bytes if cache_bytes else 0, cache_dtype)
        self._deferred = not self._cache.over and cache_dtype is None  # the scatter waits for a second look

        device = next((p.device for p in unwrap(model).parameters()), torch.device("cpu"))
        pooled = class_counts is not None or center == "empirical"
        self._pooling: dict[str, Any] = {
            "class_counts": class_counts if center == "balanced" else None,
            "partition": atoms(self.groups, K) if pooled else None,
            "device": "cpu" if device.type == "mps" else device,  # which has no float64
        }
        self._output = OutputTap(model)
        self._input = None if self.head is None else HeadTap(self.head)
        self._classifiers = classifier_streams(self.head, partial(self._moments, scatter=not self._deferred))
        self._layers = [TapStream(tap, self._moments) for tap in (layer_taps(model, layers) if layers else ())]
        self._solves = [TapStream(tap, self._moments) for tap in (solve_taps(model) if iterates else ())]
        self._attached: contextlib.ExitStack | None = None
        self.reset()

    def reset(self) -> Self:
        """Starts a new pass: forgets every sample, and any forward pass not yet used."""
        for stream in (*self._classifiers, *self._layers, *self._solves):
            stream.reset()
        self._cache.clear()
        self._looks: list[SecondLook] = []
        self.linear_error: float | None = None
        self._forget()
        return self

    def __enter__(self) -> Self:
        self._attach()
        return self.reset()

    def __exit__(self, *exc: object) -> None:
        assert self._attached is not None
        self._attached.close()
        self._attached = None
        self._forget()

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[Self]:
        """Shows the samples of the pass again, for NC4 where features were not kept. Every rank must enter it.

        Raises:
            ValueError: nothing was added in a first pass; or, by `compute`, the samples were others.
        """
        looks = [SecondLook(self._gathered(stream, sync=True)) for stream in self._classifiers]
        self._attach()
        self._forget()
        self._looks = looks
        try:
            yield self
        finally:
            self.__exit__()

    def update(self, labels: Tensor, mask: Tensor | None = None) -> Self:
        """Adds the samples of the last forward pass.

        Args:
            labels: (B,) integers in 0..K-1. On the CPU they are checked at once, on an accelerator by `compute`.
            mask: (B,) bool, False for a sample that is not to be counted (a duplicate that pads the last batch).

        Raises:
            ValueError: not exactly one forward pass since the last update, a model in training mode, or labels, mask or
                features that are not as they should be.
        """
        if self._attached is None:
            raise ValueError("update must be called inside `with NCProbe(model) as probe:`")
        try:
            self._update(labels, mask)
        finally:
            self._forget()
        return self

    def compute(self, *, sync: bool = True) -> CollapseReport:
        """The report over all ranks.

        Args:
            sync: exchange with the other ranks, all of which must call it. False reports on this rank alone.

        Raises:
            ValueError: nothing was added, or something bad on an accelerator, or `class_counts` is not what was seen.
        """
        over = any(ranks.largest([int(self._cache.over)])) if sync else False
        if over and not self._cache.over:
            self._sum_scatter_instead()  # as another rank had to
        main, *heads = [self._report(i, stream, sync=sync) for i, stream in enumerate(self._classifiers)]
        names = [linear.name for linear in self.head.maps] if self.head and heads else []
        parts: dict[str, Any] = {"heads": dict(zip(names, heads, strict=True))}
        for kind, streams in (("layers", self._layers), ("iterates", self._solves)):
            places = {name: m for stream in streams for name, m in stream.gathered(sync=sync).items()}
            parts[kind] = {k: measure(m, None, center=self.center, groups=self.groups) for k, m in places.items()}
        return dataclasses.replace(main, **parts)

    def kept(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, d) and labels (B,) of this rank, batch by batch; none if they were too many to keep."""
        for batch in self._cache:
            yield batch.features, batch.labels

    def _taps(self) -> list[Any]:
        taps = [self._output, self._input, *(stream.tap for stream in (*self._layers, *self._solves))]
        return [tap for tap in taps if tap is not None]

    def _attach(self) -> None:
        if self._attached is not None:
            raise ValueError("the probe is already attached: enter it once")
        with contextlib.ExitStack() as stack:
            if is_compiled(self.model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for tap in self._taps():
                for handle in tap.attach():
                    stack.callback(handle.remove)
            self._attached = stack.pop_all()

    def _forget(self) -> None:
        for tap in self._taps():
            tap.forget()

    def _moments(self, num_features: int, *, scatter: bool = True) -> ClassMoments:
        return ClassMoments(self.num_classes, num_features, scatter=scatter, **self._pooling)

    def _update(self, labels: Tensor, mask: Tensor | None) -> None:
        training = next((name for name, m in unwrap(self.model).named_modules() if m.training), None)
        if training is not None:
            raise ValueError(f"model must be in evaluation mode, but its module {training!r} trains: call model.eval()")
        given = self._output.take()
        features = given if self._input is None else self._input.take()
        if features is None or features.ndim != 2:
            raise ValueError(
                f"a model without classifier must give a tensor (B, d), got {getattr(given, 'shape', None)}"
            )
        check_samples(len(features), labels, mask)
        if mask is not None:
            features, labels = features[mask.to(features.device)], labels[mask.to(labels.device)]
        if not self._looks:
            read = [(stream, stream.read(mask)) for stream in (*self._layers, *self._solves)]
            for stream in self._classifiers:
                stream.add(features, labels)
            for stream, places in read:
                stream.add(places, labels)
            if self._input is not None and self.linear_error is None:
                self._check_linear(features, given if mask is None or given is None else given[mask.to(given.device)])
        labels = labels.long().clamp(0, self.num_classes - 1)  # an accelerator's are checked later
        first = not self._looks
        chosen = torch.cat([stream.choose(features, labels, count=first) for stream in self._classifiers], 1)
        batch = Kept(features, labels, chosen)
        for i, look in enumerate(self._looks):
            look.add(batch, self._classifiers[i].columns, i)
        if first and not self._cache.over:
            self._cache.append(batch)
            if self._cache.over:
                self._sum_scatter_instead(batch)

    def _check_linear(self, features: Tensor, given: Tensor | None) -> None:
        """Compares weight @ feature + bias with what the model gave, once a pass."""
        logits = self._classifiers[0].logits(features)
        if given is None or given.shape != logits.shape or not len(given):
            return
        self.linear_error = float((logits - given.to(logits)).abs().max() / logits.abs().max().clamp(min=1e-30))
        if self.linear_error > LINEAR_ERROR[given.dtype]:
            assert self.head is not None
            warnings.warn(
                f"weight @ feature + bias of {self.head.name!r} is not what the model gives, from which it differs by "
                f"{self.linear_error:.2g} of the largest logit: accuracy and NC4 are those of the linear map. If "
                "another layer is the classifier, name it with head='...'",
                stacklevel=4,
            )

    def _sum_scatter_instead(self, *last: Kept) -> None:
        """Gives up the features kept, and `last`, and goes on with the within-class scatter."""
        try:
            if self._deferred:
                for batch in itertools.chain(self._cache, last):
                    for stream in self._classifiers:
                        assert stream.moments is not None
                        stream.moments.add_scatter(batch.features[:, stream.columns], batch.labels)
        except ValueError as error:
            warnings.warn(f"features exceed cache_bytes and spill_bytes, so NC1 will be absent: {error}", stacklevel=5)
        finally:
            self._cache.give_up()

    def _gathered(self, stream: ClassifierStream, *, sync: bool) -> ClassMoments:
        if sync:
            (num_features,) = ranks.largest([0 if stream.moments is None else stream.moments.num_features])
            if stream.moments is None and num_features:
                stream.moments = stream.make(num_features)  # of a rank without samples
        if stream.moments is None:
            raise ValueError("compute needs at least one sample: call update first")
        moments = stream.moments.sync() if sync else stream.moments
        moments.check()
        if not moments.count.any():
            raise ValueError("compute needs at least one sample: call update first")
        return moments

    def _report(self, index: int, stream: ClassifierStream, *, sync: bool) -> CollapseReport:
        moments = self._gathered(stream, sync=sync)
        moments.check_counts()
        settings: dict[str, Any] = {"center": self.center, "groups": self.groups, "conventions": self.conventions}
        measurement = Measurement(moments, *stream.snapshot(), **settings, features_dtype=stream.dtype)
        looked, source = None, "absent: features exceed cache_bytes and spill_bytes, and there was no second pass"
        exact = self._deferred and not self._cache.over
        if self._looks and not exact:
            looked, source = self._looks[index].finish(sync=sync), "from a second pass over the samples"
        elif not self._cache.over:
            bases = measurement.bases if exact else []
            weights = measurement.class_weights if exact and self.spectrum else None
            look = SecondLook(moments, bases, weights)
            for batch in self._cache:
                look.add(batch, stream.columns, index)
            looked, source = look.finish(sync=sync), f"from {self._cache.where}"
        correct = None
        if stream.linear is not None:
            correct = torch.zeros_like(moments.count) if stream.correct is None else stream.correct
            correct = ranks.total(correct) if sync else correct
        agree = None if looked is None or stream.linear is None else looked.agree
        agreement = Agreement(correct, None if looked is None else looked.nearest, agree, source)
        return CollapseReport.of(measurement.values(agreement, looked if exact else None))
