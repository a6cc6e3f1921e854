"""NCProbe: measures the collapse of a model while it is evaluated."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from nc_probe.hooks.captures import iterate_captures, layer_captures
from nc_probe.hooks.heads import count_classes, find_head, unwrap
from nc_probe.hooks.hooked import HookedModel, warn_of_other_logits
from nc_probe.hooks.streams import CaptureStream
from nc_probe.hooks.tokens import check_shift, counted, token_samples
from nc_probe.measures.assembly import CENTERS, Measurement, check_groups, finest_partition
from nc_probe.measures.conventions import check_conventions
from nc_probe.measures.geometry import check_weight_decay
from nc_probe.moments.cache import FeatureCache
from nc_probe.moments.class_moments import ClassMoments
from nc_probe.moments.precision import cpu_by_default
from nc_probe.moments.validation import as_tensor, check_samples
from nc_probe.pass_sums import PassSums
from nc_probe.report import CollapseReport

__all__ = ["NCProbe"]

# Logits, those of the first samples, on which it is made sure that they are linear in the features: 128 MiB of float64.
LOGITS = 2**24


class NCProbe:
    """Hook the classifier of a model, accumulate what enters it, and report.

        with NCProbe(model) as probe:
            for images, labels in loader:
                model(images)
                probe.update(labels)
        report = probe.compute()

    Whatever gives logits that are linear in its last features can be measured:

    >>> import torch
    >>> from nc_probe import NCProbe
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()
    >>> with NCProbe(model, groups={"rare": [2]}) as probe:
    ...     for images, labels in zip(torch.randn(2, 6, 1, 2, 2), torch.tensor([[0, 1, 0, 1, 0, 2]] * 2)):
    ...         logits = model(images)
    ...         probe = probe.update(labels)
    >>> report = probe.compute()
    >>> report.samples, report.groups["rare"].samples, report.nc1 > 0, 0 <= report.nc4 <= 1
    (12, 2, True, True)

    Entering starts a pass; leaving removes the hooks and keeps the sums. The model is not changed: no buffer, no
    attribute. The features are those that the classifier received, in their own precision (bfloat16 under autocast);
    all arithmetic on them is float64, which neither autocast nor TF32 touches.

    A compiled model runs eagerly inside the `with`, because compiled code ignores hooks that were added later.

    What needs the final class means takes a second look at the features (NC1, NC4, their ranks), which are kept: on the
    host up to `cache_bytes` of this rank, then on disk up to `spill_bytes`. Beyond both, or with `cache_bytes=0`, NC1
    comes from a within-class scatter summed in the one pass, and NC4 is absent unless the samples are shown again:

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
        weight_decay: of the general orthogonal frame that `nc2_gof` compares with, see `orthogonal_frame`.
        spectrum: whether the report has the ranks of the features, for which their d x d covariance is summed: most of
            the time that it takes. Those of layers and iterates are there without being asked for.
        cache_bytes: host memory for features on this rank; 0 keeps none, on disk neither.
        spill_bytes: disk for features on this rank, in a temporary file.
        cache_dtype: to keep features in. Default: their own. float16 and bfloat16 halve float32, and round: NC4 is then
            that of the rounded features, and NC1 comes from the scatter.
        ignore_index: label of what is not to be counted, -100 most often: padding, tokens without a class.
        shift_labels: of tokens, whether the feature at t has the label at t + 1, as where the labels of a causal
            language model are its inputs. Must be said for those of transformers.

    Raises:
        ValueError: no linear classifier found, or a bad argument.
    """

    @cpu_by_default()
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
        weight_decay: float = 0.0,
        spectrum: bool = False,
        cache_bytes: int = 2**30,
        spill_bytes: int = 2**34,
        cache_dtype: torch.dtype | None = None,
        ignore_index: int | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {model!r}")
        if center not in CENTERS:
            raise ValueError(f"center must be one of {CENTERS}, got {center!r}")
        self.model, self.center = model, center
        self.conventions = check_conventions(conventions)
        self.ignore_index, self._shift = ignore_index, check_shift(model, shift_labels, ignore_index)
        self.head = find_head(model, name=head)
        self.num_classes = K = count_classes(self.head, num_classes)
        self.groups = {name: classes.tolist() for name, classes in check_groups(groups, K).items()}
        device = next((p.device for p in unwrap(model).parameters()), torch.device("cpu"))
        pooled = class_counts is not None or center == "empirical"
        self._pooling: dict[str, Any] = {
            "class_counts": class_counts if center == "balanced" else None,
            "partition": finest_partition(self.groups, K) if pooled else None,
            "device": "cpu" if device.type == "mps" else device,  # which has no float64
        }
        captured = {
            "layers": [CaptureStream(c, self._moments) for c in (layer_captures(model, layers) if layers else ())],
            "iterates": [CaptureStream(c, self._moments) for c in (iterate_captures(model) if iterates else ())],
        }
        self._sums = PassSums(
            self.head,
            K,
            self._moments,
            captured=captured,
            cache=FeatureCache(cache_bytes, spill_bytes if cache_bytes else 0, cache_dtype),
            settings={
                "center": center,
                "groups": self.groups,
                "conventions": self.conventions,
                "weight_decay": check_weight_decay(weight_decay),
            },
            spectrum=spectrum,
        )
        self._hooked = HookedModel(model, self.head, [stream.capture for stream in self._sums.captures], K)
        self.reset()

    @cpu_by_default()
    def reset(self) -> Self:
        """Start a new pass: drop every sample, and any forward pass not yet used."""
        self._sums.reset()
        self._hooked.restart()
        self.linear_error: float | None = None
        self._compared = self._ignored = False
        return self

    def __enter__(self) -> Self:
        self._hooked.attach()
        self._summing = True
        return self.reset()

    def __exit__(self, *exc: object) -> None:
        self._hooked.detach()
        if exc[:1] == (None,):
            self._sums.end()

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[Self]:
        """Show the samples of the pass again, for NC4 where features were not kept. Every rank must enter it.

        Raises:
            ValueError: nothing was added in a first pass; or, by `compute`, the samples were others.
        """
        with self.attached(summing=True):
            self._sums.begin_second_pass()
            yield self

    @contextlib.contextmanager
    def attached(self, *, summing: bool = False) -> Iterator[Self]:
        """Hook the model for `received`; `update` is refused unless `summing`."""
        self._hooked.attach()
        self._summing = summing
        try:
            yield self
        finally:
            self._hooked.detach()

    def received(self) -> Tensor:
        """Return the features (B, d) that the classifier received in the last forward pass, and clear it.

        Raises:
            ValueError: not exactly one forward pass since the last time, or a model in training mode.
        """
        return self._hooked.pop()[0]

    @cpu_by_default()
    def update(self, labels: Tensor | Sequence[int], mask: Tensor | Sequence[bool] | None = None) -> Self:
        """Add the samples of the last forward pass; a batch that is refused adds nothing.

        Args:
            labels: (B,) integers in 0..K-1: a tensor, a NumPy array or a list. On the CPU they are checked at once, on
                an accelerator by `compute`. Of a classifier of tokens, which receives (B, T, d), they are (B, T), and
                each token is a sample.
            mask: (B,) bool, False for a sample that is not to be counted (a duplicate that pads the last batch); of
                tokens (B, T), or (B,) for whole sequences.

        Raises:
            ValueError: not exactly one forward pass since the last update, a model in training mode, or labels, mask or
                features that are not as they should be.
        """
        if not (self._hooked.attached and self._summing):
            raise ValueError("update must be called inside `with NCProbe(model) as probe:`")
        try:
            self._update(as_tensor("labels", labels), None if mask is None else as_tensor("mask", mask))
        finally:
            self._hooked.clear()
        return self

    @cpu_by_default()
    def compute(self, *, sync: bool = True) -> CollapseReport:
        """Make the report over all ranks, every one of which must call it: on rank 0 alone it would wait for ever.

        `compute(sync=False)` reports the samples of this rank, and may be called on any. The work is done once a pass:
        called again, it gives the same report.

        Args:
            sync: exchange sums with the other ranks.

        Raises:
            ValueError: nothing was added, or something bad on an accelerator, or `class_counts` is not what was seen.
        """
        try:
            return self._sums.compute(sync=sync)
        except ValueError as error:
            if self._ignored and "at least one sample" in str(error):
                raise ValueError(f"{error}; every label was ignore_index={self.ignore_index}") from None
            raise

    def covariance(self, *, sync: bool = True) -> tuple[Measurement, Tensor]:
        """Measure the features, and find their within-class covariance (d, d), weighted by `center`.

        Every rank must call it, unless `sync=False`.

        Raises:
            ValueError: there are no samples, or the scatter of the pass cannot be weighted so.
        """
        return self._sums.covariance(sync=sync)

    def gave_up_features(self, *, sync: bool = True) -> bool:
        """Tell whether the features of some rank, or of this one, were too many to keep. Every rank must call it."""
        return self._sums.exceeded(sync=sync)

    def wants_second_pass(self, *, sync: bool = True) -> bool:
        """Tell whether features of the classifier, layers or iterates were too many to keep, so that NC4 is absent.

        Of any rank, every one of which must call it, or of this one.
        """
        return self._sums.exceeded(sync=sync, places=True)

    def kept(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over features (B, d) and labels (B,) of this rank by batch; none if they were too many to keep."""
        return self._sums.kept()

    def _moments(self, num_features: int, *, scatter: bool = True) -> ClassMoments:
        return ClassMoments(self.num_classes, num_features, scatter=scatter, **self._pooling)

    def _update(self, labels: Tensor, mask: Tensor | None) -> None:
        tokens = labels.ndim > 1
        if tokens and self._sums.captures:
            raise ValueError("labels must be (B,) where layers or iterates are measured, which are pooled over tokens")
        features, output = self._hooked.pop(tokens=tokens)
        if tokens:
            features, labels, mask, output = token_samples(features, labels, mask, output, shift=self._shift)
        check_samples(len(features), labels, mask)
        mask = counted(labels, mask, self.ignore_index)
        if mask is not None:
            features, labels = features[mask.to(features.device)], labels[mask.to(labels.device)]
            output = [x[mask.to(x.device)] for x in output if len(x) == len(mask)]
            self._ignored |= self.ignore_index is not None and not len(labels)
        self._sums.add(features, labels, mask, output)
        if self.head is not None and not self._compared and len(features):
            self._compared = True
            self._hooked.trust_logits()
            few = max(LOGITS // self.num_classes, 1)
            self.linear_error = self._sums.classifiers[0].linear_error(features[:few], [x[:few] for x in output])
            warn_of_other_logits(self.head, self.linear_error, output)
