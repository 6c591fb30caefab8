"""Convolutional features of both images at the strides that are matched (paper, "Formulation")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmflow.config import GMFlowConfig
from gmflow.instance_norm import instance_norm
from gmflow.summation import SummationOrder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A small residual network. With two scales, one shared 3×3 convolution is applied to its map at both strides.

    Attributes:
        summation: in which order it adds up; see `SummationOrder`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: GMFlowConfig) -> None:
        super().__init__()
        self.summation = SummationOrder.REFERENCE
        stem, *_, last = config.backbone_channels
        strides = (1, 2, 2 if config.num_scales == 1 else 1)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.stem = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.stages = nn.Sequential()
        width = stem
        for channels, stride in zip(config.backbone_channels, strides, strict=True):
            self.stages.append(
                nn.Sequential(ResidualBlock(width, channels, stride), ResidualBlock(channels, channels, 1))
            )
            width = channels
        self.projection = nn.Conv2d(last, config.feature_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.shared: nn.Conv2d | None = None
        if config.num_scales == 2:
            self.shared = nn.Conv2d(config.feature_channels, config.feature_channels, 3, padding=1, bias=False)
            nn.init.kaiming_uniform_(self.shared.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `[N, 3, H, W]` in 0..255 → features `[N, C, H/stride, W/stride]`, coarse to fine."""
        # Always in float32: with the 8 bits of bfloat16, neighbouring shades become one (docs/performance.md).
        x = (images.float() / 255.0 - self.mean) / self.std
        # A CPU convolves channels-last maps faster (in 16 bits several times as fast), and adds up in another order.
        channels_last = x.is_cpu and (self.summation.is_free(x.device) or torch.is_autocast_enabled("cpu"))
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        with torch.autocast(x.device.type, enabled=False):
            x = instance_norm(self.stem(x)).relu_()  # [N, stem, H/2, W/2]
        x = self.projection(self.stages(x))  # [N, C, H/8, W/8] or, with two scales, [N, C, H/4, W/4]
        if self.shared is None:
            return [x]
        fine = self.shared(x)
        return [fine[:, :, ::2, ::2], fine]  # a convolution with stride 2 gives every second value of the fine map


class ResidualBlock(nn.Module):
    """conv → IN → ReLU → conv → IN → ReLU, added to its input → ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` → `[B, channels, H / stride, W / stride]`."""
        y = instance_norm(self.conv1(x)).relu_()
        y = instance_norm(self.conv2(y)).relu_()
        if self.shortcut is not None:
            x = instance_norm(self.shortcut(x))
        return (x + y).relu_()
