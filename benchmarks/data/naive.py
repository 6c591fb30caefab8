"""The usual way from raw files to a training sample, which the loader is compared with."""

import cv2
import numpy as np
import numpy.typing as npt

from benchmarks.data.raw import read_flow
from datasets_etl import formats
from datasets_etl.augment import AugmentConfig, draw_geometry
from datasets_etl.colour_jitter import apply_jitters, draw_jitters
from datasets_etl.samples import FlowSample
from datasets_etl.sources import SampleRef, SourceTree


def naive_sample(tree: SourceTree, ref: SampleRef, config: AugmentConfig, rng: np.random.Generator) -> FlowSample:
    """A sample from raw files in the usual way: jitter and resize whole frames, then flip, then crop.

    The baseline is favourable: it uses our fast colour jitter, and the raw files are in the page cache.
    """
    frames = [formats.decode_frame(tree.read(path), path) for path in (ref.image0, ref.image1)]
    flow, valid = read_flow(tree, ref)
    frames = apply_jitters(frames, frames, draw_jitters(ref.is_sparse, rng))
    drawn = draw_geometry(valid.shape, ref.is_sparse, config, rng)
    scale_y, scale_x = drawn.scale
    if ref.is_sparse:
        frames, flow, valid = _resized_sparse(frames, flow, valid, scale_y, scale_x)
    else:
        frames = [cv2.resize(frame, None, fx=scale_x, fy=scale_y) for frame in frames]
        flow = cv2.resize(flow, None, fx=scale_x, fy=scale_y) * np.array([scale_x, scale_y], np.float32)
        valid = (np.abs(flow) < 1000).all(axis=2)
    if drawn.hflip:
        frames, flow, valid = (
            [f[:, ::-1] for f in frames],
            flow[:, ::-1] * np.array([-1, 1], np.float32),
            valid[:, ::-1],
        )
    if drawn.vflip:
        frames, flow, valid = [f[::-1] for f in frames], flow[::-1] * np.array([1, -1], np.float32), valid[::-1]
    (y, x), (height, width) = drawn.offset, config.crop
    window = np.s_[y : y + height, x : x + width]
    image0, image1 = (np.ascontiguousarray(frame[window]) for frame in frames)
    flow, valid = np.ascontiguousarray(flow[window]), np.ascontiguousarray(valid[window])
    return FlowSample(ref.key, ref.dataset, ref.subset, ref.is_sparse, image0, image1, flow, valid)


def _resized_sparse(
    frames: list[npt.NDArray[np.uint8]],
    flow: npt.NDArray[np.float32],
    valid: npt.NDArray[np.bool_],
    scale_y: float,
    scale_x: float,
) -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    frames = [cv2.resize(frame, None, fx=scale_x, fy=scale_y) for frame in frames]
    height, width = frames[0].shape[:2]
    y, x = np.nonzero(valid)
    to_y, to_x = np.rint(y * scale_y).astype(int), np.rint(x * scale_x).astype(int)
    inside = (to_y < height) & (to_x < width)
    moved, there = np.zeros((height, width, 2), np.float32), np.zeros((height, width), np.bool_)
    vectors = flow[y, x] * np.array([scale_x, scale_y], np.float32)
    moved[to_y[inside], to_x[inside]] = vectors[inside]
    there[to_y[inside], to_x[inside]] = True
    return frames, moved, there
