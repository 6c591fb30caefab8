"""GMFlow, top to bottom as in the paper. How it is run (precision, checkpointing, DDP) is up to `execution`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmflow.backbone import Backbone
from gmflow.config import GMFlowConfig
from gmflow.errors import GMFlowError
from gmflow.geometry import backward_warp, upsample_flow
from gmflow.matching import match
from gmflow.propagation import FlowPropagation
from gmflow.transformer import FeatureTransformer
from gmflow.upsampling import ConvexUpsampler


class FlowOutput(NamedTuple):
    """What `GMFlow` returns. Every flow is float32 `[B, 2, H, W]` in pixels, x right, y down.

    Attributes:
        flow: pixel p of image 0 is at p + flow(p) in image 1.
        backward_flow: the same from image 1 to image 0; None unless asked for.
        predictions: in training mode every supervised prediction in order, `flow` last; otherwise `flow` alone.
    """

    flow: Tensor
    backward_flow: Tensor | None
    predictions: tuple[Tensor, ...]


class GMFlow(nn.Module):
    """Optical flow by global matching (Xu et al., CVPR 2022).

    Args:
        config: variant; `GMFlowConfig.base()` where left out.

    Attributes:
        config: the configuration it was built from.
        size_multiple: what the height and width of its images must be divisible by.
    """

    def __init__(self, config: GMFlowConfig | None = None) -> None:
        super().__init__()
        self.config = config or GMFlowConfig.base()
        self.size_multiple = self.config.size_multiple
        self.backbone = Backbone(self.config)
        self.transformer = FeatureTransformer(self.config)
        self.propagation = FlowPropagation(self.config.feature_channels)
        self.upsampler = ConvexUpsampler(self.config.feature_channels, factor=self.config.strides[-1])

    def forward(self, image0: Tensor, image1: Tensor, *, bidirectional: bool = False) -> FlowOutput:
        """Flow between two batches of images.

        Args:
            image0: float `[B, 3, H, W]`, RGB in 0..255, of any floating type, whose values are taken as float32; H and
                W divisible by `size_multiple`.
            image1: the same shape.
            bidirectional: also compute the flow from image 1 to image 0.

        Raises:
            GMFlowError: the images differ in shape, are no RGB batches, or do not divide into windows; or the
                parameters are not float32.
        """
        self._check(image0, image1)
        scales = self.backbone(torch.cat([image0, image1]))  # coarse to fine: [2B, C, h, w]
        predictions: list[Tensor] = []
        flow: Tensor | None = None
        for scale, (features, stride) in enumerate(zip(scales, self.config.strides, strict=True)):
            feature0, feature1 = features.unflatten(0, (2, -1)).unbind(0)
            if flow is not None:
                if bidirectional:
                    feature0, feature1 = _both_ways(feature0, feature1)
                flow = upsample_flow(flow, 2).detach()
                feature1 = backward_warp(feature1, flow)
            feature0, feature1 = self.transformer(_tokens(feature0), _tokens(feature1), self.config.attn_splits[scale])
            if bidirectional and flow is None:
                feature0, feature1 = _both_ways(feature0, feature1)

            matched = match(feature0, feature1, self.config.corr_radius[scale])
            flow = matched if flow is None else flow + matched  # [B or 2B, 2, h, w]
            if self.training:
                predictions.append(upsample_flow(flow, stride))

            flow = self.propagation(feature0, flow, self.config.prop_radius[scale])
            if stride == self.config.strides[-1]:
                predictions.append(self.upsampler(flow, feature0.permute(0, 3, 1, 2)))
            elif self.training:
                predictions.append(upsample_flow(flow, stride))
        return _output(predictions, bidirectional)

    def _check(self, image0: Tensor, image1: Tensor) -> None:
        shape = tuple(image0.shape)
        if shape != tuple(image1.shape):
            raise GMFlowError(f"both images must have one shape, not {list(shape)} and {list(image1.shape)}")
        if len(shape) != 4 or shape[1] != 3 or 0 in shape:
            raise GMFlowError(f"images must be non-empty batches [B, 3, H, W], not {list(shape)}")
        if not (image0.is_floating_point() and image1.is_floating_point()):
            raise GMFlowError(f"images must be floating point in 0..255, not {image0.dtype} and {image1.dtype}")
        if shape[2] % self.size_multiple or shape[3] % self.size_multiple:
            raise GMFlowError(
                f"height and width must be divisible by {self.size_multiple} with attn_splits "
                f"{self.config.attn_splits}, not {shape[2]}×{shape[3]}; gmflow.predict pads images of any size"
            )
        dtype = next(self.parameters()).dtype
        if dtype != torch.float32:
            raise GMFlowError(
                f"the model's parameters are {dtype}, they must be float32: cast it back with .float(); "
                'to compute in 16 bits, gmflow.execution.prepare_model(model, ExecutionConfig(precision="bf16"))'
            )
        if self.config.num_scales == 1 and shape[2:] == (8, 8):
            raise GMFlowError(
                "images of 8×8, or padded to that, are a single feature pixel: it has no statistics to normalise it by"
            )


def _tokens(feature: Tensor) -> Tensor:
    """`[B, C, h, w]` → `[B, h, w, C]`."""
    return feature.permute(0, 2, 3, 1)


def _both_ways(feature0: Tensor, feature1: Tensor) -> tuple[Tensor, Tensor]:
    """The pair and the swapped pair in one batch."""
    return torch.cat([feature0, feature1]), torch.cat([feature1, feature0])


def _output(predictions: list[Tensor], bidirectional: bool) -> FlowOutput:
    if not bidirectional:
        return FlowOutput(predictions[-1], None, tuple(predictions))
    halves = [prediction.chunk(2) for prediction in predictions]
    return FlowOutput(halves[-1][0], halves[-1][1], tuple(forward for forward, _ in halves))
