"""RAFT's training augmentation (Teed & Deng, ECCV 2020), for dense and for sparse ground truth.

The steps are colour jitter, scale, flips and crop, but only the pixels that the crop shows are computed: jitter and
geometry are drawn before any pixel changes, only the part of the frame under the crop is jittered, and one resize
scales that part. The given generator is the only source of randomness, so (sample, config, generator state) determine
every bit of the result.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl.colour_jitter import apply_jitters, draw_jitters
from datasets_etl.errors import DataError
from datasets_etl.formats import Flow, Frame, Mask
from datasets_etl.samples import FlowSample

SCALE_PROBABILITY = 0.8
STRETCH_PROBABILITY = 0.8
MAX_LOG2_STRETCH = 0.2
DENSE_SPARE, SPARSE_SPARE = 8, 1  # a scaled frame exceeds the crop by at least this many pixels
SPARSE_MARGIN = (20, 50)  # (y, x): how far outside the frame a sparse crop may be drawn before it is clamped

_Pixels = TypeVar("_Pixels", Frame, Flow)

_PHASE_ERROR = 1 / 32  # a window may begin at most this part of a frame pixel away from a whole pixel


@dataclass(frozen=True)
class AugmentConfig:
    """The augmentation settings of a training stage.

    Attributes:
        crop: (height, width) of the result.
        min_log2_scale, max_log2_scale: the scale is 2 to the power of a uniform draw between them.
        hflip, vflip: probabilities of mirroring left-right and upside down.
        photometric: whether colours are jittered.
    """

    crop: tuple[int, int]
    min_log2_scale: float
    max_log2_scale: float
    hflip: float = 0.5
    vflip: float = 0.1
    photometric: bool = True

    def __post_init__(self) -> None:
        if min(self.crop) < 1:
            raise ValueError(f"crop {self.crop} must be at least 1×1")
        if self.min_log2_scale > self.max_log2_scale:
            raise ValueError(f"min_log2_scale {self.min_log2_scale} exceeds max_log2_scale {self.max_log2_scale}")
        for name in ("hflip", "vflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is a probability, 0 to 1")


@dataclass(frozen=True)
class Geometry:
    """One draw of the geometric augmentation.

    Attributes:
        scale: (y, x) factors from the frame to the scaled frame.
        offset: (y, x) of the crop's first pixel in the scaled and flipped frame.
        hflip, vflip: whether the scaled frame is mirrored.
    """

    scale: tuple[float, float]
    offset: tuple[int, int]
    hflip: bool
    vflip: bool


def augment(sample: FlowSample, config: AugmentConfig, rng: np.random.Generator) -> FlowSample:
    """Augments one sample for training; `sample.sparse` selects one of the two recipes.

    Dense flow is interpolated; a pixel of the result is valid if every pixel that contributes to it is valid. Sparse
    flow is moved point by point.

    Args:
        sample: a sample with ground truth. It is not changed.
        config: the stage's settings.
        rng: the only source of randomness.

    Returns:
        The sample at crop size; flow is 0 where not valid. The images may be views into larger arrays. `occluded` is
        None, because no loss uses it.

    Raises:
        DataError: the sample has no ground truth.
    """
    if sample.flow is None or sample.valid is None:
        raise DataError(
            f"{sample.dataset} {sample.key} has no flow to train on: leave {sample.subset} out of the mixture"
        )
    height, width = sample.image0.shape[:2]
    jitters = draw_jitters(sample.sparse, rng) if config.photometric else None
    geometry = draw_geometry((height, width), sample.sparse, config, rng)
    rows = _window(height, geometry.scale[0], geometry.offset[0], config.crop[0], geometry.vflip)
    columns = _window(width, geometry.scale[1], geometry.offset[1], config.crop[1], geometry.hflip)

    frames = (sample.image0, sample.image1)
    windows = [frame[rows.start : rows.stop, columns.start : columns.stop] for frame in frames]
    if jitters is not None:
        windows = apply_jitters(windows, frames, jitters)
    image0, image1 = (_resized(window, rows, columns, geometry) for window in windows)
    if sample.sparse:
        flow, valid = _move_points(sample.flow, sample.valid, rows, columns, geometry)
    else:
        flow, valid = _interpolate(sample.flow, sample.valid, rows, columns, geometry)
    return replace(sample, image0=image0, image1=image1, flow=flow, valid=valid, occluded=None)


def draw_geometry(size: tuple[int, int], sparse: bool, config: AugmentConfig, rng: np.random.Generator) -> Geometry:
    """Draws scale, flips and crop for a frame of (height, width).

    With probability 0.8 the frame is scaled by 2^U(min, max). A dense frame is then, with probability 0.8, also
    stretched by 2^U(-0.2, 0.2) on each axis. The scale is never so small that the crop plus 8 px (1 px when sparse)
    would not fit. A frame that is not scaled but is smaller than the crop is scaled up to that same minimum.
    """
    spare = SPARSE_SPARE if sparse else DENSE_SPARE
    floor = max((crop + spare) / side for crop, side in zip(config.crop, size, strict=True))
    scale = _draw_scale(floor, sparse, config, rng)
    if any(side < crop for crop, side in zip(config.crop, size, strict=True)):
        scale = max(scale[0], floor), max(scale[1], floor)
    hflip, vflip = bool(rng.random() < config.hflip), bool(rng.random() < config.vflip)
    spare_y, spare_x = (_scaled(size[axis], scale[axis]) - config.crop[axis] for axis in (0, 1))
    if sparse:
        margin_y, margin_x = SPARSE_MARGIN
        y = min(max(int(rng.integers(0, spare_y + margin_y)), 0), spare_y)  # RAFT's margin is at the bottom only
        x = min(max(int(rng.integers(-margin_x, spare_x + margin_x)), 0), spare_x)
    else:  # RAFT never draws the last offset; without spare pixels there is only one
        y = int(rng.integers(0, max(spare_y, 1)))
        x = int(rng.integers(0, max(spare_x, 1)))
    return Geometry(scale, (y, x), hflip, vflip)


def _draw_scale(floor: float, sparse: bool, config: AugmentConfig, rng: np.random.Generator) -> tuple[float, float]:
    if rng.random() >= SCALE_PROBABILITY:
        return 1.0, 1.0
    scale = 2 ** rng.uniform(config.min_log2_scale, config.max_log2_scale)
    scale_y = scale_x = scale
    if not sparse and rng.random() < STRETCH_PROBABILITY:
        scale_y *= 2 ** rng.uniform(-MAX_LOG2_STRETCH, MAX_LOG2_STRETCH)
        scale_x *= 2 ** rng.uniform(-MAX_LOG2_STRETCH, MAX_LOG2_STRETCH)
    return max(float(scale_y), floor), max(float(scale_x), floor)


def _scaled(side: int, scale: float) -> int:
    return round(side * scale)  # rounds as OpenCV does


@dataclass(frozen=True)
class _Window:
    """The part of the frame under the crop, along one axis. The resized window contains the crop, not yet mirrored.

    Attributes:
        start, stop: range of frame pixels in the window.
        lead: where the resized window begins in the scaled frame.
        skip: number of pixels in the resized window before the crop.
        crop: number of pixels in the crop.
        scale: factor from the frame to the scaled frame.
    """

    start: int
    stop: int
    lead: int
    skip: int
    crop: int
    scale: float


def _window(side: int, scale: float, offset: int, crop: int, mirrored: bool) -> _Window:
    """The window for a crop's offset in the scaled and mirrored frame.

    cv2.resize is four times as fast as cv2.warpAffine, but it can only begin at a whole pixel, both in the frame and in
    its result. So the window begins at the last position before the crop where the two pixel grids coincide: often only
    a few pixels before the crop, and at the beginning of the frame if there is no other such position.
    """
    if mirrored:
        offset = _scaled(side, scale) - crop - offset
    stop = min(side, ceil((offset + crop + 0.5) / scale) + 1)
    latest = int(offset + 0.5 - scale)  # both neighbours of the crop's first pixel must be in the window
    starts = (at for at in range(latest, 0, -1) if abs(round(at / scale) - at / scale) <= _PHASE_ERROR)
    lead = next(starts, 0)
    start = round(lead / scale)
    if _scaled(stop - start, scale) < offset + crop - lead:  # at the frame's end the two roundings may differ by one
        start = lead = 0
    return _Window(start, stop, lead, offset - lead, crop, scale)


def _resized(pixels: _Pixels, rows: _Window, columns: _Window, geometry: Geometry) -> _Pixels:
    """The crop, resized and mirrored from the pixels of its window."""
    resized = cv2.resize(pixels, None, fx=columns.scale, fy=rows.scale, interpolation=cv2.INTER_LINEAR)
    return _mirrored(resized[rows.skip : rows.skip + rows.crop, columns.skip : columns.skip + columns.crop], geometry)


def _mirrored(pixels: _Pixels, geometry: Geometry) -> _Pixels:
    if geometry.hflip or geometry.vflip:
        flipped: _Pixels = cv2.flip(pixels, -1 if geometry.hflip and geometry.vflip else int(geometry.hflip))
        return flipped
    return pixels


def _flow_factors(geometry: Geometry) -> tuple[np.float32, np.float32]:
    """The factors for x and y of a flow vector; a mirrored axis has a negative factor."""
    x = -geometry.scale[1] if geometry.hflip else geometry.scale[1]
    y = -geometry.scale[0] if geometry.vflip else geometry.scale[0]
    return np.float32(x), np.float32(y)


def _interpolate(flow: Flow, valid: Mask, rows: _Window, columns: _Window, geometry: Geometry) -> tuple[Flow, Mask]:
    """Dense ground truth at the crop: flow float32 [h, w, 2], valid bool [h, w]."""
    flow = flow[rows.start : rows.stop, columns.start : columns.stop]
    valid = valid[rows.start : rows.stop, columns.start : columns.stop]
    if whole := bool(valid.all()):
        crop_valid = np.ones((rows.crop, columns.crop), np.bool_)
    else:
        # In float32 the weight of an invalid neighbour is never rounded away: zero means there is none.
        crop_valid = _resized((~valid).astype(np.float32), rows, columns, geometry) == 0
        flow = np.where(valid[..., None], flow, np.float32(0))  # NaN would spread even with weight zero
    crop_flow = _resized(flow, rows, columns, geometry)
    factors = np.tile(np.array(_flow_factors(geometry)), columns.crop)
    crop_flow = (crop_flow.reshape(rows.crop, -1) * factors).reshape(crop_flow.shape)
    if not whole:
        crop_flow[~crop_valid] = 0
    return crop_flow, crop_valid


def _move_points(flow: Flow, valid: Mask, rows: _Window, columns: _Window, geometry: Geometry) -> tuple[Flow, Mask]:
    """Sparse ground truth at the crop: each valid vector moves to the pixel nearest to its point's new position.

    If several vectors move to one pixel, the last one in reading order stays (as in RAFT). Unlike in RAFT, a vector's
    point is the centre of its pixel, as in the resize of the images, and the first row and column are not lost.
    """
    y_range, to_row = _targets(rows, geometry.vflip)
    x_range, to_column = _targets(columns, geometry.hflip)
    points = np.flatnonzero(valid[y_range, x_range])
    target = np.add.outer(to_row * columns.crop, to_column).reshape(-1)[points]

    # A vector's two floats are copied as one 64-bit number, which is several times as fast.
    vectors = np.ascontiguousarray(flow, np.float32).view(np.uint64)[y_range, x_range, 0].reshape(-1)[points]
    packed = np.zeros(rows.crop * columns.crop, np.uint64)
    packed[target] = vectors
    crop_flow = packed.view(np.float32).reshape(rows.crop, columns.crop * 2)
    crop_flow *= np.tile(np.array(_flow_factors(geometry)), columns.crop)
    crop_valid = np.zeros(rows.crop * columns.crop, np.bool_)
    crop_valid[target] = True
    return crop_flow.reshape(rows.crop, columns.crop, 2), crop_valid.reshape(rows.crop, columns.crop)


def _targets(window: _Window, mirrored: bool) -> tuple[slice, npt.NDArray[np.intp]]:
    """Along one axis: the frame's pixels that move into the crop, and the crop's pixel that each of them moves to."""
    centre = (np.arange(window.stop - window.start) + 0.5) * window.scale - 0.5
    target = np.rint(centre).astype(np.intp) - window.skip
    first, end = np.searchsorted(target, (0, window.crop))
    target = target[first:end]
    if mirrored:
        target = window.crop - 1 - target
    return slice(window.start + int(first), window.start + int(end)), target
