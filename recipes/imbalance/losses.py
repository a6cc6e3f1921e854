"""Losses for long-tailed data.

Every loss here gives the logits z of an image a number l_k(z) for each class k, the loss if k were its label, and is

    L = mean over images of  sum_k t_k w_k l_k(z),

where t is the label as a distribution: one-hot, smoothed, or mixed by mixup and CutMix; each loss is thus defined for
soft targets, as the expectation over labels drawn from t, which is how mixup defines it (Zhang et al., ICLR 2018). The
class weights w are 1 unless classes are re-weighted. The mean is over images, also then: torch's `weight=` divides by
the sum of the weights of the batch, so that the loss of a batch is no longer the mean of the losses of its parts, as
accumulation and data parallelism take it to be. The weights have mean 1 over the training images instead, sum_k pi_k
w_k = 1 with pi_k = n_k / n, which is what torch's division comes to on the average; so a learning rate keeps its
meaning.

`counts` are the images n_k of each class that the loss is to correct for: those of the training set when it is drawn
image by image. A sampler that draws the classes equally often has corrected already.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.errors import UserError, check, did_you_mean
from recipes.imbalance.priors import check_counts, class_weights, log_prior, widen


class Loss(nn.Module, ABC):
    """The mean over images of sum_k t_k w_k l_k(z); a subclass gives l.

    It computes in float32 or better, whatever the logits and the autocast are. Move it to the device of the logits. It
    has no parameters, and nothing to save.

    Args:
        counts: images of each class, (K,), each above 0.
        label_smoothing: part of each label that is spread evenly over all K classes, 0 to 1.
        reweight_epoch: deferred re-weighting (DRW; Cao et al., NeurIPS 2019): the epoch, counted from 0, from which on
            classes are weighted by `class_weights`; never if not given.
        beta: of `class_weights`.

    Raises:
        UserError: a value that is not allowed.
    """

    weight: Tensor
    reweighted: Tensor

    def __init__(
        self,
        counts: Tensor | Sequence[float],
        *,
        label_smoothing: float = 0.0,
        reweight_epoch: int | None = None,
        beta: float = 0.9999,
    ) -> None:
        super().__init__()
        check(0 <= label_smoothing <= 1, "label_smoothing", label_smoothing, "0 to 1")
        check(reweight_epoch is None or reweight_epoch >= 0, "reweight_epoch", reweight_epoch, "0 or more")
        self.label_smoothing, self.reweight_epoch = label_smoothing, reweight_epoch
        self._constant("reweighted", class_weights(counts, beta=beta))
        self._constant("weight", torch.ones(len(self.reweighted)))
        self.set_epoch(0)

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.float(), persistent=False)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, counted from 0."""
        # In place, so that a compiled or captured step sees it.
        if self.reweight_epoch is not None and epoch >= self.reweight_epoch:
            self.weight.copy_(self.reweighted)
        else:
            self.weight.fill_(1)

    @abstractmethod
    def class_losses(self, logits: Tensor) -> Tensor:
        """l_k(z): (B, K) from logits (B, K)."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: (B, K).
            target: classes (B,), or distributions over the classes (B, K).

        Raises:
            UserError: other shapes.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.weight):
            raise UserError(f"logits has shape {tuple(logits.shape)}; allowed: (B, {len(self.weight)})")
        soft = target.is_floating_point()
        if target.shape != (logits.shape if soft else logits.shape[:1]):
            raise UserError(
                f"target has shape {tuple(target.shape)} and dtype {target.dtype}; allowed: classes "
                f"({len(logits)},) or distributions {tuple(logits.shape)}"
            )
        losses = self.class_losses(widen(logits))
        losses = losses * self.weight.to(losses)
        mean = (losses * target).sum(1) if soft else losses.gather(1, target.long().unsqueeze(1)).squeeze(1)
        if self.label_smoothing:
            mean = (1 - self.label_smoothing) * mean + self.label_smoothing * losses.mean(1)
        return mean.mean()


class VectorScaling(Loss):
    """Cross-entropy of a_k z_k + tau log pi_k, where a_k = (n_k / n_max)^gamma.

    gamma 0 is logit adjustment, tau 0 the class-dependent temperatures of Ye et al. (2020), both 0 cross-entropy. The
    network is used without a and tau.

    Source: Kini, Paraskevas, Oymak & Thrampoulidis, "Label-imbalanced and group-sensitive classification under
    overparameterization", NeurIPS 2021 (arXiv 2103.01550), whose Delta_k is a_k and whose iota_k is tau log pi_k. The
    defaults are theirs for CIFAR-10 at a ratio of 100.

    Args:
        gamma: 0 or more.
        tau: any finite number.
        shared: arguments of `Loss`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, counts: Tensor | Sequence[float], *, gamma: float = 0.15, tau: float = 1.25, **shared: Any
    ) -> None:
        super().__init__(counts, **shared)
        check(gamma >= 0 and math.isfinite(gamma), "gamma", gamma, "0 or more")
        check(math.isfinite(tau), "tau", tau, "a finite number")
        n = check_counts(counts)
        self._constant("scale", (n / n.max()) ** gamma)
        self._constant("shift", tau * log_prior(counts))

    def class_losses(self, logits: Tensor) -> Tensor:
        return -F.log_softmax(logits * self.scale.to(logits) + self.shift.to(logits), dim=1)


