"""DEQ-ResNet: a ResNet whose last stage is an equilibrium, and its explicit twin.

The encoder is a ResNet's stem and stages 1 to 3 (He et al., CVPR 2016) and gives the features H0. In place of stage 4
stands a deep equilibrium (Bai, Kolter & Koltun, NeurIPS 2019): H0 is injected into a cell

    f(z, x) = GN(ReLU(z + GN(conv(ReLU(GN(conv(z))))) + x)),    x = injection(H0),

in the order of the residual block of multiscale DEQs (Bai, Koltun & Kolter, NeurIPS 2020), whose fixed point z* is
pooled and classified. `equilibrium=False` builds ordinary stage-4 blocks instead: the explicit twin, with the same
encoder, the same H0 and the same head, as in Sun & Shi, "Understanding Representation of Deep Equilibrium Models from
Neural Collapse Perspective", NeurIPS 2024. What normalises the features before pooling shapes their geometry more than
the choice between the two, so it is an argument of both: `out_norm`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier, get_device_dtype
from timm.models._builder import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, downsample_avg, downsample_conv, make_blocks
from torch import Tensor, nn

from timm_deq.dropout import VariationalDropout
from timm_deq.equilibrium import Equilibrium
from timm_deq.models._factory import create_equilibrium_args, create_out_norm

__all__ = ["DEQResNet"]

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class ResidualCell(nn.Module):
    """The equilibrium cell: a residual block of two 3x3 convolutions, or a bottleneck of three, with input injection.

    Its normalisation is by groups, because a batch statistic would make one sample's fixed point depend on another's
    and change from step to step. The last normalisation of the residual branch starts at `BRANCH_GAIN`: the untrained
    Jacobian then has a spectral radius below 0.8 (64 and 512 channels), where a gain of 1 gives 1 (`recipes/LOG.md`).

    Args:
        channels: Channels of the state.
        width: Channels between the convolutions.
        bottleneck: 1x1, 3x3, 1x1 convolutions instead of two 3x3.
        num_groups: Groups of each normalisation.
        drop_rate: Variational dropout of the residual branch.
    """

    BRANCH_GAIN = 0.1

    def __init__(
        self,
        channels: int,
        *,
        width: int,
        bottleneck: bool,
        num_groups: int,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        layers: list[nn.Module] = []
        in_channels = channels
        for i, kernel in enumerate(kernels):
            out_channels = channels if i == len(kernels) - 1 else width
            layers.append(nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False, **dd))
            layers.append(nn.GroupNorm(num_groups, out_channels, **dd))
            layers.append(nn.ReLU())
            in_channels = out_channels
        self.branch = nn.Sequential(*layers[:-1])
        self.drop = VariationalDropout(drop_rate) if drop_rate else nn.Identity()
        self.norm = nn.GroupNorm(num_groups, channels, **dd)

    def init_weights(self) -> None:
        last_norm = self.branch[-1]
        assert isinstance(last_norm, nn.GroupNorm)
        nn.init.constant_(last_norm.weight, self.BRANCH_GAIN)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One step for a state z and an injected input x, both `(B, C, H, W)`."""
        return self.norm(F.relu(z + self.drop(self.branch(z)) + x))


class EquilibriumStage(nn.Module):
    """Stage 4 as an equilibrium: H0 `(B, C, H, W)` is injected, once, at half the resolution `(B, C', H/2, W/2)`.

    Args:
        injection: Maps H0 to the shape of the state; runs once, outside the solve, so it may use batch statistics.
        equilibrium: Finds the fixed point.
    """

    def __init__(self, injection: nn.Module, equilibrium: Equilibrium) -> None:
        super().__init__()
        self.injection = injection
        self.equilibrium = equilibrium

    def forward(self, x: Tensor) -> Tensor:
        return self.equilibrium(self.injection(x))


def _init_weights(root: nn.Module, *, zero_init_last: bool = True) -> None:
    for module in root.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, ResidualCell):
            module.init_weights()
        elif zero_init_last and isinstance(module, (BasicBlock, Bottleneck)):
            module.zero_init_last()


