"""Colour jitter: RAFT's distributions, and torchvision's colours."""

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from datasets_etl.colour_jitter import Jitter, apply_jitters, draw_jitters
from datasets_etl.formats import decode_frame
from datasets_etl.synthetic import synthetic_pair
from tests.datasets_etl.distributions import assert_rate, kolmogorov_smirnov

Floats = npt.NDArray[np.float32]


def float_jitter(images: list[Floats], jitter: Jitter) -> list[Floats]:
    """torchvision's ColorJitter on images that share a jitter, in floating point without any rounding."""
    grey = np.array([0.299, 0.587, 0.114])
    for name in jitter.order:
        if name == "contrast":
            mean = np.mean([image @ grey for image in images])
            images = [jitter.contrast * image + (1 - jitter.contrast) * mean for image in images]
        elif name == "saturation":
            images = [
                jitter.saturation * image + (1 - jitter.saturation) * (image @ grey)[..., None] for image in images
            ]
        elif name == "hue":
            images = [float_hue(image, jitter.hue) for image in images]
        else:
            images = [jitter.brightness * image for image in images]
        images = [np.clip(image, 0, 255) for image in images]
    return images


def float_hue(image: Floats, turns: float) -> Floats:
    value, least = image.max(axis=-1), image.min(axis=-1)
    chroma = np.where(value > least, value - least, 1)
    red, green, blue = np.moveaxis(image, -1, 0)
    sixths = np.select(
        [value == red, value == green], [(green - blue) / chroma, (blue - red) / chroma + 2], (red - green) / chroma + 4
    )
    sixths = sixths + 6 * turns
    parts = [(offset + sixths) % 6 for offset in (5, 3, 1)]
    return np.stack([value - (value - least) * np.clip(np.minimum(k, 4 - k), 0, 1) for k in parts], axis=-1)


def colourful_frames(seed: int) -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (64, 80, 3), np.uint8)
    pair = synthetic_pair(seed, 64, 80)
    return [noise, pair.image0]


@pytest.mark.parametrize(("sparse", "strength", "hue"), [(False, 0.4, 0.5 / np.pi), (True, 0.3, 0.3 / np.pi)])
def test_jitter_is_drawn_uniformly_in_random_order(sparse: bool, strength: float, hue: float) -> None:
    rng = np.random.default_rng(3)
    pairs = [draw_jitters(sparse, rng) for _ in range(4000)]
    assert_rate([first != second for first, second in pairs], 0 if sparse else 0.2)
    for which in (0, 1):
        jitters = [pair[which] for pair in pairs]
        for name in ("brightness", "contrast", "saturation"):
            values = [getattr(jitter, name) for jitter in jitters]
            assert kolmogorov_smirnov(values, 1 - strength, 1 + strength) < 1
        assert kolmogorov_smirnov([jitter.hue for jitter in jitters], -hue, hue) < 1
        orders = Counter(jitter.order for jitter in jitters)
        assert len(orders) == 24
        for order in orders:
            assert_rate([jitter.order == order for jitter in jitters], 1 / 24)


@pytest.mark.parametrize("seed", range(40))
def test_jitter_is_torchvisions_to_two_grey_levels(seed: int) -> None:
    frames = colourful_frames(seed)
    first, second = draw_jitters(False, np.random.default_rng(seed))
    ours = apply_jitters(frames, frames, (first, second))
    if first is second:
        exact = float_jitter([frame.astype(np.float64) for frame in frames], first)
    else:
        exact = [
            float_jitter([frame.astype(np.float64)], jitter)[0]
            for frame, jitter in zip(frames, (first, second), strict=True)
        ]
    for image, reference in zip(ours, exact, strict=True):
        assert image.dtype == np.uint8
        assert np.abs(image - reference).max() <= 2


def test_contrast_is_around_the_whole_frames_mean_whatever_the_window() -> None:
    frames = colourful_frames(0)
    jitters = (jitter := Jitter(("hue", "brightness", "contrast", "saturation"), 1.3, 0.6, 1.2, 0.1), jitter)
    whole = apply_jitters(frames, frames, jitters)
    windows = apply_jitters([frame[10:30, 40:70] for frame in frames], frames, jitters)
    for window, image in zip(windows, whole, strict=True):
        np.testing.assert_array_equal(window, image[10:30, 40:70])


def test_jitter_of_a_real_frame_is_torchvisions_to_two_grey_levels(samples: Path) -> None:
    path = samples / "Sintel/training/final/market_5/frame_0002.png"
    frames = [decode_frame(path.read_bytes(), path.name)] * 2
    for seed in range(8):
        first, _ = draw_jitters(True, np.random.default_rng(seed))
        ours = apply_jitters(frames, frames, (first, first))
        exact = float_jitter([frame.astype(np.float64) for frame in frames], first)
        assert np.abs(ours[0] - exact[0]).max() <= 2
