"""Classifiers for long-tailed data: replacements for a timm model's last layer, and what is done to it after.

Before training, `replace_classifier`. After it, at no cost, `tau_normalise`; or a second stage in which the features
are frozen, `second_stage`, and then `fold`.

The "cosine" and "etf" classifiers normalise the feature, then apply an nn.Linear, `linear`, the last of the model, so
that weight @ (its input) is the logits, exactly: NCProbe(model, head=classifier_name(model)) measures that map. Their
weights are stored under other names than timm's, so `timm.create_model("local-dir:...", pretrained=True)` refuses
them: create the model without weights, replace the classifier, then load them. The others leave an ordinary timm model
behind, once folded.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init

from recipes.errors import UserError, check, did_you_mean

KINDS = ("linear", "cosine", "etf")
STAGES = ("crt", "lws")


class CosineClassifier(nn.Module):
    """logits_k = scale cos(w_k, h), for features h.

    Args:
        linear: gives the vectors w, and is rebuilt without its bias.
        scale: logit of two vectors of the same direction.
    """

    def __init__(self, linear: nn.Linear, *, scale: float) -> None:
        super().__init__()
        self.linear = _without_bias(linear)
        self.linear.weight = nn.Parameter(linear.weight.detach().clone())
        parametrize.register_parametrization(self.linear, "weight", UnitRows(scale))

    def forward(self, h: Tensor) -> Tensor:
        """Logits (B, K) of features (B, d)."""
        return self.linear(F.normalize(h, dim=-1))


class UnitRows(nn.Module):
    """Rows of a matrix scaled to length `scale`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * F.normalize(weight, dim=1)


class ETFClassifier(nn.Module):
    """logits_k = scale <m_k, h / |h|>, where the m_k are the vectors of a fixed simplex equiangular tight frame.

    The frame is a buffer: no optimizer sees it.

    Source: Yang et al., "Inducing neural collapse in imbalanced learning: do we really need a learnable classifier at
    the end of deep neural network?", NeurIPS 2022 (arXiv 2203.09081).

    Args:
        linear: the classifier to replace, of d features and K <= d + 1 classes.
        scale: logit of a feature of the direction of its class.
        seed: of the rotation of the frame.
    """

    def __init__(self, linear: nn.Linear, *, scale: float, seed: int) -> None:
        super().__init__()
        frame = simplex_etf_vectors(linear.out_features, linear.in_features, seed=seed)
        self.linear = _without_bias(linear)
        del self.linear.weight
        self.linear.register_buffer("weight", (scale * frame).to(linear.weight))

    def forward(self, h: Tensor) -> Tensor:
        """Logits (B, K) of features (B, d)."""
        return self.linear(F.normalize(h, dim=-1))


def simplex_etf_vectors(num_classes: int, num_features: int, *, seed: int = 0) -> Tensor:
    """K unit vectors in d dimensions with pairwise cosines -1 / (K - 1), rotated at random.

    Args:
        num_classes: K, at least 2.
        num_features: d, at least K - 1.

    Returns:
        (K, d) float64, on the host.

    Raises:
        UserError: K or d is too small.
    """
    K, d = num_classes, num_features
    check(K >= 2, "num_classes", K, "2 or more")
    check(d >= K - 1, "num_features", d, f"{K - 1} or more, for a simplex of {K} classes")
    generator = torch.Generator().manual_seed(seed)
    # Row i of Helmert's matrix is (1, ..., 1, -i, 0, ..., 0), i ones, normalised: a basis of what is orthogonal to 1.
    i = torch.arange(1, K, dtype=torch.float64)
    helmert = torch.ones(K - 1, K, dtype=torch.float64).tril() - torch.diag(i, 1)[: K - 1]
    helmert = helmert / (i * (i + 1)).sqrt().unsqueeze(1)
    # The signs make the orthonormal columns uniformly distributed (Mezzadri, Notices of the AMS 2007).
    Q, R = torch.linalg.qr(torch.randn(d, K - 1, generator=generator, dtype=torch.float64))
    return math.sqrt(K / (K - 1)) * helmert.T @ (Q * R.diagonal().sign()).T