class LogitAdjustment(VectorScaling):
    """Cross-entropy of z_k + tau log pi_k.

    A rare class gets its logit lowered in training, so that it learns a larger one; the network is used without. With
    tau 1 its minimiser is the classifier of least balanced error.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021 (arXiv 2007.07314), eq. 10.

    Args:
        tau: any finite number.
        shared: arguments of `Loss`.
    """

    def __init__(self, counts: Tensor | Sequence[float], *, tau: float = 1.0, **shared: Any) -> None:
        super().__init__(counts, gamma=0.0, tau=tau, **shared)


class BalancedSoftmax(LogitAdjustment):
    """-log(n_y exp z_y / sum_k n_k exp z_k): logit adjustment with tau 1.

    Source: Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020 (arXiv 2007.10740).

    Args:
        shared: arguments of `Loss`.
    """

    def __init__(self, counts: Tensor | Sequence[float], **shared: Any) -> None:
        super().__init__(counts, tau=1.0, **shared)


class CrossEntropy(Loss):
    """-log softmax(z)_k. Arguments as of `Loss`."""

    def class_losses(self, logits: Tensor) -> Tensor:
        return -F.log_softmax(logits, dim=1)


class ClassBalanced(CrossEntropy):
    """Cross-entropy with classes weighted by `class_weights`, from the first epoch if `reweight_epoch` is not given.

    Source: Cui et al., CVPR 2019 (arXiv 1901.05555). Their class-balanced focal loss is `Focal` with `reweight_epoch`
    0.

    Args:
        shared: arguments of `Loss`.
    """

    def __init__(self, counts: Tensor | Sequence[float], *, reweight_epoch: int | None = None, **shared: Any) -> None:
        super().__init__(counts, reweight_epoch=reweight_epoch or 0, **shared)