class DEQResNet(nn.Module):
    """A ResNet whose last stage is an equilibrium (or, as its explicit twin, is not).

    Args:
        block: Residual block of the explicit stages.
        layers: Blocks of stages 1 to 4; the fourth counts for the explicit twin only.
        channels: Planes of stages 1 to 4.
        stem_width: Channels of the stem.
        small_input: A 3x3 stem without stride or pooling, for images of about 32x32.
        num_classes: Classes, 0 for features only.
        in_chans: Input channels.
        global_pool: Pooling, as timm names it.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth in the explicit stages.
        cell_drop_rate: Variational dropout in the cell: one mask for each solve. The twin ignores it.
        zero_init_last: Zero-initialise the last normalisation of each explicit residual branch.
        equilibrium: Whether stage 4 is an equilibrium; False builds the explicit twin.
        out_norm: Normalisation before pooling: "none", "group" or "batch_relu".
        num_groups: Groups of every GroupNorm.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        solver_args: See :func:`timm_deq.models._factory.create_equilibrium_args`. The twin checks and ignores them,
            so that both take the same arguments.

    Raises:
        TypeError: An unknown keyword.
        ValueError: A value that is not allowed.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        *,
        channels: tuple[int, int, int, int] = (64, 128, 256, 512),
        stem_width: int = 64,
        small_input: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        cell_drop_rate: float = 0.0,
        zero_init_last: bool = True,
        equilibrium: bool = True,
        out_norm: str = "none",
        num_groups: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **solver_args: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        equilibrium_args = create_equilibrium_args(**solver_args)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.equilibrium = equilibrium
        self.grad_checkpointing = False

        # Stem
        kernel, stride = (3, 1) if small_input else (7, 2)
        self.conv1 = nn.Conv2d(in_chans, stem_width, kernel, stride=stride, padding=kernel // 2, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(stem_width, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info = [dict(num_chs=stem_width, reduction=stride, module="act1")]

        # Stages: make_blocks counts from a stem of stride 4
        block_args = dd | {"drop_path_rate": drop_path_rate, "act_layer": nn.ReLU, "norm_layer": nn.BatchNorm2d}
        stages, feature_info = make_blocks((block,) * 4, channels, layers, stem_width, **block_args)
        for info in feature_info:
            self.feature_info.append(dict(info, reduction=info["reduction"] // (4 if small_input else 1)))
        self.layer1, self.layer2, self.layer3, self.layer4 = (stage for _, stage in stages)

        # Head
        self.num_features = channels[3] * block.expansion
        self.norm = create_out_norm(out_norm, self.num_features, num_groups=num_groups, **dd)
        self._create_head(num_classes, global_pool, dd)

        # What the twins share is drawn before they part, so that one seed gives both the same encoder and classifier.
        self.init_weights(zero_init_last=zero_init_last)
        if equilibrium:
            h0_channels, out_channels = (c * block.expansion for c in channels[2:])
            bottleneck = block is Bottleneck
            inject = downsample_avg if bottleneck else downsample_conv
            injection = inject(h0_channels, out_channels, 1 if bottleneck else 3, stride=2, **dd)
            cell_args = dd | {"bottleneck": bottleneck, "num_groups": num_groups, "drop_rate": cell_drop_rate}
            cell = ResidualCell(out_channels, width=channels[3], **cell_args)
            self.layer4 = EquilibriumStage(injection, Equilibrium(cell, **equilibrium_args))
            _init_weights(self.layer4)

    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialises convolutions and the gains of residual branches."""
        _init_weights(self, zero_init_last=zero_init_last)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        blocks = [(r"^layer(\d+)\.(\d+)", None), (r"^layer(\d+)\.injection", (0,)), (r"^layer(\d+)\.equilibrium", (1,))]
        return dict(stem=r"^conv1|bn1", blocks=r"^layer(\d+)" if coarse else blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the explicit stages in the backward pass. An equilibrium needs no such thing."""
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, and the pooling if one is named."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self._create_head(num_classes, pool_type, get_device_dtype(self))
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def _create_head(self, num_classes: int, pool_type: str, dd: dict[str, Any]) -> None:
        num_features: Any = self.num_features
        head: Any = create_classifier(num_features, num_classes, pool_type=pool_type, **dd)
        self.global_pool, self.fc = head
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and intermediates: the stem's (0) and those of stages 1 to 4.

        Args:
            x: Images `(B, C, H, W)`.
            indices: Which intermediates: the last n if an int, all if None.
            norm: Apply the output normalisation to the intermediate of stage 4.
            stop_early: Stop after the last intermediate wanted.
            output_fmt: "NCHW".
            intermediates_only: Return the intermediates alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(5, indices)
        intermediates = []
        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take_indices:
            intermediates.append(x)
        x = self.maxpool(x)
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        for index, stage in enumerate(stages[: max_index if stop_early else 4], start=1):
            recompute = self.grad_checkpointing and not isinstance(stage, EquilibriumStage)
            x = checkpoint_seq(stage, x) if recompute else stage(x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm and index == 4 else x)
        if intermediates_only:
            return intermediates
        if not stop_early or max_index == 4:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drops what the given intermediates do not need.

        Args:
            indices: Which intermediates to keep: the last n if an int.
            prune_norm: Drop the output normalisation, which goes anyway with stage 4.
            prune_head: Drop the classifier, likewise.

        Returns:
            The indices kept.
        """
        take_indices, max_index = feature_take_indices(5, indices)
        for index in range(max_index + 1, 5):
            setattr(self, f"layer{index}", nn.Sequential())
        if max_index == 0:
            self.maxpool = nn.Identity()
        shortened = max_index < 4
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features `(B, C, H, W)` of images."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            explicit = [self.layer1, self.layer2, self.layer3] + ([] if self.equilibrium else [self.layer4])
            x = checkpoint_seq(explicit, x, flatten=True)
            if self.equilibrium:
                x = self.layer4(x)
        else:
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, num_classes)`, or what the classifier would receive, from unpooled features."""
        x = F.dropout(self.global_pool(x), p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, C, H, W)`."""
        return self.forward_head(self.forward_features(x))


def _create_deq_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> DEQResNet:
    return build_model_with_cfg(DEQResNet, variant, pretrained, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def _cifar_cfg() -> dict[str, Any]:
    small = {"num_classes": 10, "input_size": (3, 32, 32), "pool_size": (4, 4), "crop_pct": 1.0}
    return _cfg(**small, mean=CIFAR10_MEAN, std=CIFAR10_STD)


default_cfgs = generate_default_cfgs(
    {
        "deq_resnet18.untrained": _cfg(),
        "deq_resnet34.untrained": _cfg(),
        "deq_resnet50.untrained": _cfg(),
        "deq_resnet18_cifar.untrained": _cifar_cfg(),
        "deq_resnet8_cifar.untrained": _cifar_cfg(),
    }
)


@register_model
def deq_resnet18(pretrained: bool = False, **kwargs: Any) -> DEQResNet:
    """DEQ-ResNet-18: the encoder of ResNet-18, an equilibrium of 512 channels."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_deq_resnet("deq_resnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def deq_resnet34(pretrained: bool = False, **kwargs: Any) -> DEQResNet:
    """DEQ-ResNet-34: the encoder of ResNet-34, an equilibrium of 512 channels."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_deq_resnet("deq_resnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def deq_resnet50(pretrained: bool = False, **kwargs: Any) -> DEQResNet:
    """DEQ-ResNet-50: the encoder of ResNet-50, a bottleneck equilibrium of 2048 channels."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_deq_resnet("deq_resnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def deq_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> DEQResNet:
    """DEQ-ResNet-18 with a 3x3 stem and no pooling, for 32x32 images."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), small_input=True)
    return _create_deq_resnet("deq_resnet18_cifar", pretrained, **dict(model_args, **kwargs))


@register_model
def deq_resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> DEQResNet:
    """DEQ-ResNet-8: stem, three blocks, classifier and an equilibrium of 64 channels; trains on a CPU."""
    model_args = dict(block=BasicBlock, layers=(1, 1, 1, 1), channels=(16, 32, 64, 64), stem_width=16, small_input=True)
    return _create_deq_resnet("deq_resnet8_cifar", pretrained, **dict(model_args, **kwargs))
