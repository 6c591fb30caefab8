"""Flow of frames that are too large for the memory: computed tile by tile, blended without seams.

A tile sees less than the frame, so two things are done. First, a small version of the whole frame gives a rough flow,
and the tile's window in image 1 is moved by it, so that matches far away are inside the window. Second, tiles overlap,
and in the overlap their weights go smoothly from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow.errors import GMFlowError

ComputeFlow = Callable[[Tensor, Tensor], Tensor]
"""Images `[1, 3, h, w]` of any size → flow `[1, 2, h, w]`."""


@dataclass(frozen=True)
class Tiling:
    """How to cut a frame.

    Attributes:
        height: height of a tile, pixels, at least 16.
        width: width of a tile, pixels, at least 16.
        overlap: pixels that neighbouring tiles share at least; at most half a side.

    Raises:
        GMFlowError: a value is out of range.
    """

    height: int
    width: int
    overlap: int = 128

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 16 or not 0 <= self.overlap <= min(self.height, self.width) // 2:
            raise GMFlowError(
                f"tiles must be at least 16×16 with an overlap of at most half a side, not {self.height}×{self.width} "
                f"with {self.overlap}"
            )

    def covers(self, height: int, width: int) -> bool:
        """Whether a frame of this size is no larger than one tile."""
        return height <= self.height and width <= self.width


def tiled_flow(compute: ComputeFlow, image0: Tensor, image1: Tensor, tiling: Tiling) -> Tensor:
    """Flow of a pair by tiles; `compute` never sees more pixels than a tile has.

    Args:
        compute: flow of a pair of any size; called on the images' device.
        image0: float `[1, 3, H, W]`.
        image1: the same shape.
        tiling: see `Tiling`.

    Returns:
        `[1, 2, H, W]`, pixels.
    """
    height, width = image0.shape[2:]
    if tiling.covers(height, width):
        return compute(image0, image1)
    rows, columns = _starts(height, tiling.height, tiling.overlap), _starts(width, tiling.width, tiling.overlap)
    tall, wide = min(tiling.height, height), min(tiling.width, width)
    coarse = _coarse_flow(compute, image0, image1, tall * wide)
    total = image0.new_zeros(2, height, width)
    weights = image0.new_zeros(height, width)
    for top in rows:
        for left in columns:
            here = (slice(top, top + tall), slice(left, left + wide))
            there, shift = _window_in_image1(coarse[:, *here], (top, left), (height, width))
            flow = compute(image0[..., *here], image1[..., *there])[0] + shift
            weight = _ramp(top, tall, height, tiling.overlap, image0)[:, None] * _ramp(
                left, wide, width, tiling.overlap, image0
            )
            total[:, *here] += weight * flow
            weights[here] += weight
    return (total / weights)[None]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis: evenly spread, the first and the last at the frame's borders."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(number * (length - tile) / (count - 1)) for number in range(count)]


def _coarse_flow(compute: ComputeFlow, image0: Tensor, image1: Tensor, pixels: int) -> Tensor:
    """Rough flow `[2, H, W]` of the whole frame, computed on a version of it with at most `pixels` pixels."""
    height, width = image0.shape[2:]
    scale = min(1.0, (pixels / (height * width)) ** 0.5)
    least = (min(16, height), min(16, width))
    # Of a very long frame, one side would be less than that. Then the other side is bounded by the pixels left for it.
    size = (
        min(max(least[0], int(height * scale)), pixels // least[1]),
        min(max(least[1], int(width * scale)), pixels // least[0]),
    )
    small0, small1 = (
        F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False) for image in (image0, image1)
    )
    flow = F.interpolate(compute(small0, small1), (height, width), mode="bilinear", align_corners=False)[0]
    return flow * flow.new_tensor([width / size[1], height / size[0]]).view(2, 1, 1)


def _window_in_image1(
    coarse: Tensor, corner: tuple[int, int], frame: tuple[int, int]
) -> tuple[tuple[slice, slice], Tensor]:
    """The tile's window moved by its median rough motion, inside the frame; and by how much, `[2, 1, 1]`.

    Flow that is not finite counts as no motion.
    """
    tall, wide = coarse.shape[1:]
    finite = coarse.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    x, y = (round(float(component.median())) for component in finite)
    top = min(max(corner[0] + y, 0), frame[0] - tall)
    left = min(max(corner[1] + x, 0), frame[1] - wide)
    shift = coarse.new_tensor([left - corner[1], top - corner[0]]).view(2, 1, 1)
    return (slice(top, top + tall), slice(left, left + wide)), shift


def _ramp(start: int, tile: int, length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights along an axis `[tile]`: 1 inside, falling as a squared sine over the overlap with a neighbour."""
    position = torch.arange(tile, dtype=like.dtype, device=like.device) + 0.5
    rising = position / max(overlap, 1) if start > 0 else torch.ones_like(position)
    falling = position.flip(0) / max(overlap, 1) if start + tile < length else torch.ones_like(position)
    return (torch.minimum(rising, falling).clamp(max=1) * (torch.pi / 2)).sin() ** 2