class MeanSquaredError(Loss):
    """(k (z_y - M)^2 + sum over the other classes of z_j^2) / K.

    With k = M = 1 it is the mean squared error to the one-hot label, and for a soft target t differs from that to t by
    a constant.

    Source: Hui & Belkin, "Evaluation of neural architectures trained with square loss vs cross-entropy in
    classification tasks", ICLR 2021 (arXiv 2006.07322), who take k = M = 1 below 42 classes, k = 15 and M = 30 for the
    1000 of ImageNet.

    Args:
        weight_true: k, the weight of the true class, above 0.
        target_true: M, the output wanted for the true class, above 0.
        shared: arguments of `Loss`.
    """

    def __init__(
        self,
        counts: Tensor | Sequence[float],
        *,
        weight_true: float = 1.0,
        target_true: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(counts, **shared)
        check(weight_true > 0 and math.isfinite(weight_true), "weight_true", weight_true, "above 0")
        check(target_true > 0 and math.isfinite(target_true), "target_true", target_true, "above 0")
        self.weight_true, self.target_true = weight_true, target_true

    def class_losses(self, logits: Tensor) -> Tensor:
        squares = logits.square()
        others = squares.sum(1, keepdim=True) - squares
        return (self.weight_true * (logits - self.target_true).square() + others) / logits.shape[1]


class Focal(Loss):
    """-(1 - p_k)^gamma log p_k, where p = softmax(z).

    Source: Lin et al., "Focal loss for dense object detection", ICCV 2017 (arXiv 1708.02002), eq. 4, with a softmax in
    place of their sigmoid; their weights alpha are here those of re-weighting.

    Args:
        gamma: 0 (cross-entropy) or more.
        shared: arguments of `Loss`.
    """

    def __init__(self, counts: Tensor | Sequence[float], *, gamma: float = 2.0, **shared: Any) -> None:
        super().__init__(counts, **shared)
        check(gamma >= 0 and math.isfinite(gamma), "gamma", gamma, "0 or more")
        self.gamma = gamma

    def class_losses(self, logits: Tensor) -> Tensor:
        odds = _log_odds_against(logits)  # 1 - p itself may round to 0, where its power has no gradient
        return -torch.exp(self.gamma * F.logsigmoid(odds)) * F.logsigmoid(-odds)


class LDAM(Loss):
    """Label-distribution-aware margin loss: cross-entropy with the true class's logit lowered by s Delta_y.

    The margins Delta_k = C / n_k^(1/4) are scaled so that the largest is `max_margin`. They are margins between
    cosines: the logits must be s times the cosine of feature and class vector, as the "cosine" classifier of
    `recipes.imbalance.classifiers` with the same `scale` gives them. They are used as they come, not multiplied by s
    again.

    Source: Cao, Wei, Gaidon, Arechiga & Ma, "Learning imbalanced datasets with label-distribution-aware margin loss",
    NeurIPS 2019 (arXiv 1906.07413). With `reweight_epoch` it is their LDAM-DRW.

    Args:
        max_margin: margin of the rarest class, 0 to 2, as a difference of cosines.
        scale: s, above 0.
        shared: arguments of `Loss`.
    """

    margin: Tensor

    def __init__(
        self, counts: Tensor | Sequence[float], *, max_margin: float = 0.5, scale: float = 30.0, **shared: Any
    ) -> None:
        super().__init__(counts, **shared)
        check(0 <= max_margin <= 2, "max_margin", max_margin, "0 to 2")
        check(scale > 0 and math.isfinite(scale), "scale", scale, "above 0")
        n = check_counts(counts)
        self._constant("margin", scale * max_margin * (n.min() / n) ** 0.25)

    def class_losses(self, logits: Tensor) -> Tensor:
        return -F.logsigmoid(-self.margin.to(logits) - _log_odds_against(logits))


LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "mse": MeanSquaredError,
    "focal": Focal,
    "class_balanced": ClassBalanced,
    "ldam": LDAM,
    "balanced_softmax": BalancedSoftmax,
    "logit_adjustment": LogitAdjustment,
    "vs": VectorScaling,
}


def create_loss(name: str, counts: Tensor | Sequence[float], **parameters: Any) -> Loss:
    """Create a loss by its name.

    Args:
        name: a key of `LOSSES`.
        counts: images of each class, (K,).
        parameters: arguments of that loss and of `Loss`.

    Raises:
        UserError: an unknown name or parameter, or a value that is not allowed.
    """
    if name not in LOSSES:
        raise UserError(f"loss {name!r} is unknown{did_you_mean(name, list(LOSSES))}; allowed: {', '.join(LOSSES)}")
    allowed = loss_parameters(name)
    for given in parameters:
        if given not in allowed:
            hint = did_you_mean(given, allowed)
            raise UserError(f"loss {name!r} has no parameter {given!r}{hint}; allowed: {', '.join(allowed)}")
    return LOSSES[name](counts, **parameters)


def loss_parameters(name: str) -> list[str]:
    """Names of the parameters of a loss: its own, then those of `Loss`."""
    signatures = (inspect.signature(cls.__init__).parameters.values() for cls in (LOSSES[name], Loss))
    return list(dict.fromkeys(p.name for ps in signatures for p in ps if p.kind is p.KEYWORD_ONLY))


def _log_odds_against(logits: Tensor) -> Tensor:
    """log((1 - p_k) / p_k) = log sum_{j != k} exp(z_j - z_k), where p = softmax(z): (B, K), exact also where p_k
    rounds to 1."""
    log_p = F.log_softmax(logits, dim=1)
    top = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    # Only the largest p_k can exceed 1/2; for the others 1 - p_k is accurate as it stands.
    others = logits.masked_fill(top, -torch.inf).logsumexp(1, keepdim=True) - logits
    rest = torch.log1p(-log_p.masked_fill(top, -1.0).exp()) - log_p
    return torch.where(top, others, rest)
