"""Flow as a picture in the Middlebury colour coding (Baker et al., "A Database and Evaluation Methodology…")."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gmflow.errors import GMFlowError

UNKNOWN = 1e9
"""Middlebury: a component beyond this marks an unknown pixel."""

_STRIP_PIXELS = 1 << 15  # coloured at a time: intermediate results stay in the cache


def color_wheel() -> npt.NDArray[np.float64]:
    """The 55 colours of the wheel, red over yellow, green, cyan, blue and magenta back to red: `[55, 3]`, 0..255."""
    # Transitions between neighbouring hues: length, channel that stays at 255, channel that changes, up or down.
    transitions = (
        (15, 0, 1, True),
        (6, 1, 0, False),
        (4, 1, 2, True),
        (11, 2, 1, False),
        (13, 2, 0, True),
        (6, 0, 2, False),
    )
    parts = []
    for length, full, changing, rising in transitions:
        ramp = np.floor(255 * np.arange(length) / length)
        part = np.zeros((length, 3))
        part[:, full] = 255
        part[:, changing] = ramp if rising else 255 - ramp
        parts.append(part)
    return np.concatenate(parts)


def known_flow(flow: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Where flow `[H, W, 2]` is known: bool `[H, W]`, false where a component is NaN or beyond `UNKNOWN`."""
    # As float32: among 16 bits the limit itself would be infinite.
    known: npt.NDArray[np.bool_] = (np.abs(flow) <= np.float32(UNKNOWN)).all(axis=2)
    return known


def flow_to_image(flow: npt.NDArray[np.floating], max_flow: float | None = None) -> npt.NDArray[np.uint8]:
    """Flow as a picture: hue is the direction, saturation the speed.

    Args:
        flow: `[H, W, 2]`, pixels. Unknown pixels (NaN, inf, or beyond 1e9) are black.
        max_flow: speed in pixels of full saturation; the largest in the flow where left out. Faster pixels are
            darkened.

    Returns:
        RGB, uint8 `[H, W, 3]`.

    Raises:
        GMFlowError: `flow` is no flow field, or `max_flow` not positive.
    """
    flow = np.asarray(flow)
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise GMFlowError(f"a flow field has shape [H, W, 2], not {list(flow.shape)}")
    if max_flow is not None and not max_flow > 0:
        raise GMFlowError(f"max_flow must be positive, not {max_flow}")
    flow = flow.astype(np.promote_types(flow.dtype, np.float32), copy=False)  # 16 bits do not hold 1e9
    known = known_flow(flow)
    flow = np.where(known[..., None], flow, 0)
    height, width = known.shape
    rows = max(1, _STRIP_PIXELS // max(1, width))
    strips = [slice(top, top + rows) for top in range(0, height, rows)]
    speed = np.hypot(flow[..., 0], flow[..., 1], dtype=np.float64)
    largest = max_flow or speed.max(initial=0.0) or 1.0
    image = np.empty((height, width, 3), np.uint8)
    for strip in strips:
        _paint(image[strip], flow[strip], speed[strip] / largest)
    image[~known] = 0
    return image


def _paint(image: npt.NDArray[np.uint8], flow: npt.NDArray[np.floating], saturation: npt.NDArray[np.float64]) -> None:
    """Write the colours of known flow `[h, w, 2]` into `image` `[h, w, 3]`; saturation `[h, w]` is full at 1."""
    u, v = np.moveaxis(flow.astype(np.float64), 2, 0)
    wheel = color_wheel() / 255
    angle = np.arctan2(-v, -u) / np.pi  # -1..1
    position = (angle + 1) / 2 * (len(wheel) - 1)
    lower = np.floor(position).astype(int)
    upper = (lower + 1) % len(wheel)
    fraction = position - lower
    rest = 1 - fraction
    for channel, hues in enumerate(wheel.T):  # one by one: NumPy is slow on rows of three values
        hue = rest * hues[lower] + fraction * hues[upper]
        color = np.where(saturation <= 1, 1 - saturation * (1 - hue), 0.75 * hue)
        image[..., channel] = np.floor(255 * color)


KITTI_BANDS = (
    (0.0625, (49, 54, 149)),
    (0.125, (69, 117, 180)),
    (0.25, (116, 173, 209)),
    (0.5, (171, 217, 233)),
    (1.0, (224, 243, 248)),
    (2.0, (254, 224, 144)),
    (4.0, (253, 174, 97)),
    (8.0, (244, 109, 67)),
    (16.0, (215, 48, 39)),
    (np.inf, (165, 0, 38)),
)
"""KITTI's logarithmic colour scale (Menze & Geiger, CVPR 2015, development kit): upper limit of a band, its colour.

The scale's value 1 is the limit of an outlier, 3 px and 5 % of the speed.
"""


def error_to_image(
    flow: npt.NDArray[np.floating], target: npt.NDArray[np.floating], valid: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.uint8]:
    """End-point errors on KITTI's scale: blue is a small error, red an outlier (over 3 px and over 5 % of the speed).

    Args:
        flow: prediction `[H, W, 2]`, pixels.
        target: ground truth `[H, W, 2]`, pixels.
        valid: bool `[H, W]`; where it is false, or the target unknown (`known_flow`), the picture is black. All valid
            if left out.

    Returns:
        RGB, uint8 `[H, W, 3]`.

    Raises:
        GMFlowError: the shapes do not fit together.
    """
    flow, target = np.asarray(flow), np.asarray(target)
    if flow.ndim != 3 or flow.shape[2] != 2 or target.shape != flow.shape or not _fits(valid, target):
        shapes = [list(array.shape) for array in (flow, target, valid) if array is not None]
        raise GMFlowError(f"an error map needs flow and target [H, W, 2] and valid [H, W], not {shapes}")
    known = known_flow(target)
    if valid is not None:
        known &= valid
    target = np.where(known[..., None], target, 0.0).astype(np.float64)  # squares of 16 bits overflow beyond 255 px
    error = np.linalg.norm(flow.astype(np.float64) - target, axis=2)
    speed = np.linalg.norm(target, axis=2)
    # An outlier exceeds both limits, so the milder of the two decides.
    outlierness = np.minimum(error / 3, error / np.maximum(0.05 * speed, 1e-12))
    limits = np.array([limit for limit, _ in KITTI_BANDS[:-1]])
    colours = np.array([colour for _, colour in KITTI_BANDS], np.uint8)
    image: npt.NDArray[np.uint8] = colours[np.searchsorted(limits, outlierness, side="right")]
    image[~known] = 0
    return image


def _fits(mask: npt.NDArray[np.bool_] | None, flow: npt.NDArray[np.floating]) -> bool:
    return mask is None or (mask.shape == flow.shape[:2] and mask.dtype == np.bool_)
