"""Random colours of a training sample's images: torchvision's ColorJitter, on the part of a frame that is shown.

It is one step of `augment`, which gives the generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl.formats import Frame

ASYMMETRIC_PROBABILITY = 0.2  # the two images get different jitters

Floats = npt.NDArray[np.float32]

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as in PIL's conversion to grey
_STRIDE = 4  # the mean grey for contrast is taken over every 4th pixel of every 4th row
_STRIP = 1 << 15  # number of pixels that are jittered at a time


@dataclass(frozen=True)
class Jitter:
    """One draw of torchvision's ColorJitter.

    Attributes:
        order: "brightness", "contrast", "saturation" and "hue", in the order in which they are applied.
        brightness, contrast, saturation: factors.
        hue: a rotation, in turns.
    """

    order: tuple[str, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float


def draw_jitters(sparse: bool, rng: np.random.Generator) -> tuple[Jitter, Jitter]:
    """A jitter for each image: the same one, except that with probability 0.2 dense samples get two."""
    first = _draw_jitter(sparse, rng)
    if not sparse and rng.random() < ASYMMETRIC_PROBABILITY:
        return first, _draw_jitter(sparse, rng)
    return first, first


def _draw_jitter(sparse: bool, rng: np.random.Generator) -> Jitter:
    strength = 0.3 if sparse else 0.4
    hue = (0.3 if sparse else 0.5) / np.pi
    names = ("brightness", "contrast", "saturation", "hue")
    order = tuple(names[i] for i in rng.permutation(len(names)))
    brightness, contrast, saturation = (float(f) for f in rng.uniform(1 - strength, 1 + strength, 3))
    return Jitter(order, brightness, contrast, saturation, float(rng.uniform(-hue, hue)))


def apply_jitters(windows: list[Frame], frames: Sequence[Frame], jitters: tuple[Jitter, Jitter]) -> list[Frame]:
    """Jitters the windows as if the whole frames were jittered.

    The mean grey for contrast is that of the whole frame, or of both frames if they share a jitter.
    """
    thumbnails = [_thumbnail(frame) for frame in frames]
    if jitters[0] is jitters[1]:
        steps = _steps(jitters[0], np.concatenate(thumbnails))
        return [_applied(window, steps) for window in windows]
    return [
        _applied(window, _steps(jitter, thumbnail))
        for window, jitter, thumbnail in zip(windows, jitters, thumbnails, strict=True)
    ]


def _thumbnail(frame: Frame) -> Frame:
    """Every 4th pixel of every 4th row: enough for a mean. No averaging: jitter and blurring do not commute."""
    small: Frame = cv2.resize(frame, None, fx=1 / _STRIDE, fy=1 / _STRIDE, interpolation=cv2.INTER_NEAREST)
    return small


@dataclass(frozen=True)
class _Linear:
    """A 3×4 matrix for colours in 0..255; `overflows` tells whether the result can leave that range."""

    matrix: npt.NDArray[np.float64]
    overflows: bool

    def __call__(self, colours: Floats) -> Floats:
        colours = cv2.transform(colours, self.matrix)
        return np.clip(colours, 0, 255, out=colours) if self.overflows else colours

    def after(self, first: "_Linear") -> "_Linear":
        """Both steps as one; `first` must not be able to overflow."""
        matrix = self.matrix[:, :3] @ first.matrix
        matrix[:, 3] += self.matrix[:, 3]
        return _Linear(matrix, self.overflows)


@dataclass(frozen=True)
class _Hue:
    """A hue rotation in float32 HSV: OpenCV's 8-bit HSV is no faster, but off by grey levels in saturated colours."""

    turns: float

    def __call__(self, colours: Floats) -> Floats:
        hsv = cv2.cvtColor(colours, cv2.COLOR_RGB2HSV)
        hsv[..., 0] += self.turns % 1 * 360  # OpenCV wraps above 360°, not below 0°
        rotated: Floats = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=colours)
        return rotated


_Step = _Linear | _Hue


def _steps(jitter: Jitter, thumbnail: Frame) -> list[_Step]:
    """The steps for every pixel. Contrast needs a mean grey: that of the thumbnail after the steps before contrast."""
    steps: list[_Step] = []
    for name in jitter.order:
        if name == "hue":
            steps.append(_Hue(jitter.hue))
            continue
        factor = float(getattr(jitter, name))
        if name == "contrast":
            offset = np.full(3, (1 - factor) * _mean_grey(thumbnail, steps))
            step = _linear(factor * np.eye(3), offset, factor)
        elif name == "saturation":
            step = _linear(factor * np.eye(3) + (1 - factor) * _GREY, np.zeros(3), factor)
        else:
            step = _linear(factor * np.eye(3), np.zeros(3), factor)
        if steps and isinstance(last := steps[-1], _Linear) and not last.overflows:
            steps[-1] = step.after(last)
        else:
            steps.append(step)
    return steps


def _linear(matrix: npt.NDArray[np.float64], offset: npt.NDArray[np.float64], factor: float) -> _Linear:
    # With a factor of at most 1, the result lies between two colours of the range.
    return _Linear(np.column_stack([matrix, offset]), overflows=factor > 1)


def _mean_grey(image: Frame, steps: list[_Step]) -> float:
    return float(np.dot(cv2.mean(_applied(image, steps))[:3], _GREY))


def _applied(image: Frame, steps: list[_Step]) -> Frame:
    """Applies all steps in float32 and rounds once; one strip at a time, so that the copies stay in the CPU cache."""
    result = np.empty(image.shape, np.uint8)
    rows = max(_STRIP // image.shape[1], 1)
    for top in range(0, image.shape[0], rows):
        colours = image[top : top + rows].astype(np.float32)
        for step in steps:
            colours = step(colours)
        cv2.convertScaleAbs(colours, dst=result[top : top + rows])
    return result
