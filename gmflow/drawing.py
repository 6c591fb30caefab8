"""Pictures that need drawing and resampling: flow as arrows, a frame moved along its flow.

Not in `visualize`, because OpenCV takes a while to load and the model does without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from gmflow.errors import GMFlowError
from gmflow.visualize import known_flow

MILLISECONDS = 60
"""Time for which an animation shows each picture."""

_LONGEST_SIDE = 16383  # of a WebP
_LONGEST_WARPED = 32766  # of OpenCV, whose coordinates have 16 bits


def draw_arrows(
    frame: npt.NDArray[np.uint8], flow: npt.NDArray[np.floating], *, spacing: int = 24
) -> npt.NDArray[np.uint8]:
    """A frame with an arrow from every `spacing`-th pixel to where it moves; where flow is unknown there is none.

    Args:
        frame: RGB, uint8 `[H, W, 3]`.
        flow: `[H, W, 2]`, pixels.
        spacing: pixels between arrows.

    Returns:
        RGB, uint8 `[H, W, 3]`.

    Raises:
        GMFlowError: frame and flow differ in size, or `spacing` is not positive.
    """
    _check_sizes(frame, flow)
    if spacing < 1:
        raise GMFlowError(f"spacing must be at least 1, not {spacing}")
    picture = np.ascontiguousarray(frame).copy()
    height, width = flow.shape[:2]
    known = known_flow(flow)
    farthest = 4 * max(height, width)  # OpenCV counts in sixteenths of a pixel and overflows far outside the picture
    for y in range(spacing // 2, height, spacing):
        for x in range(spacing // 2, width, spacing):
            if known[y, x]:
                u, v = np.clip(flow[y, x], -farthest, farthest)
                tip = (round(16 * (x + float(u))), round(16 * (y + float(v))))
                for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
                    _arrow(picture, (16 * x, 16 * y), tip, colour, thickness)
    return picture


def _arrow(
    picture: npt.NDArray[np.uint8],
    tail: tuple[int, int],
    tip: tuple[int, int],
    colour: tuple[int, int, int],
    thickness: int,
) -> None:
    along = np.array(tip) - tail
    length = float(np.hypot(*along))
    cv2.line(picture, tail, tip, colour, thickness, cv2.LINE_AA, shift=4)
    if length < 16:  # less than a pixel: a dot
        return
    barb = along / length * min(0.35 * length, 16 * 5.0)
    for turn in (-1, 1):
        end = np.array(tip) - barb + turn * 0.6 * np.array([-barb[1], barb[0]])
        cv2.line(picture, tip, (round(float(end[0])), round(float(end[1]))), colour, thickness, cv2.LINE_AA, shift=4)


def warp_frame(
    frame1: npt.NDArray[np.uint8], flow: npt.NDArray[np.floating], amount: float = 1.0
) -> npt.NDArray[np.uint8]:
    """What frame 1 shows at p + amount · flow(p): with amount 1 it looks like frame 0 where the flow is right.

    Args:
        frame1: RGB, uint8 `[H, W, 3]`.
        flow: from frame 0 to frame 1, `[H, W, 2]`, pixels; unknown flow counts as no motion.
        amount: 0 leaves the frame as it is.

    Returns:
        RGB, uint8 `[H, W, 3]`, black where the flow leaves the picture.

    Raises:
        GMFlowError: frame and flow differ in size, or are longer than OpenCV can warp.
    """
    _check_sizes(frame1, flow)
    height, width = flow.shape[:2]
    if max(height, width) > _LONGEST_WARPED:
        raise GMFlowError(f"frames of at most {_LONGEST_WARPED} pixels a side can be warped, not {width}x{height}")
    moved = np.where(known_flow(flow)[..., None], flow, 0).astype(np.float32) * np.float32(amount)
    x = np.arange(width, dtype=np.float32) + moved[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + moved[..., 1]
    warped: npt.NDArray[np.uint8] = cv2.remap(frame1, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return warped


def warp_animation(
    frame1: npt.NDArray[np.uint8], flow: npt.NDArray[np.floating], *, steps: int = 12
) -> list[npt.NDArray[np.uint8]]:
    """Frame 1 pulled back to frame 0 along the flow, and on to frame 1 again, as a loop of 2 · `steps` pictures.

    Only what moves should be seen to move: tears and smears show where the flow is wrong.

    Raises:
        GMFlowError: frame and flow differ in size, or `steps` is not positive.
    """
    if steps < 1:
        raise GMFlowError(f"steps must be at least 1, not {steps}")
    phases = [np.pi * step / steps for step in range(2 * steps)]
    return [warp_frame(frame1, flow, (1 + float(np.cos(phase))) / 2) for phase in phases]  # slow at both ends


def encode_animation(pictures: Sequence[npt.NDArray[np.uint8]]) -> bytes:
    """RGB pictures, uint8 `[H, W, 3]` of one size, as an animated WebP that runs for ever.

    Raises GMFlowError if there are none, if they differ in size, or if they are larger than a WebP may be.
    """
    sizes = {picture.shape for picture in pictures}
    if len(sizes) != 1:
        raise GMFlowError(f"an animation takes pictures of one size, not of {len(sizes)} sizes")
    if max(pictures[0].shape) > _LONGEST_SIDE:
        height, width = pictures[0].shape[:2]
        raise GMFlowError(f"WebP holds pictures of at most {_LONGEST_SIDE} pixels a side, not {width}x{height}")
    animation = cv2.Animation()
    animation.frames = [cv2.cvtColor(picture, cv2.COLOR_RGB2BGR) for picture in pictures]
    animation.durations = [MILLISECONDS] * len(animation.frames)
    animation.loop_count = 0
    done, data = cv2.imencodeanimation(".webp", animation, [cv2.IMWRITE_WEBP_QUALITY, 90])
    if not done:
        raise RuntimeError("OpenCV could not write the animation")
    encoded: bytes = data.tobytes()
    return encoded


def _check_sizes(frame: npt.NDArray[np.uint8], flow: npt.NDArray[np.floating]) -> None:
    if flow.ndim != 3 or flow.shape[2] != 2 or frame.shape != (*flow.shape[:2], 3) or frame.dtype != np.uint8:
        raise GMFlowError(
            f"a frame uint8 [H, W, 3] and its flow [H, W, 2] are needed, not {list(frame.shape)} and {list(flow.shape)}"
        )
