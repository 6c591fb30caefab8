"""Flow in colours."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gmflow import (
    GMFlowError,
    flow_to_image,
)
from gmflow.visualize import color_wheel


def middlebury_color(u: float, v: float) -> list[int]:
    """The benchmark's own computeColor, for one vector of at most length 1."""
    wheel = []
    for length, start, step in (
        (15, (255, 0, 0), (0, 1, 0)),
        (6, (255, 255, 0), (-1, 0, 0)),
        (4, (0, 255, 0), (0, 0, 1)),
        (11, (0, 255, 255), (0, -1, 0)),
        (13, (0, 0, 255), (1, 0, 0)),
        (6, (255, 0, 255), (0, 0, -1)),
    ):
        wheel += [[s + d * (255 * i // length) for s, d in zip(start, step, strict=True)] for i in range(length)]
    position = (math.atan2(-v, -u) / math.pi + 1) / 2 * (len(wheel) - 1)
    lower = int(position)
    fraction = position - lower
    color = []
    for low, high in zip(wheel[lower], wheel[(lower + 1) % len(wheel)], strict=True):
        value = (1 - fraction) * low / 255 + fraction * high / 255
        color.append(int(255 * (1 - math.hypot(u, v) * (1 - value))))
    return color


def test_colors_are_those_of_middlebury() -> None:
    assert color_wheel().shape == (55, 3)
    generator = np.random.default_rng(0)
    flow = generator.uniform(-0.7, 0.7, (20, 30, 2))
    image = flow_to_image(flow, max_flow=1.0)
    expected = np.array([[middlebury_color(*vector) for vector in row] for row in flow])
    assert np.abs(image.astype(int) - expected).max() <= 1  # one ulp before the floor
    assert (image == expected).mean() > 0.99


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", [np.float32, np.float64])
def test_unknown_flow_is_black_and_no_flow_white(bits: type[np.floating]) -> None:
    flow = np.zeros((1, 5, 2), bits)
    flow[0, 0, 0], flow[0, 1, 1], flow[0, 2], flow[0, 3, 0] = np.nan, np.inf, 1e10, -1e10
    assert flow_to_image(flow).tolist() == [[[0, 0, 0]] * 4 + [[255, 255, 255]]]


def test_what_is_no_flow_is_refused() -> None:
    with pytest.raises(GMFlowError, match=r"\[H, W, 2\]"):
        flow_to_image(np.zeros((4, 4, 3)))
    with pytest.raises(GMFlowError, match="max_flow"):
        flow_to_image(np.zeros((4, 4, 2)), max_flow=0)


@pytest.mark.filterwarnings("error")
def test_a_picture_in_strips_is_that_of_each_pixel_and_16_bits_know_what_is_unknown() -> None:
    flow = np.random.default_rng(0).normal(0, 30, (300, 200, 2)).astype(np.float16)
    flow[7, 9] = np.inf
    picture = flow_to_image(flow, max_flow=50.0)
    assert (picture[7, 9] == 0).all()
    for y, x in ((0, 0), (7, 8), (40, 199), (41, 0), (299, 199)):
        np.testing.assert_array_equal(picture[y, x], flow_to_image(flow[y : y + 1, x : x + 1], max_flow=50.0)[0, 0])


def test_speeds_beyond_the_fullest_colour_are_darkened_and_the_fullest_is_the_largest() -> None:
    flow = np.array([[[3.0, 0.0], [0.0, -4.0], [1.0, 1.0]]])
    np.testing.assert_array_equal(flow_to_image(flow), flow_to_image(flow, max_flow=4.0))
    full = np.array(middlebury_color(1.0, 0.0))
    fast = flow_to_image(np.array([[[9.0, 0.0]]]), max_flow=3.0)[0, 0]
    assert np.abs(fast - 0.75 * full).max() <= 1