def replace_classifier(model: nn.Module, kind: str, *, scale: float = 30.0, seed: int = 0) -> nn.Module:
    """Replace the last layer of a timm model, in place.

    Args:
        model: its `get_classifier()` is nn.Linear.
        kind: "linear" (it stays as it is), "cosine" (starting from the directions it has) or "etf".
        scale: of "cosine" and "etf": 1 / temperature of the softmax, above 0.
        seed: of "etf": rotation of the frame.

    Returns:
        The model.

    Raises:
        UserError: an unknown kind, a scale not above 0, another kind of classifier, or fewer than K - 1 features.
    """
    check(kind in KINDS, "classifier", kind, f"{', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    check(scale > 0 and math.isfinite(scale), "scale", scale, "above 0")
    linear = _linear(model)
    if kind != "linear":
        new = (
            CosineClassifier(linear, scale=scale) if kind == "cosine" else ETFClassifier(linear, scale=scale, seed=seed)
        )
        parent, _, name = classifier_name(model).rpartition(".")
        setattr(model.get_submodule(parent), name, new.train(linear.training))
    return model


def classifier_name(model: nn.Module) -> str:
    """Name of the last layer of a timm model among its modules."""
    found = _classifier(model)
    return next(name for name, module in model.named_modules() if module is found)


def tau_normalise(model: nn.Module, tau: float) -> nn.Module:
    """Divide the vector of each class by its length to the power tau, and drop the bias, in place.

    Source: Kang et al., "Decoupling representation and classifier for long-tailed recognition", ICLR 2020 (arXiv
    1910.09217), the tau-normalised classifier, who choose tau on validation.

    Args:
        model: trained, its `get_classifier()` is nn.Linear.
        tau: 0 (only the bias is dropped) to 1 (all lengths are 1).

    Returns:
        The model.

    Raises:
        UserError: tau outside 0..1, or another kind of classifier.
    """
    check(0 <= tau <= 1, "tau", tau, "0 to 1")
    linear = _linear(model)
    with torch.no_grad():
        linear.weight.div_(linear.weight.norm(dim=1, keepdim=True) ** tau)
        if linear.bias is not None:
            linear.bias.zero_()
    return model


class RowScales(nn.Module):
    """One learnable factor for each class, of its vector and its bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scales = nn.Parameter(linear.weight.new_ones(linear.out_features))

    def forward(self, value: Tensor) -> Tensor:
        return value * self.scales.view(-1, *[1] * (value.ndim - 1))


def second_stage(model: nn.Module, stage: str) -> list[nn.Parameter]:
    """Freeze a trained model but for its classifier, in place.

    "crt" (classifier re-training) initialises the classifier again; "lws" (learnable weight scaling) keeps it and
    learns one factor for each class. Both are meant to be trained by cross-entropy on classes drawn equally often.
    Train them with the model in evaluation mode, in which this leaves it: the features are to be those of the first
    stage, without batch statistics or dropout. Save `fold(copy.deepcopy(model))`. Source: Kang et al., "Decoupling
    representation and classifier for long-tailed recognition", ICLR 2020 (arXiv 1910.09217), "Classifier Re-training"
    and "Learnable weight scaling".

    Args:
        model: a timm model whose `get_classifier()` is nn.Linear.
        stage: "crt" or "lws".

    Returns:
        The parameters to train, the only ones that require a gradient.

    Raises:
        UserError: an unknown stage, or another kind of classifier.
    """
    check(stage in STAGES, "stage", stage, f"{', '.join(STAGES)}{did_you_mean(stage, STAGES)}")
    linear = _linear(model)
    model.eval().requires_grad_(False)
    if stage == "crt":
        linear.reset_parameters()
        return list(linear.requires_grad_(True).parameters())
    scales = RowScales(linear)
    parametrize.register_parametrization(linear, "weight", scales)
    if linear.bias is not None:
        parametrize.register_parametrization(linear, "bias", scales)
    return [scales.scales]


def fold(model: nn.Module) -> nn.Module:
    """Multiply the factors of learnable weight scaling into the classifier, in place: an ordinary timm model again.

    A model without them is left as it is.
    """
    linear = _classifier(model)
    if not parametrize.is_parametrized(linear):
        return model
    assert isinstance(linear, nn.Linear)
    # A new layer: a copy of a parametrized one shares its class with the original, and `remove_parametrizations` takes
    # the weight away from the class.
    plain = skip_init(nn.Linear, linear.in_features, linear.out_features, bias=linear.bias is not None)
    for name in ("weight", "bias"):
        if (value := getattr(linear, name)) is not None:
            setattr(plain, name, nn.Parameter(value.detach().clone()))
    parent, _, name = classifier_name(model).rpartition(".")
    setattr(model.get_submodule(parent), name, plain.train(linear.training))
    return model


def _classifier(model: Any) -> nn.Module:
    return model.get_classifier()


def _linear(model: nn.Module) -> nn.Linear:
    """Return the last layer, if it is an nn.Linear whose weights are its own."""
    layer = _classifier(model)
    if isinstance(layer, nn.Linear) and not parametrize.is_parametrized(layer):
        return layer
    raise UserError(f"classifier of {type(model).__name__} is {type(layer).__name__}; allowed: a plain nn.Linear")


def _without_bias(linear: nn.Linear) -> nn.Linear:
    """Create an uninitialised layer of the same shape, without drawing a random number."""
    shape: dict[str, Any] = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
    layer = skip_init(nn.Linear, **shape, device=linear.weight.device, dtype=linear.weight.dtype)
    assert isinstance(layer, nn.Linear)
    return layer
