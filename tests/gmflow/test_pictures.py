"""Error maps on KITTI's scale, arrows, and frames moved along their flow."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from gmflow import GMFlowError, error_to_image
from gmflow.drawing import draw_arrows, encode_animation, warp_animation, warp_frame
from gmflow.visualize import KITTI_BANDS


def colour_of(error: float, speed: float) -> list[int]:
    target = np.zeros((1, 1, 2), np.float32)
    target[..., 0] = speed
    flow = target.copy()
    flow[..., 1] = error
    colour: list[int] = error_to_image(flow, target)[0, 0].tolist()
    return colour


@pytest.mark.parametrize(
    ("error", "speed", "band"),
    [
        (0.0, 10, 0),
        (0.1, 10, 0),
        (2.9, 10, 4),  # under 3 px: just no outlier
        (3.0, 10, 5),  # a limit is the first value of the next colour, as in the development kit
        (3.1, 10, 5),  # over 3 px and over 5 %
        (10.0, 250, 4),  # 4 % of the speed: no outlier, however many pixels
        (14.0, 250, 5),
        (60.0, 0, 9),
    ],
)
def test_errors_have_kittis_colours(error: float, speed: float, band: int) -> None:
    assert colour_of(error, speed) == list(KITTI_BANDS[band][1])


@pytest.mark.parametrize("unknown", [np.nan, np.inf, 1e10])
def test_unknown_truth_is_black_and_shapes_must_fit(unknown: float) -> None:
    flow = np.zeros((2, 2, 2), np.float32)
    target = flow.copy()
    target[0, 0, 0] = unknown
    valid = np.array([[True, False], [True, True]])
    image = error_to_image(flow, target, valid)
    assert image[0].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert image[1].any()
    with pytest.raises(GMFlowError, match="error map needs"):
        error_to_image(flow, target[:1])
    with pytest.raises(GMFlowError, match="error map needs"):
        error_to_image(flow, target, valid[:1])
    with pytest.raises(GMFlowError, match="error map needs"):
        error_to_image(flow, target, valid.astype(np.uint8))


def test_arrows_go_where_the_flow_goes() -> None:
    frame = np.full((48, 96, 3), 128, np.uint8)
    flow = np.zeros((48, 96, 2), np.float32)
    flow[..., 0] = 20
    changed = (draw_arrows(frame, flow, spacing=48) != frame).any(
        axis=2
    )  # one arrow begins at (24, 24), one at (72, 24)
    assert changed[24, 24:45].all()
    assert not changed[24, :20].any()
    assert not changed[24, 50:70].any()
    assert not changed[:15].any()
    flow[...] = np.nan
    assert (draw_arrows(frame, flow) == frame).all()
    with pytest.raises(GMFlowError, match="frame"):
        draw_arrows(frame[:10], flow)
    with pytest.raises(GMFlowError, match="spacing must be at least 1, not 0"):
        draw_arrows(frame, flow, spacing=0)


def test_warping_by_the_true_flow_brings_frame_1_back_to_frame_0() -> None:
    frame0 = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    frame1 = np.roll(frame0, (2, 6), axis=(0, 1))
    flow = np.zeros((30, 40, 2), np.float32)
    flow[..., 0], flow[..., 1] = 6, 2
    assert (warp_frame(frame1, flow)[:28, :34] == frame0[:28, :34]).all()
    assert (warp_frame(frame1, flow, 0.5)[:29, :37] == np.roll(frame0, (1, 3), axis=(0, 1))[:29, :37]).all()
    assert (warp_frame(frame1, flow, 0.0) == frame1).all()
    assert not warp_frame(frame1, flow)[:, 36:].any()


def test_the_animation_goes_from_frame_0_to_frame_1_and_back() -> None:
    frame0 = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8), (0, 0), 3)
    frame1 = np.roll(frame0, 4, axis=1)
    flow = np.zeros((32, 48, 2), np.float32)
    flow[..., 0] = 4
    pictures = warp_animation(frame1, flow, steps=4)
    assert len(pictures) == 8
    assert (pictures[0][:, :40] == frame0[:, :40]).all()
    assert (pictures[4] == frame1).all()
    read, animation = cv2.imdecodeanimation(np.frombuffer(encode_animation(pictures), np.uint8))
    assert read
    assert len(animation.frames) == 8
    assert animation.loop_count == 0  # for ever
    shown = cv2.cvtColor(animation.frames[4][..., :3], cv2.COLOR_BGR2RGB)
    assert np.abs(shown.astype(int) - frame1).mean() < 4


def test_an_animation_that_cannot_be_is_refused_at_once() -> None:
    frame, flow = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6, 2), np.float32)
    with pytest.raises(GMFlowError, match="steps must be at least 1"):
        warp_animation(frame, flow, steps=0)
    with pytest.raises(GMFlowError, match="a frame uint8"):
        warp_animation(frame[:3], flow)


def test_arrows_go_down_where_the_flow_goes_down() -> None:
    frame = np.full((96, 48, 3), 128, np.uint8)
    flow = np.zeros((96, 48, 2), np.float32)
    flow[..., 1] = 20
    changed = (draw_arrows(frame, flow, spacing=48) != frame).any(axis=2)  # they begin at (24, 24) and (24, 72)
    assert changed[24:45, 24].all()
    assert not changed[:20].any()


@pytest.mark.parametrize(("height", "width"), [(400, 24), (24, 400)])
def test_an_arrow_of_a_long_frame_is_as_long_as_the_flow(height: int, width: int) -> None:
    """Arrows are cut short far outside the picture alone."""
    frame = np.full((height, width, 3), 128, np.uint8)
    flow = np.full((height, width, 2), np.nan, np.float32)  # no arrow
    flow[12, 12] = (0, 300) if height > width else (300, 0)
    y, x = (draw_arrows(frame, flow, spacing=24) != frame).any(axis=2).nonzero()
    assert max(y.max(), x.max()) == pytest.approx(312, abs=4)


def test_an_error_map_of_16_bits_is_that_of_32() -> None:
    """Speeds beyond 255 px, whose squares 16 bits do not hold, included."""
    target = np.random.default_rng(0).normal(0, 300, (20, 30, 2)).astype(np.float16)
    flow = target + np.random.default_rng(1).normal(0, 20, (20, 30, 2)).astype(np.float16)
    wanted = error_to_image(flow.astype(np.float32), target.astype(np.float32))
    np.testing.assert_array_equal(error_to_image(flow, target), wanted)


def test_flow_marked_as_unknown_moves_nothing_and_gets_no_arrow() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for unknown in (np.float32(1e10), np.float32(-1e10), np.float16(np.inf), np.float32(-np.inf), np.float16(np.nan)):
        flow = np.full((30, 40, 2), unknown)
        np.testing.assert_array_equal(warp_frame(frame, flow), frame)
        np.testing.assert_array_equal(draw_arrows(frame, flow, spacing=8), frame)


def test_an_animation_larger_than_its_format_allows_is_refused_in_words() -> None:
    with pytest.raises(GMFlowError, match=r"at most 16383 pixels a side, not 16400x8"):
        encode_animation([np.zeros((8, 16400, 3), np.uint8)] * 2)


@pytest.mark.parametrize("heights", [(), (8, 9)])
def test_an_animation_of_no_pictures_or_of_several_sizes_is_refused(heights: tuple[int, ...]) -> None:
    with pytest.raises(GMFlowError, match=f"pictures of one size, not of {len(heights)} sizes"):
        encode_animation([np.zeros((height, 8, 3), np.uint8) for height in heights])


def test_frames_are_warped_up_to_the_longest_that_can_be() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (2, 32766, 3), dtype=np.uint8)
    np.testing.assert_array_equal(warp_frame(frame, np.zeros((2, 32766, 2))), frame)
    with pytest.raises(GMFlowError, match="at most 32766 pixels a side can be warped, not 32767x2"):
        warp_frame(np.zeros((2, 32767, 3), np.uint8), np.zeros((2, 32767, 2)))
