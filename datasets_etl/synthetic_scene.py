"""Scenes with exact flow and occlusion: a textured ground with textured shapes over it, in motion.

Each has its own translation, rotation and zoom. Texture, outline and motion are functions of continuous coordinates, so
flow and occlusion are computed, not estimated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, sin

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl.formats import (
    Flow,
    Frame,
    Mask,
)

Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]

FRAMES_PER_SCENE = 3
MAX_MOTION = 0.36
"""The fastest shapes' speed as a share of the frame's width: 46 px on a frame 128 px wide."""

_HARMONICS = 4


@dataclass(frozen=True)
class Layer:
    """A textured object in rigid motion with zoom. The origin of its own coordinates is its middle.

    Attributes:
        texture: float32 [h, w, 3], 0..255; mirrored beyond its border.
        outline: the radius in pixels at many evenly spaced angles; None for the ground, which is unbounded.
        centre: position (x, y) in the frame at time 0.
        velocity: pixels per frame.
        angle, spin: radians, and radians per frame.
        zoom: factor per frame.
    """

    texture: Floats
    outline: Floats | None
    centre: tuple[float, float]
    velocity: tuple[float, float]
    angle: float
    spin: float
    zoom: float

    def pose(self, time: int) -> Matrix:
        """The 3×3 matrix from the layer's coordinates to the frame's."""
        scale, angle = self.zoom**time, self.angle + self.spin * time
        c, s = scale * cos(angle), scale * sin(angle)
        x, y = (self.centre[i] + self.velocity[i] * time for i in (0, 1))
        return np.array([[c, -s, x], [s, c, y], [0, 0, 1]])


@dataclass(frozen=True)
class Scene:
    """Layers from the ground up, seen in a frame of height × width pixels at times 0, 1, 2, …"""

    height: int
    width: int
    layers: tuple[Layer, ...]

    def render(self, time: int) -> Frame:
        """The frame at `time`: uint8 [H, W, 3]."""
        canvas = np.zeros((self.height, self.width, 3), np.float32)
        for layer in self.layers:
            colour = self._texture(layer, time)
            if layer.outline is None:
                canvas = colour
            else:
                canvas += self._coverage(layer, time)[..., None] * (colour - canvas)
        return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)

    def flow(self, start: int, end: int) -> tuple[Flow, Mask]:
        """Where each pixel of the frame at `start` is at `end`.

        Returns:
            flow float32 [H, W, 2], and occluded bool [H, W]: covered by another layer at `end`, or out of the frame.
        """
        x, y = self._grid()
        flow = np.zeros((self.height, self.width, 2), np.float32)
        hidden = np.zeros((self.height, self.width), np.bool_)
        for number, layer in enumerate(self.layers):
            visible = self._coverage(layer, start) >= 0.5
            motion = layer.pose(end) @ np.linalg.inv(layer.pose(start)) - np.eye(3)
            u, v = (_row(motion[i], x, y)[visible] for i in (0, 1))
            flow[visible] = np.stack([u, v], axis=-1)
            target = x[visible] + u, y[visible] + v
            covered = np.zeros(u.shape, np.bool_)
            for above in self.layers[number + 1 :]:
                covered |= _coverage_at(above, end, *target) >= 0.5
            hidden[visible] = covered
        x1, y1 = x + flow[..., 0], y + flow[..., 1]
        outside = (x1 < 0) | (x1 > self.width - 1) | (y1 < 0) | (y1 > self.height - 1)
        return flow, hidden | outside

    def _grid(self) -> tuple[Floats, Floats]:
        x, y = np.meshgrid(np.arange(self.width, dtype=np.float32), np.arange(self.height, dtype=np.float32))
        return x, y

    def _texture(self, layer: Layer, time: int) -> Floats:
        middle = np.array([[1, 0, layer.texture.shape[1] / 2], [0, 1, layer.texture.shape[0] / 2], [0, 0, 1]])
        inverse = middle @ np.linalg.inv(layer.pose(time))
        colour: Floats = cv2.warpAffine(
            layer.texture,
            inverse[:2],
            (self.width, self.height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        return colour

    def _coverage(self, layer: Layer, time: int) -> Floats:
        return _coverage_at(layer, time, *self._grid())


def _row(row: Matrix, x: Floats, y: Floats) -> Floats:
    return np.float32(row[0]) * x + np.float32(row[1]) * y + np.float32(row[2])


def _coverage_at(layer: Layer, time: int, x: Floats, y: Floats) -> Floats:
    """How much the layer covers each frame position, 0..1; it changes smoothly over one pixel at the edge."""
    if layer.outline is None:
        return np.ones_like(x)
    inverse = np.linalg.inv(layer.pose(time))
    own_x, own_y = _row(inverse[0], x, y), _row(inverse[1], x, y)
    turn = np.arctan2(own_y, own_x) * np.float32(layer.outline.size / (2 * np.pi))
    low = np.floor(turn)
    at = low.astype(np.intp)
    radius = layer.outline.take(at, mode="wrap")
    radius += (turn - low) * (layer.outline.take(at + 1, mode="wrap") - radius)
    return np.clip(radius - np.hypot(own_x, own_y) + np.float32(0.5), 0, 1)


def make_scene(
    rng: np.random.Generator, height: int, width: int, *, max_motion: float = MAX_MOTION, fast: bool = False
) -> Scene:
    """Draws a scene of two to four shapes, mostly with moderate motion, rarely with motion up to the maximum.

    Args:
        rng: the only source of randomness.
        height, width: of the frames, in pixels.
        max_motion: the fastest shapes' speed as a share of the width.
        fast: whether one shape is certain to move at 0.95 to 1 of the maximum.
    """
    top_speed = max_motion * width
    layers = [_ground(rng, height, width, top_speed)]
    count = int(rng.integers(2, 5))
    for number in range(count):
        share = rng.uniform() ** 3  # a quarter of the shapes are under 2 % of the maximum, one in 30 is over 90 %
        if fast and number == count - 1:  # the topmost shape, so nothing hides it
            share = rng.uniform(0.95, 1)
        layers.append(_shape(rng, height, width, float(share) * top_speed))
    return Scene(height, width, tuple(layers))


def _ground(rng: np.random.Generator, height: int, width: int, top_speed: float) -> Layer:
    # Uniform over a disc of velocities: most pixels are ground, so this is the typical motion.
    speed, direction = 0.4 * top_speed * rng.uniform() ** 0.5, rng.uniform(0, 2 * np.pi)
    return Layer(
        texture=_texture(rng, height + height // 2, width + width // 2),
        outline=None,
        centre=((width - 1) / 2, (height - 1) / 2),
        velocity=(float(speed * np.cos(direction)), float(speed * np.sin(direction))),
        angle=0.0,
        spin=float(rng.uniform(-0.02, 0.02)),
        zoom=float(np.exp(rng.uniform(-0.02, 0.02))),
    )


def _shape(rng: np.random.Generator, height: int, width: int, speed: float) -> Layer:
    size = float(rng.uniform(0.14, 0.3)) * min(height, width)
    # A fast shape moves along the frame's longer axis; along the shorter one it would leave the frame at once.
    tilt = rng.uniform(-0.5, 0.5) if speed > height / 4 else rng.uniform(-np.pi, np.pi)
    direction = tilt + np.pi * rng.integers(2)
    velocity = float(speed * np.cos(direction)), float(speed * np.sin(direction))
    middle = float(rng.uniform(0.3, 0.7)) * width, float(rng.uniform(0.25, 0.75)) * height
    half_time = (FRAMES_PER_SCENE - 2) / 2  # halfway through the first pair, the shape is at `middle`
    side = int(2.6 * size) + 4
    return Layer(
        texture=_texture(rng, side, side),
        outline=size
        * _OUTLINES[int(rng.integers(len(_OUTLINES)))](rng, np.linspace(0, 2 * np.pi, 720, endpoint=False)),
        centre=(middle[0] - half_time * velocity[0], middle[1] - half_time * velocity[1]),
        velocity=velocity,
        angle=float(rng.uniform(0, 2 * np.pi)),
        spin=float(rng.uniform(-0.15, 0.15)),
        zoom=float(np.exp(rng.uniform(-0.06, 0.06))),
    )


def _ellipse(rng: np.random.Generator, angle: npt.NDArray[np.float64]) -> Floats:
    ratio = rng.uniform(0.55, 1)
    return (ratio / np.hypot(ratio * np.cos(angle), np.sin(angle))).astype(np.float32)


def _rectangle(rng: np.random.Generator, angle: npt.NDArray[np.float64]) -> Floats:
    ratio = rng.uniform(0.5, 1)
    tiny = 1e-9
    to_side, to_top = 1 / np.maximum(np.abs(np.cos(angle)), tiny), ratio / np.maximum(np.abs(np.sin(angle)), tiny)
    return (0.85 * np.minimum(to_side, to_top)).astype(np.float32)


def _polygon(rng: np.random.Generator, angle: npt.NDArray[np.float64]) -> Floats:
    wedge = 2 * np.pi / int(rng.integers(3, 7))
    return (1 / np.cos(angle % wedge - wedge / 2) * np.cos(wedge / 2) * 1.1).astype(np.float32)


def _blob(rng: np.random.Generator, angle: npt.NDArray[np.float64]) -> Floats:
    orders = np.arange(2, 2 + _HARMONICS)[:, None]
    phases, weights = rng.uniform(0, 2 * np.pi, (_HARMONICS, 1)), rng.uniform(0, 0.18, (_HARMONICS, 1))
    return (0.85 + (weights * np.cos(orders * angle + phases)).sum(axis=0)).astype(np.float32)


_OUTLINES: tuple[Callable[[np.random.Generator, npt.NDArray[np.float64]], Floats], ...] = (
    _ellipse,
    _rectangle,
    _polygon,
    _blob,
)


def _texture(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Smooth colour noise over several octaves around a random colour: float32 [height, width, 3], 0..255.

    The finest cells are 4 px wide: fine enough for matching, and coarse enough that a bilinear warp is exact to about
    one grey level.
    """
    noise = np.zeros((height, width, 3), np.float32)
    cell = 4
    while cell <= max(16, max(height, width) // 4):
        grid = rng.standard_normal((height // cell + 3, width // cell + 3, 3), dtype=np.float32)
        grown = cv2.resize(grid, None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)
        noise += grown[cell : cell + height, cell : cell + width]
        cell *= 2
    colour = rng.uniform(70, 185, 3).astype(np.float32)
    return np.clip(colour + noise * (rng.uniform(35, 50) / noise.std()), 0, 255).astype(np.float32)
