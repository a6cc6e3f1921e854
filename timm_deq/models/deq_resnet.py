"""DEQ-ResNet: a ResNet whose last stage is an equilibrium, and its explicit twin.

The encoder is a ResNet's stem and stages 1 to 3 (He et al., CVPR 2016) and gives the features H0. Stage 4 is a deep
equilibrium (Bai, Kolter & Koltun, NeurIPS 2019): H0 is injected into a cell

    f(z, x) = GN(ReLU(z + GN(conv(ReLU(GN(conv(z))))) + x)),    x = injection(H0),

in the order of the residual block of multiscale DEQs (Bai, Koltun & Kolter, NeurIPS 2020), whose fixed point z* is
pooled and classified. `equilibrium=False` builds ordinary stage-4 blocks instead: the explicit twin, with the same
encoder, the same H0 and the same head, as in Sun & Shi, "Understanding Representation of Deep Equilibrium Models from
Neural Collapse Perspective", NeurIPS 2024. The normalisation of the features before pooling shapes their geometry more
than the choice between the two, so it is an argument of both: `out_norm`.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    LayerType,
    create_classifier,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
)
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # timm has no public name for it, nor for the next
from timm.models._input import update_model_args
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from torch import Tensor, nn

from timm_deq.models._factory import create_equilibrium_args, create_out_norm
from timm_deq.models._stage4 import (
    EquilibriumStage,
    ResidualCell,
    create_equilibrium_stage,
    init_weights,
    keep_generators,
)

__all__ = ["DEQResNet", "ResidualCell"]

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


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
        cell_dropout: Variational dropout in the cell: one mask for each solve. The twin ignores it.
        cell_drop_rate: The former name of `cell_dropout`, which timm does not save with the weights.
        zero_init_last: Zero-initialise the last normalisation of each explicit residual branch.
        equilibrium: Whether stage 4 is an equilibrium; False builds the explicit twin.
        out_norm: Normalisation before pooling: "none", "group" or "batch_relu".
        num_groups: Groups of every GroupNorm.
        branch_gain: Initial gain of the cell's residual branch, see :class:`ResidualCell`. The twin ignores it.
        output_stride: Stride of the last features; stages beyond it are dilated. 8, 16 or 32; 2, 4 or 8 (the default)
            with a small input.
        act_layer: Activation of encoder, cell and twin.
        norm_layer: Normalisation of the encoder, the injection and the twin; that of the cell is by groups.
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
        cell_dropout: float = 0.0,
        cell_drop_rate: float = 0.0,
        zero_init_last: bool = True,
        equilibrium: bool = True,
        out_norm: str = "none",
        num_groups: int = 8,
        branch_gain: float = 0.1,
        output_stride: int | None = None,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **solver_args: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if cell_dropout and cell_drop_rate:
            raise ValueError(f"cell_drop_rate must be 0 where cell_dropout is given, got {cell_drop_rate!r}")
        cell_dropout = cell_dropout or cell_drop_rate
        activation: Any = get_act_layer(act_layer)
        normalisation: Any = get_norm_layer(norm_layer)
        stem_stride = 1 if small_input else 4
        output_stride = 8 * stem_stride if output_stride is None else output_stride
        if output_stride not in (strides := tuple(stride * stem_stride for stride in (2, 4, 8))):
            raise ValueError(f"output_stride must be one of {strides}, got {output_stride!r}")
        equilibrium_args = create_equilibrium_args(**solver_args)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.equilibrium = equilibrium
        self.grad_checkpointing = False

        # Stem
        kernel, stride = (3, 1) if small_input else (7, 2)
        self.conv1 = nn.Conv2d(in_chans, stem_width, kernel, stride=stride, padding=kernel // 2, bias=False, **dd)
        self.bn1 = normalisation(stem_width, **dd)
        self.act1 = activation(inplace=True)
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info = [dict(num_chs=stem_width, reduction=stride, module="act1")]

        # Stages. `init_weights` draws them, stage 4 last; draws of constructors do not count, so that one seed gives an
        # equilibrium and its twin the same encoder and classifier.
        net_stride = output_stride * 4 // stem_stride  # make_blocks counts from a stem of stride 4
        layer_args = dd | {"act_layer": activation, "norm_layer": normalisation}
        depth = 3 if equilibrium else 4
        rate = drop_path_rate * (sum(layers[:depth]) - 1) / (sum(layers) - 1)  # of the last block that is built
        block_args = layer_args | {"drop_path_rate": rate, "output_stride": net_stride}
        with keep_generators(device):
            stages, feature_info = make_blocks(
                (block,) * depth, channels[:depth], layers[:depth], stem_width, **block_args
            )
            if equilibrium:
                cell_args = {"num_groups": num_groups, "drop_rate": cell_dropout, "branch_gain": branch_gain}
                stage = create_equilibrium_stage(
                    block, channels, net_stride, cell_args=cell_args, equilibrium_args=equilibrium_args, **layer_args
                )
                stages.append(("layer4", stage))
                feature_info.append(dict(num_chs=channels[3] * block.expansion, reduction=net_stride, module="layer4"))
        self.layer1, self.layer2, self.layer3, self.layer4 = (stage for _, stage in stages)
        for info in feature_info:
            self.feature_info.append(dict(info, reduction=info["reduction"] * stem_stride // 4))

        # Head
        self.num_features = channels[3] * block.expansion
        self.norm = create_out_norm(out_norm, self.num_features, num_groups=num_groups, **dd)
        self._create_head(num_classes, global_pool, dd)
        self.init_weights(zero_init_last=zero_init_last)

    @torch.jit.ignore()  # in parentheses, as its types want it
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise convolutions and the gains of residual branches."""
        init_weights(self, zero_init_last=zero_init_last)

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        blocks = [(r"^layer(\d+)\.(\d+)", None), (r"^layer(\d+)\.injection", (0,)), (r"^layer(\d+)\.equilibrium", (1,))]
        return dict(stem=r"^conv1|bn1", blocks=r"^layer(\d+)" if coarse else blocks)

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the explicit stages in the backward pass. An equilibrium needs no such thing."""
        self.grad_checkpointing = enable

    @torch.jit.ignore()
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """Return the classifier or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is named."""
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
        """Return features and intermediates: the stem's (0) and those of stages 1 to 4.

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
        """Drop what the given intermediates do not need.

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
        """Return unpooled features `(B, C, H, W)` of images."""
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
        """Return logits `(B, num_classes)`, or what the classifier would receive, from unpooled features."""
        x = F.dropout(self.global_pool(x), p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, num_classes)` of images `(B, C, H, W)`."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Let the weights of a ResNet of timm into the encoder; those of this family pass.

    The names match: `conv1`, `bn1` and `layer1` to `layer3`. An equilibrium and its classifier, which a ResNet does not
    have, keep their initial weights; a twin takes `layer4` and `fc` too.
    """
    state_dict = {re.sub(r"^norm\.0\.", "norm.", key): value for key, value in state_dict.items()}  # as once saved
    own = model.state_dict()
    if "layer4.0.conv1.weight" not in state_dict:
        return state_dict
    fresh = ("norm.",) if "layer4.0.conv1.weight" in own else ("norm.", "layer4.", "fc.")
    kept = {key: value for key, value in own.items() if key.startswith(fresh)}
    return {key: value for key, value in state_dict.items() if not key.startswith(fresh)} | kept


def _create_deq_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> DEQResNet:
    model = build_model_with_cfg(DEQResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)
    if kwargs.get("cell_drop_rate"):
        update_model_args(model, cell_dropout=kwargs["cell_drop_rate"])
    return model


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
