"""Samples as tensors, stacked into batches, and packed to be handed from one process to another."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch

from datasets_etl.samples import FlowSample

# Bytes per pixel of a sample with ground truth: two images, flow and mask.
_PIXEL_BYTES = 3 + 3 + 8 + 1


class FlowBatch(NamedTuple):
    """Samples as tensors; a single sample has no leading dimension B.

    Attributes:
        image0, image1: uint8 [B, 3, H, W], RGB.
        flow: float32 [B, 2, H, W], pixels; 0 where not valid.
        valid: bool [B, H, W].
    """

    image0: torch.Tensor
    image1: torch.Tensor
    flow: torch.Tensor
    valid: torch.Tensor


class PackedBatch(NamedTuple):
    """A batch as one tensor: a loader process transfers tensors one by one, which takes a millisecond each.

    Attributes:
        data: uint8, the tensors of a `FlowBatch` one after the other; flow comes first, so that float32 is aligned.
        shape: B, H, W.
    """

    data: torch.Tensor
    shape: tuple[int, int, int]


def to_tensors(sample: FlowSample) -> FlowBatch:
    """A sample as tensors, channels first. Raises ValueError for a sample without ground truth."""
    if sample.flow is None or sample.valid is None:
        raise ValueError(f"{sample.key} has no ground truth to train on")
    return FlowBatch(
        image0=_channels_first(sample.image0),  # [3, H, W]
        image1=_channels_first(sample.image1),
        flow=_channels_first(sample.flow),  # [2, H, W]
        valid=torch.from_numpy(sample.valid),  # [H, W]
    )


def _channels_first(pixels: npt.NDArray[Any]) -> torch.Tensor:
    """[H, W, C] → [C, H, W]; several times as fast as a transposed copy."""
    planes = np.empty((pixels.shape[2], *pixels.shape[:2]), pixels.dtype)
    for channel, plane in enumerate(planes):
        cv2.extractChannel(pixels, channel, dst=plane)
    return torch.from_numpy(planes)


def collate(samples: Sequence[FlowBatch]) -> FlowBatch:
    """Stack samples of one size into a batch."""
    return unpack(pack(samples))


def pack(samples: Sequence[FlowBatch]) -> PackedBatch:
    """Stack samples of one size into a batch, packed."""
    shape = (len(samples), *samples[0].valid.shape)
    packed = PackedBatch(torch.empty(prod(shape) * _PIXEL_BYTES, dtype=torch.uint8), shape)
    for tensors, batch in zip(zip(*samples, strict=True), unpack(packed), strict=True):
        torch.stack(tensors, out=batch)
    return packed


def unpack(packed: PackedBatch) -> FlowBatch:
    """The tensors of a batch as views of the packed data."""
    batch, height, width = packed.shape
    pixels = prod(packed.shape)
    flow, image0, image1, valid = packed.data.split_with_sizes([8 * pixels, 3 * pixels, 3 * pixels, pixels])
    return FlowBatch(
        image0=image0.view(batch, 3, height, width),
        image1=image1.view(batch, 3, height, width),
        flow=flow.view(torch.float32).view(batch, 2, height, width),
        valid=valid.view(torch.bool).view(batch, height, width),
    )
