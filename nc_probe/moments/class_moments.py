"""Class moments in one pass: count, mean and within-class scatter, exact in any chunking, order and number of ranks.

For class k with samples x_i,

    n_k,    mu_k = (1/n_k) sum_i x_i,    S_k = sum_i (x_i - mu_k)(x_i - mu_k)^T,    t_k = tr S_k,

and a set b of n_b samples with mean mu_b joins a set a of n_a by the pairwise update

    delta = mu_b - mu_a,    mu = mu_a + (n_b/n) delta,    S = S_a + S_b + (n_a n_b/n) delta delta^T,    n = n_a + n_b

(Chan, Golub & LeVeque, The American Statistician 37(3), 1983). A batch is such a set; so is the state of another rank.

Which scatters are kept. A balanced within-class covariance is (1/K) sum_k S_k/n_k; an empirical one is (1/N) sum_k S_k.
The n_k are known only at the end, and S_k once added to S_j cannot be told apart from it, so no pooled d x d matrix
gives both: either the final proportions are known beforehand, or each class keeps its own matrix. Hence the state is
`scatter (G, d, d)`, where `partition` says which of the G matrices a class adds to and `scale` by what weight:

* nothing given: G = K, one matrix per class. Every weighting of every group is exact. For small problems.
* `class_counts` given: G = 1, S_k enters with weight 1/class_counts[k], so the sum is the balanced scatter.
* `partition` given: G matrices, e.g. one per group of classes, with or without `class_counts`.
* `scatter=False`: none. Whoever keeps the features can sum their scatter once the means and counts are known.

A weighting that the state cannot express is refused, never approximated.
"""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from nc_probe.moments import ranks
from nc_probe.moments.blocks import deviations
from nc_probe.moments.checks import check_batch, check_proportion, check_scatters, examine, short
from nc_probe.moments.precision import exact_arithmetic

__all__ = ["ClassMoments"]


