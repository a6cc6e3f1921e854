"""Class moments in one pass: count, mean and within-class scatter, exact in any chunking, order and number of ranks.

For class k with samples x_i,

    n_k,    mu_k = (1/n_k) sum_i x_i,    S_k = sum_i (x_i - mu_k)(x_i - mu_k)^T,    t_k = tr S_k,

and a set b of n_b samples with mean mu_b joins a set a of n_a by the pairwise update

    delta = mu_b - mu_a,    mu = mu_a + (n_b/n) delta,    S = S_a + S_b + (n_a n_b/n) delta delta^T,    n = n_a + n_b

(Chan, Golub & LeVeque, The American Statistician 37(3), 1983). A batch is such a set; so is the state of another rank.

Which scatters are kept, and which weightings of them can be had, stands in `scatter.py`.
"""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from nc_probe.moments import ranks
from nc_probe.moments.blocks import deviations
from nc_probe.moments.precision import cpu_by_default, float64_context
from nc_probe.moments.scatter import add_outer_products, common_factors, pooling
from nc_probe.moments.state import State
from nc_probe.moments.validation import check_batch, check_class_counts, check_scatters, validate_values

__all__ = ["ClassMoments"]


class ClassMoments(State):
    """Streaming count, mean and within-class scatter of K classes of d features.

    >>> import torch
    >>> from nc_probe import ClassMoments
    >>> moments = ClassMoments(num_classes=2, num_features=2)
    >>> moments = moments.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 1]))
    >>> moments.count.tolist(), moments.mean.tolist(), moments.trace.tolist()
    ([2, 1], [[2.0, 0.0], [0.0, 5.0]], [2.0, 0.0])
    >>> moments.within_class_scatter(torch.tensor([0.5, 1.0])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]

    The state is float64 whatever the features are: float32 second moments lose a collapsed within-class scatter in the
    rounding of the means. A device without float64 needs its state on the CPU.

    Values on the CPU are checked at once. Values on an accelerator are checked there without waiting for it; what is
    found is raised by `check`, which `merge`, `sync`, `within_class_scatter` and `measure` call.

    Args:
        num_classes: K.
        num_features: d.
        class_counts: (K,) final number of samples of each class (over all ranks), or anything proportional to it. With
            it one (d, d) scatter is enough for the balanced weighting.
        partition: (K,) integers in 0..G-1, the scatter that each class adds to. Default: one per class, or a single
            one if `class_counts` is given.
        scatter: False keeps none.
        device: where the state lives. Default: the CPU.

    Attributes:
        count: (K,) int64 samples seen.
        mean: (K, d) class means; zero where nothing was seen.
        trace: (K,) tr S_k, the sum of squared distances to the class mean.
        scatter: (G, d, d) weighted sums of S_k.
        partition: (K,) on the CPU.
        scale: (K,) the weight with which S_k enters its scatter.
        batches: number of calls of `update`.

    Raises:
        ValueError: a bad argument, or one scatter per class would exceed 256 MiB without having been asked for.
    """

    # In `_bad`: the first batch with a bad label, and with a bad feature; -1 for none.
    NAMES = ("count", "mean", "trace", "scatter", "_bad")
    count: Tensor
    mean: Tensor
    trace: Tensor
    scatter: Tensor
    _bad: Tensor

    @cpu_by_default()
    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        class_counts: Tensor | Sequence[int] | None = None,
        partition: Tensor | Sequence[int] | None = None,
        scatter: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(device)
        for name, value in (("num_classes", num_classes), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_classes, self.num_features = num_classes, num_features
        self._by_default = partition is None and class_counts is None
        if scatter and self._by_default:
            check_scatters(num_classes, num_features)
        self.class_counts, self.partition, scale = pooling(num_classes, class_counts, partition)
        self.scale = scale.to(self.device)
        self.num_scatters = int(self.partition.max()) + 1 if scatter else 0
        self.reset()

    def empty(self) -> dict[str, Tensor]:
        """Make the tensors as they are without samples."""
        K, d, G = self.num_classes, self.num_features, self.num_scatters
        integers: dict[str, Any] = {"dtype": torch.int64, "device": self.device}
        real: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        return {
            "count": torch.zeros(K, **integers),
            "mean": torch.zeros(K, d, **real),
            "trace": torch.zeros(K, **real),
            "scatter": torch.zeros(G, d, d, **real),
            "_bad": torch.full((2,), -1, **integers),
        }

    def to(self, device: torch.device | str) -> Self:
        """Move the state to another device.

        Raises:
            ValueError: it has no float64.
        """
        self.scale = self.scale.to(super().to(device).device)
        return self

    def update(self, features: Tensor, labels: Tensor) -> Self:
        """Add a batch.

        Args:
            features: (B, d) floating point, any precision, any device.
            labels: (B,) integers in 0..K-1.

        Raises:
            ValueError: wrong shapes or types, labels out of range, features that are not finite (the batch is named).
        """
        with float64_context(self.device):
            check_batch(features, labels, self.num_features)
            x, labels = features.detach().to(self.device), labels.detach().long()
            self._bad = validate_values(x, labels, self.num_classes, batch=self.batches, bad=self._bad)
            self.batches += 1
            if len(labels):
                self._add(x, labels.clamp(0, self.num_classes - 1))
        return self

    def add_scatter(self, features: Tensor, labels: Tensor) -> Self:
        """Add the scatter, about the class means, of samples that `update` has counted with `scatter=False`.

        For features that are kept no longer: once all of them have been added, `update` goes on with scatter.

        Args:
            features: (B, d) as given to `update`.
            labels: (B,).

        Raises:
            ValueError: one scatter per class would exceed 256 MiB without having been asked for.
        """
        with float64_context(self.device):
            if not self.num_scatters:
                if self._by_default:
                    check_scatters(self.num_classes, self.num_features)
                self.num_scatters = int(self.partition.max()) + 1
                self.scatter = self.mean.new_zeros(self.num_scatters, self.num_features, self.num_features)
            for y, of in deviations(features.detach(), labels, self.mean):
                self._add_scatter(y, of)
        return self

    def add_trace(self, features: Tensor, labels: Tensor) -> None:
        """Add tr S_k, about the class means, of samples of which only counts and means are there (`class_sums.py`)."""
        with float64_context(self.device):
            for y, of in deviations(features.detach(), labels, self.mean):
                self.trace.index_add_(0, of, y.norm(dim=1).square())

    def merge(self, other: "ClassMoments") -> Self:
        """Add the samples of `other`, which saw other samples of the same classes and features.

        Raises:
            ValueError: `other` has another shape, partition or class_counts.
        """
        if (
            self.mean.shape != other.mean.shape
            or self.num_scatters != other.num_scatters
            or not torch.equal(self.partition, other.partition)
            or not torch.equal(self.scale.cpu(), other.scale.cpu())
        ):
            raise ValueError("other must have the same num_classes, num_features, class_counts, partition and scatter")
        self.check()
        other.check()
        return self._absorb(other)

    def sync(self, group: dist.ProcessGroup | None = None) -> "ClassMoments":
        """Merge the states of all ranks in the order of ranks, so that they are equal on every rank.

        Every rank of the group must call it.

        Args:
            group: of processes. Default: all.

        Returns:
            A new object: `self` goes on holding the samples of this rank only.
        """
        total = copy.copy(self).reset()
        turn = copy.copy(self)
        for state in ranks.broadcast_each([getattr(self, name) for name in self.NAMES], group):
            for name, value in zip(self.NAMES, state, strict=True):
                setattr(turn, name, value)
            total._absorb(turn)
        # Only after the last broadcast: a rank that raised earlier would leave the others waiting.
        total.check()
        return total

    def check(self) -> None:
        """Raise ValueError if a batch on an accelerator had labels out of range or features that are not finite."""
        label_batch, feature_batch = self._bad.tolist()
        if label_batch >= 0:
            raise ValueError(f"labels must be in 0..{self.num_classes - 1}, but not all are in batch {label_batch}")
        if feature_batch >= 0:
            raise ValueError(f"features must be finite, got NaN or infinity in batch {feature_batch}")

    def check_counts(self) -> None:
        """Raise ValueError if `class_counts` was given and the samples seen are not in proportion to it."""
        if self.class_counts is not None:
            check_class_counts(self.count.cpu().double(), self.class_counts)

    @cpu_by_default()
    def supports_weights(self, class_weights: Tensor) -> bool:
        """Tell whether `within_class_scatter(class_weights)` can be had from the scatters kept."""
        return self._factors(class_weights) is not None

    @cpu_by_default()
    def within_class_scatter(self, class_weights: Tensor) -> Tensor:
        """Sum the within-class scatters, sum_k class_weights[k] S_k.

        Args:
            class_weights: (K,); 1/(K n_k) gives the balanced covariance, 1/N the empirical one.

        Returns:
            (d, d) float64.

        Raises:
            ValueError: two classes share a scatter but not their weight in it.
        """
        self.check()
        factors = self._factors(class_weights)
        if factors is None:
            hint = "give class_counts, or a partition that keeps classes of different counts apart"
            if not self.num_scatters:
                hint = "these moments were made with scatter=False"
            self.check_counts()
            raise ValueError(f"the pooled within-class scatter cannot be weighted as asked: {hint}")
        return (factors @ self.scatter.flatten(1)).view(self.num_features, self.num_features)

    @cpu_by_default()
    def projected_scatter_trace(self, basis: Tensor, classes: Tensor) -> Tensor | None:
        """Compute tr(basis^T S_k basis) of some classes, if each keeps a scatter of its own.

        Args:
            basis: (d, r) float64.
            classes: (m,) class numbers.

        Returns:
            (m,) float64, or None if the scatters are pooled or absent.
        """
        if len(self.partition.unique()) < self.num_classes or not self.num_scatters:
            return None
        parts = zip(self.partition[classes.cpu()].tolist(), self.scale[classes].tolist(), strict=True)
        return torch.stack([(self.scatter[g] @ basis * basis).sum() / scale for g, scale in parts])

    def _factors(self, class_weights: Tensor) -> Tensor | None:
        seen = self.count > 1  # classes of fewer than two samples have S_k = 0 and agree with any weight
        ratio = (class_weights.to(self.scale) / self.scale)[seen]
        return common_factors(ratio, self.partition.to(self.device)[seen], self.num_scatters)

    def _absorb(self, other: "ClassMoments") -> Self:
        with float64_context(self.device):
            n_b = other.count.to(self.device)
            n = self.count + n_b
            share = n_b.double() / n.clamp(min=1)
            delta = other.mean.to(self.device) - self.mean
            y = delta * (self.count * share).sqrt()[:, None]
            self.trace += other.trace.to(self.device) + y.square().sum(1)
            self.scatter += other.scatter.to(self.device)
            self._add_scatter(y, torch.arange(self.num_classes, device=self.device))
            self.mean += share[:, None] * delta
            self.count = n
            self._bad = torch.where(self._bad < 0, other._bad.to(self.device), self._bad)
        return self

    def _add(self, x: Tensor, labels: Tensor) -> None:
        # On an accelerator the number of classes present would have to be waited for.
        classes = self._present if labels.device.type == "cpu" else self._every
        klass, slot, n_b = classes(labels)
        n_a = self.count[klass].double()
        n = n_a + n_b
        # Everything is taken relative to a point near the data, so that a large common offset cancels before it rounds.
        ref = torch.where(((n_a > 0) | (n_b == 0))[:, None], self.mean[klass], x[:1].double())
        delta = torch.zeros_like(ref)
        for y, of in deviations(x, slot, ref):
            delta.index_add_(0, of, y)
        delta /= n_b.clamp(min=1)[:, None]
        self.count.index_copy_(0, klass, n.long())
        self.mean.index_copy_(0, klass, torch.addcmul(ref, delta, (n_b / n.clamp(min=1))[:, None]))
        # With r = x - ref, r - delta sums to zero over a class of the batch, so adding c delta to each of its n_b rows
        # adds exactly n_b c^2 delta delta^T to their scatter: with c^2 = n_a/n that is Chan's second term, and one GEMM
        # does it all.
        shift = ref + (1 - (n_a / n.clamp(min=1)).sqrt())[:, None] * delta
        rows = len(x) if self.num_scatters > 1 else None  # many scatters want many rows at a time
        for y, of in deviations(x, slot, shift, rows=rows):
            self.trace.index_add_(0, klass[of], y.norm(dim=1).square())
            self._add_scatter(y, klass[of])

    def _present(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find classes klass (S,) of the batch, slot (B,) with labels = klass[slot], and samples n_b (S,) of each."""
        klass, slot, n_b = labels.unique(return_inverse=True, return_counts=True)
        return klass.to(self.device), slot.to(self.device), n_b.to(self.device)

    def _every(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_present`, with S = K: classes of which the batch has none included."""
        slot = labels.to(self.device)
        n_b = torch.zeros_like(self.count).index_add_(0, slot, torch.ones_like(slot))
        return torch.arange(self.num_classes, device=self.device), slot, n_b

    def _add_scatter(self, rows: Tensor, classes: Tensor) -> None:
        """scatter[partition[classes[i]]] += scale[classes[i]] rows[i] rows[i]^T."""
        if self.num_scatters:
            scaled = rows * self.scale.sqrt()[classes, None]
            add_outer_products(self.scatter, scaled, self.partition.to(classes.device)[classes])
