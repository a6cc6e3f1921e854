"""NCProbe: measures the collapse of a model while it is evaluated."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nc_probe.assembly import CENTERS, check_groups, measure
from nc_probe.heads import find_head, unwrap
from nc_probe.moments import ClassMoments, exact_arithmetic
from nc_probe.report import Agreement, CollapseReport

__all__ = ["NCProbe"]

# Features looked at once for NC4.
CHUNK = 4096


class NCProbe:
    """Hooks the classifier of a model, accumulates what enters it, and reports.

        with NCProbe(model) as probe:
            for images, labels in loader:
                model(images)
                probe.update(labels)
        report = probe.compute()

    Entering starts a pass; leaving removes the hook and keeps the sums. The model is not changed: no buffer, no
    attribute. The features are those that the classifier received, in their own precision (bfloat16 under autocast);
    all arithmetic on them is float64, which neither autocast nor TF32 touches.

    A compiled model runs eagerly inside the `with`, because compiled code ignores hooks that were added after it was
    compiled.

    NC4 and the accuracy of the nearest class mean need the final class means, so the features are kept on the host, in
    their own precision, and looked at a second time. Beyond `cache_bytes` on some rank they are dropped and those two
    are absent; everything else needs one look.

    Args:
        model: a classifier whose last layer is nn.Linear, wrapped in DistributedDataParallel or torch.compile or not.
        groups: classes of each group by name, e.g. {"majority": [0, 1, 2], "minority": range(3, 10)}.
        center: "balanced" (every class counts once: default) or "empirical" (by its count).
        class_counts: (K,) samples of each class in the whole pass, over all ranks, if known. The within-class scatter
            is then kept per group instead of per class: faster, and needed for "balanced" beyond 256 MiB of K d^2
            float64. `class_nc1` is then absent, and a pass over other samples an error. "empirical" has no use for it.
        head: name of the classifier, where `find_head` cannot find it.
        cache_bytes: host memory for features on this rank; 0 keeps none.

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
        head: str | None = None,
        cache_bytes: int = 2**30,
    ) -> None:
        if center not in CENTERS:
            raise ValueError(f"center must be one of {CENTERS}, got {center!r}")
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes must be at least 0, got {cache_bytes}")
        self.model, self.center, self.cache_bytes = model, center, cache_bytes
        self.head = find_head(model, name=head)
        num_classes, num_features = self.head.weight.shape
        self.groups = {name: classes.tolist() for name, classes in check_groups(groups, num_classes).items()}

        partition = None
        if class_counts is not None or center == "empirical":
            partition = _atoms(self.groups, num_classes)
        device = self.head.weight.device
        self.moments = ClassMoments(
            num_classes,
            num_features,
            class_counts=class_counts if center == "balanced" else None,
            partition=partition,
            device="cpu" if device.type == "mps" else device,
        )
        self._attached: contextlib.ExitStack | None = None
        self.reset()

    def reset(self) -> Self:
        """Starts a new pass: forgets every sample, and any forward pass not yet used."""
        self.moments.reset()
        with exact_arithmetic(self.moments.device):
            self._correct = torch.zeros_like(self.moments.count)
        self._cache: list[tuple[Tensor, Tensor, Tensor]] | None = [] if self.cache_bytes else None
        self._cached_bytes = 0
        self._captured: Tensor | None = None
        self._forwards = 0
        self._classifier: tuple[Tensor, Tensor | None] | None = None
        return self

    def __enter__(self) -> Self:
        if self._attached is not None:
            raise ValueError("the probe is already attached: enter it once")
        self.reset()
        with contextlib.ExitStack() as stack:
            if _is_compiled(self.model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            hook = self.head.module.register_forward_pre_hook(self._capture, with_kwargs=True)
            stack.callback(hook.remove)
            self._attached = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._attached is not None
        self._attached.close()
        self._attached = None
        self._captured = None

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
        features, forwards = self._captured, self._forwards
        self._captured, self._forwards = None, 0
        training = next((name for name, m in unwrap(self.model).named_modules() if m.training), None)
        if training is not None:
            raise ValueError(f"model must be in evaluation mode, but its module {training!r} trains: call model.eval()")
        if features is None or forwards != 1:
            raise ValueError(
                f"update must follow exactly one forward pass of the model, got {forwards} through its classifier "
                f"{self.head.name!r} since the last update"
            )
        if features.ndim != 2:
            raise ValueError(f"the classifier {self.head.name!r} must receive (B, d), got {tuple(features.shape)}")
        if labels.shape != features.shape[:1]:
            raise ValueError(f"labels must have shape ({len(features)},) as the batch has, got {tuple(labels.shape)}")
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != labels.shape:
                raise ValueError(f"mask must be bool {tuple(labels.shape)}, got {mask.dtype} {tuple(mask.shape)}")
            features, labels = features[mask.to(features.device)], labels[mask.to(labels.device)]

        self.moments.update(features, labels)
        with exact_arithmetic(self.moments.device):
            weight, bias = self._linear()
            logits = features.to(weight) @ weight.T
            chosen = (logits if bias is None else logits + bias).argmax(1)
            labels = labels.long().to(chosen.device).clamp(0, self.moments.num_classes - 1)
            self._correct.index_add_(0, labels, (chosen == labels).long())
            self._keep(features, labels, chosen)
        return self

    def compute(self, *, sync: bool = True) -> CollapseReport:
        """The report over all ranks.

        Args:
            sync: exchange with the other ranks, all of which must call it. False reports on this rank alone.

        Raises:
            ValueError: nothing was added, or something bad on an accelerator, or `class_counts` is not what was seen.
        """
        sync = sync and dist.is_available() and dist.is_initialized()
        moments = self.moments.sync() if sync else self.moments
        moments.check()
        if not moments.count.any():
            raise ValueError("compute needs at least one sample: call update first")
        with exact_arithmetic(moments.device):
            weight, bias = self._linear()
            agreement = self._agreement(moments, sync)
        return measure(moments, weight, bias, center=self.center, groups=self.groups, agreement=agreement)

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._captured = (args[0] if args else kwargs["input"]).detach()
        self._forwards += 1

    def _linear(self) -> tuple[Tensor, Tensor | None]:
        """The classifier as it was at the first update, so that training on before `compute` does not mix in."""
        if self._classifier is None:
            weight, bias = self.head.weight, self.head.bias
            self._classifier = (
                weight.detach().to(self.moments.mean, copy=True),
                None if bias is None else bias.detach().to(self.moments.mean, copy=True),
            )
        return self._classifier

    def _keep(self, features: Tensor, labels: Tensor, chosen: Tensor) -> None:
        """Copies features to the host, or drops all of them once they exceed the budget."""
        if self._cache is None:
            return
        self._cached_bytes += features.nbytes
        if self._cached_bytes > self.cache_bytes:
            self._cache = None
            return
        # From an accelerator to pinned memory, so nothing waits; the check of the count in `compute` does.
        self._cache.append((features.to("cpu", non_blocking=True, copy=True), labels, chosen))

    def _agreement(self, moments: ClassMoments, sync: bool) -> Agreement:
        """Counts over all ranks; each rank looks at its own features with the means of all."""
        # Rows: classifier right, nearest mean right, both agree, ranks without features (in every column).
        counts = torch.stack([self._correct, *(torch.zeros_like(self._correct) for _ in range(3))])
        if self._cache is None:
            counts[3] = 1
        # Distances about the centre of the means: a large common offset would cancel digits of ||h - mu||^2.
        seen = moments.count > 0
        origin = moments.mean[seen].mean(0)
        means = moments.mean - origin
        half = torch.where(seen, means.square().sum(1) / 2, torch.inf)
        for batch in self._cache or ():
            for features, labels, chosen in zip(*(t.split(CHUNK) for t in batch), strict=True):
                nearest = ((features.to(means) - origin) @ means.T - half).argmax(1)
                counts[1].index_add_(0, labels, (nearest == labels).long())
                counts[2].index_add_(0, labels, (nearest == chosen).long())
        if sync:
            wire = counts.cuda() if dist.get_backend() == "nccl" else counts.cpu()
            dist.all_reduce(wire)
            counts = wire
        counts = counts.cpu()
        if counts[3].any():
            return Agreement(counts[0], None, None, f"absent: features exceed cache_bytes={self.cache_bytes}")
        return Agreement(counts[0], counts[1], counts[2], "from a second look at the features, kept on the host")


def _is_compiled(model: nn.Module) -> bool:
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


def _atoms(groups: Mapping[str, Sequence[int]], num_classes: int) -> Tensor:
    """(K,) the finest partition that builds every group: classes in the same groups share a number."""
    membership = torch.zeros(num_classes, len(groups) + 1, dtype=torch.int64)
    for column, classes in enumerate(groups.values()):
        membership[classes, column] = 1
    return membership.unique(dim=0, return_inverse=True)[1]