class ClassMoments:
    """Streaming count, mean and within-class scatter of K classes of d features.

    The state is float64 whatever the features are: float32 second moments lose a collapsed within-class scatter in the
    rounding of the means. A device without float64 needs its state on the CPU.

    Values on the CPU are checked at once. Values on an accelerator are checked there without waiting for it; what is
    found is raised by `check`, which `merge`, `sync`, `within` and `measure` call.

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
        for name, value in (("num_classes", num_classes), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_classes, self.num_features = num_classes, num_features
        self.device = torch.device("cpu" if device is None else device)
        if self.device.type == "mps":
            raise ValueError("device 'mps' has no float64: keep the moments on 'cpu'")

        self.class_counts = None
        self.scale = torch.ones(num_classes, dtype=torch.float64, device=self.device)
        if class_counts is not None:
            self.class_counts = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu")
            if self.class_counts.shape != (num_classes,) or not (self.class_counts >= 0).all():
                raise ValueError(f"class_counts must be {num_classes} numbers >= 0, got {short(self.class_counts)}")
            self.scale = 1 / self.class_counts.clamp(min=1).to(self.device)

        self._by_default = partition is None and class_counts is None
        if scatter and self._by_default:
            check_scatters(num_classes, num_features)
        if partition is None:
            partition = torch.arange(num_classes) if class_counts is None else torch.zeros(num_classes)
        self.partition = torch.as_tensor(partition, device="cpu").long()
        if self.partition.shape != (num_classes,) or self.partition.min() < 0:
            raise ValueError(f"partition must be {num_classes} integers >= 0, got {short(self.partition)}")
        self.num_scatters = int(self.partition.max()) + 1 if scatter else 0
        self.reset()

    def reset(self) -> Self:
        """Forgets every sample."""
        K, d, G = self.num_classes, self.num_features, self.num_scatters
        self.batches = 0
        with exact_arithmetic(self.device):
            self.count = torch.zeros(K, dtype=torch.int64, device=self.device)
            self.mean = torch.zeros(K, d, dtype=torch.float64, device=self.device)
            self.trace = torch.zeros(K, dtype=torch.float64, device=self.device)
            self.scatter = torch.zeros(G, d, d, dtype=torch.float64, device=self.device)
            # First batch with a bad label, and with a bad feature; -1: none. Read by `check` only.
            self._bad = torch.full((2,), -1, dtype=torch.int64, device=self.device)
        return self

    def update(self, features: Tensor, labels: Tensor) -> Self:
        """Adds a batch.

        Args:
            features: (B, d) floating point, any precision, any device.
            labels: (B,) integers in 0..K-1.

        Raises:
            ValueError: wrong shapes or types, labels out of range, features that are not finite (the batch is named).
        """
        with exact_arithmetic(self.device):
            check_batch(features, labels, self.num_features)
            x, labels = features.detach().to(self.device), labels.detach().long()
            self._bad = examine(x, labels, self.num_classes, batch=self.batches, bad=self._bad)
            self.batches += 1
            if len(labels):
                self._add(x, labels.clamp(0, self.num_classes - 1))
        return self

    def add_scatter(self, features: Tensor, labels: Tensor) -> Self:
        """Adds the scatter, about the class means, of samples that `update` has counted with `scatter=False`.

        For features that are kept no longer: once all of them have been added, `update` goes on with scatter.

        Args:
            features: (B, d) as given to `update`.
            labels: (B,).

        Raises:
            ValueError: one scatter per class would exceed 256 MiB without having been asked for.
        """
        with exact_arithmetic(self.device):
            if not self.num_scatters:
                if self._by_default:
                    check_scatters(self.num_classes, self.num_features)
                self.num_scatters = int(self.partition.max()) + 1
                self.scatter = self.mean.new_zeros(self.num_scatters, self.num_features, self.num_features)
            for y, of in deviations(features.detach(), labels, self.mean):
                self._add_scatter(y, of)
        return self

    def merge(self, other: "ClassMoments") -> Self:
        """Adds the samples of `other`, which saw other samples of the same classes and features.

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

    def sync(self) -> "ClassMoments":
        """The moments over all ranks: the states of all ranks merged in the order of ranks, so equal on every rank.

        Returns a new object: `self` goes on holding the samples of this rank only. Every rank must call it.
        """
        total = copy.deepcopy(self).reset()
        turn = copy.deepcopy(total)
        for state in ranks.in_turn([self.count, self.mean, self.trace, self.scatter, self._bad]):
            turn.count, turn.mean, turn.trace, turn.scatter, turn._bad = state
            total._absorb(turn)
        # Only after the last broadcast: a rank that raised earlier would leave the others waiting.
        total.check()
        return total

    def check(self) -> None:
        """Raises ValueError if a batch on an accelerator had labels out of range or features that are not finite."""
        label_batch, feature_batch = self._bad.tolist()
        if label_batch >= 0:
            raise ValueError(f"labels must be in 0..{self.num_classes - 1}, but not all are in batch {label_batch}")
        if feature_batch >= 0:
            raise ValueError(f"features must be finite, got NaN or infinity in batch {feature_batch}")

    def check_counts(self) -> None:
        """Raises ValueError if `class_counts` was given and the samples seen are not in proportion to it."""
        if self.class_counts is not None:
            check_proportion(self.count.cpu().double(), self.class_counts)

    def resolves(self, class_weights: Tensor) -> bool:
        """Whether `within(class_weights)` can be had from the scatters kept."""
        return self._scatter_weights(class_weights) is not None

    def within(self, class_weights: Tensor) -> Tensor:
        """The weighted within-class scatter sum_k class_weights[k] S_k.

        Args:
            class_weights: (K,); 1/(K n_k) gives the balanced covariance, 1/N the empirical one.

        Returns:
            (d, d) float64.

        Raises:
            ValueError: two classes share a scatter but not their weight in it.
        """
        self.check()
        weights = self._scatter_weights(class_weights)
        if weights is None:
            hint = "give class_counts, or a partition that keeps classes of different counts apart"
            if not self.num_scatters:
                hint = "these moments were made with scatter=False"
            self.check_counts()
            raise ValueError(f"the pooled within-class scatter cannot be weighted as asked: {hint}")
        return (weights @ self.scatter.flatten(1)).view(self.num_features, self.num_features)

    def spread(self, basis: Tensor, classes: Tensor) -> Tensor | None:
        """tr(basis^T S_k basis) of some classes, if each keeps a scatter of its own.

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

    def _scatter_weights(self, class_weights: Tensor) -> Tensor | None:
        """(G,) factors a with sum_g a_g scatter_g = sum_k class_weights_k S_k, or None if there are none."""
        # Classes of fewer than two samples have S_k = 0 and agree with any weight.
        seen = self.count > 1
        ratio = (class_weights.to(self.scale) / self.scale)[seen]
        bins = self.partition.to(self.device)[seen]
        if not self.num_scatters:
            return None if len(bins) else ratio
        zeros = ratio.new_zeros(self.num_scatters)
        high = zeros.scatter_reduce(0, bins, ratio, "amax", include_self=False)
        low = zeros.scatter_reduce(0, bins, ratio, "amin", include_self=False)
        return high if bool((high - low <= 1e-12 * high.abs()).all()) else None

    def _absorb(self, other: "ClassMoments") -> Self:
        with exact_arithmetic(self.device):
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
        delta, square = torch.zeros_like(ref), torch.zeros_like(n)
        for y, of in deviations(x, slot, ref):
            delta.index_add_(0, of, y)
            square.index_add_(0, of, y.norm(dim=1).square())
        delta /= n_b.clamp(min=1)[:, None]
        self.count.index_copy_(0, klass, n.long())
        self.mean.index_copy_(0, klass, torch.addcmul(ref, delta, (n_b / n.clamp(min=1))[:, None]))
        here = labels.device.type == self.device.type == "cpu"
        if here and not self.num_scatters and bool((n_a >= n_b).all()):
            # ref is the class mean so far, so this is Chan's update of the trace, of which at most a half cancels.
            self.trace.index_add_(0, klass, square - n_b.square() / n * delta.norm(dim=1).square())
            return
        # With r = x - ref, r - delta sums to zero over a class of the batch, so adding c delta to each of its n_b rows
        # adds exactly n_b c^2 delta delta^T to their scatter: with c^2 = n_a/n that is Chan's second term, and one GEMM
        # does it all.
        shift = ref + (1 - (n_a / n.clamp(min=1)).sqrt())[:, None] * delta
        rows = len(x) if self.num_scatters > 1 else None  # many scatters want many rows at a time
        for y, of in deviations(x, slot, shift, rows=rows):
            self.trace.index_add_(0, klass[of], y.norm(dim=1).square())
            self._add_scatter(y, klass[of])

    def _present(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classes klass (S,) of the batch, slot (B,) with labels = klass[slot], and samples n_b (S,) of each."""
        klass, slot, n_b = labels.unique(return_inverse=True, return_counts=True)
        return klass.to(self.device), slot.to(self.device), n_b.to(self.device)

    def _every(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_present`, with S = K: classes of which the batch has none included."""
        slot = labels.to(self.device)
        n_b = torch.zeros_like(self.count).index_add_(0, slot, torch.ones_like(slot))
        return torch.arange(self.num_classes, device=self.device), slot, n_b

    def _add_scatter(self, rows: Tensor, classes: Tensor) -> None:
        """scatter[partition[classes[i]]] += scale[classes[i]] rows[i] rows[i]^T."""
        if not self.num_scatters:
            return
        rows = rows * self.scale.sqrt()[classes, None]
        if self.num_scatters == 1:
            self.scatter[0].addmm_(rows.T, rows)
            return
        bins = self.partition.to(classes.device)[classes]
        sizes = torch.bincount(bins, minlength=self.num_scatters).tolist()
        for scatter, part in zip(self.scatter, rows[bins.argsort()].split(sizes), strict=True):
            if len(part):
                scatter.addmm_(part.T, part)
