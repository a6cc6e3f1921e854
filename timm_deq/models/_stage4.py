"""Stage 4 of the ResNet family: an equilibrium in place of ordinary blocks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.layers import LayerType, get_act_layer
from timm.models.resnet import BasicBlock, Bottleneck, downsample_avg, downsample_conv
from torch import Tensor, nn

from timm_deq.dropout import VariationalDropout
from timm_deq.equilibrium import Equilibrium


class ResidualCell(nn.Module):
    """A residual block of two 3x3 convolutions, or a bottleneck of three, with input injection.

    Its normalisation is by groups, because a batch statistic would make one sample's fixed point depend on another's
    and change from step to step.

    Args:
        channels: Channels of the state.
        width: Channels between the convolutions.
        bottleneck: 1x1, 3x3, 1x1 convolutions instead of two 3x3.
        num_groups: Groups of each normalisation.
        dilation: Dilation of the 3x3 convolutions.
        drop_rate: Variational dropout of the residual branch.
        branch_gain: Initial gain of the last normalisation of the residual branch. With 0.1, the untrained Jacobian has
            a spectral radius below 0.8 (64 and 512 channels), with 1 it has 1 (`recipes/LOG.md`).
        act_layer: Activation.
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int,
        bottleneck: bool,
        num_groups: int,
        dilation: int = 1,
        drop_rate: float = 0.0,
        branch_gain: float = 0.1,
        act_layer: LayerType = nn.ReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        activation: Any = get_act_layer(act_layer)
        self.branch_gain = branch_gain
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        layers: list[nn.Module] = []
        in_channels = channels
        for i, kernel in enumerate(kernels):
            out_channels = channels if i == len(kernels) - 1 else width
            spread = dilation if kernel > 1 else 1
            padding = spread * (kernel // 2)
            conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=spread, bias=False, **dd)
            layers += [conv, nn.GroupNorm(num_groups, out_channels, **dd), activation()]
            in_channels = out_channels
        self.branch = nn.Sequential(*layers[:-1])
        self.drop = VariationalDropout(drop_rate) if drop_rate else nn.Identity()
        self.act = activation()
        self.norm = nn.GroupNorm(num_groups, channels, **dd)

    def init_weights(self) -> None:
        """Initialise the gain of the residual branch."""
        last_norm = self.branch[-1]
        assert isinstance(last_norm, nn.GroupNorm)
        nn.init.constant_(last_norm.weight, self.branch_gain)

    def extra_repr(self) -> str:
        return f"branch_gain={self.branch_gain}"

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Take one step for a state z and an injected input x, both `(B, C, H, W)`."""
        return self.norm(self.act(z + self.drop(self.branch(z)) + x))


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


def create_equilibrium_stage(
    block: type[BasicBlock] | type[Bottleneck],
    channels: Sequence[int],
    output_stride: int,
    *,
    cell_args: dict[str, Any],
    equilibrium_args: dict[str, Any],
    act_layer: LayerType,
    norm_layer: Any,
    **dd: Any,
) -> EquilibriumStage:
    """Create stage 4 as an equilibrium.

    Args:
        block: Residual block of the stages before.
        channels: Planes of stages 1 to 4.
        output_stride: Stride of the features after a stem of stride 4; below 32 the stage is dilated, not strided.
        cell_args: Further arguments of the cell.
        equilibrium_args: Further arguments of the equilibrium.
        act_layer: Activation of the cell.
        norm_layer: Normalisation of the injection.
        dd: Device and dtype.
    """
    h0_channels, out_channels = (c * block.expansion for c in channels[2:])
    bottleneck, dilation = block is Bottleneck, 32 // output_stride
    inject = downsample_avg if bottleneck else downsample_conv
    injection = inject(
        h0_channels,
        out_channels,
        1 if bottleneck else 3,
        stride=2 if dilation == 1 else 1,
        dilation=dilation,
        first_dilation=max(1, dilation // 2),
        norm_layer=norm_layer,
        **dd,
    )
    spread = {"bottleneck": bottleneck, "dilation": dilation, "act_layer": act_layer}
    cell = ResidualCell(out_channels, width=channels[3], **spread, **cell_args, **dd)
    return EquilibriumStage(injection, Equilibrium(cell, **equilibrium_args))


def init_weights(root: nn.Module, *, zero_init_last: bool = True) -> None:
    """Initialise convolutions (He et al., ICCV 2015) and the gains of residual branches."""
    for module in root.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, ResidualCell):
            module.init_weights()
        elif zero_init_last and isinstance(module, (BasicBlock, Bottleneck)):
            module.zero_init_last()


def keep_generators(device: torch.device | str | None) -> AbstractContextManager:
    """Leave the random generators of the CPU and of a device as they were, whatever constructors draw in the block."""
    device = torch.get_default_device() if device is None else torch.device(device)
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
