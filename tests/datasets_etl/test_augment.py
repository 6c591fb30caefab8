"""Training augmentation: true geometry, RAFT's distributions, nothing but the given generator's chance."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_etl.augment import AugmentConfig, Geometry, _scaled, _window, augment, draw_geometry
from datasets_etl.colour_jitter import Jitter, apply_jitters, draw_jitters
from datasets_etl.errors import DataError
from datasets_etl.formats import decode_frame
from datasets_etl.samples import FlowSample
from datasets_etl.synthetic import synthetic_pair

Floats = npt.NDArray[np.float32]

SIZE = (150, 210)
LIVELY = AugmentConfig((96, 128), -0.3, 0.8, hflip=0.5, vflip=0.5, photometric=False)
DRAWS = 4000


def ground_truth(sample: FlowSample) -> tuple[Floats, npt.NDArray[np.bool_]]:
    assert sample.flow is not None
    assert sample.valid is not None
    return sample.flow, sample.valid


def geometry_of(sample: FlowSample, config: AugmentConfig, seed: int) -> Geometry:
    """What augment() draws from the same generator when colours are left alone."""
    return draw_geometry(sample.image0.shape[:2], sample.sparse, config, np.random.default_rng(seed))


def numbered_points(seed: int, size: tuple[int, int] = SIZE, density: float = 0.3) -> FlowSample:
    """A sparse sample whose vector at each valid pixel is that pixel's own (x + 1, y + 1)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    valid = rng.random(size) < density
    flow = np.stack([x + 1, y + 1], axis=-1).astype(np.float32) * valid[..., None]
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    return FlowSample("k", "kitti", "training", True, image, image, flow, valid)


def kolmogorov_smirnov(values: npt.ArrayLike, low: float, high: float) -> float:
    """Largest distance between the values' distribution and the uniform one, in units of its 0.1 % critical value."""
    ordered = np.sort((np.asarray(values, float) - low) / (high - low))
    steps = np.arange(ordered.size + 1) / ordered.size
    distance = max(np.abs(ordered - steps[:-1]).max(), np.abs(ordered - steps[1:]).max())
    return float(distance * np.sqrt(ordered.size) / 1.95)


def assert_rate(hits: npt.ArrayLike, expected: float) -> None:
    observed = np.asarray(hits, bool)
    tolerance = 4 * np.sqrt(max(expected * (1 - expected), 1e-9) / observed.size)
    assert abs(observed.mean() - expected) <= tolerance


# ------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("seed", range(30))
def test_warping_frame_1_by_the_augmented_flow_gives_frame_0(seed: int) -> None:
    pair = synthetic_pair(seed, *SIZE, max_motion=0.15)
    flow, _ = ground_truth(pair)
    assert pair.occluded is not None
    pair = replace(pair, valid=~pair.occluded, flow=flow * ~pair.occluded[..., None])
    out = augment(pair, LIVELY, np.random.default_rng(seed))
    flow, valid = ground_truth(out)
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    x1, y1 = x + flow[..., 0], y + flow[..., 1]
    there = valid & (x1 >= 0) & (x1 <= 127) & (y1 >= 0) & (y1 <= 95)
    # Where motion jumps, interpolated flow is a mixture of two that are right, and belongs to neither side.
    window = np.ones((3, 3), np.uint8)
    there &= (cv2.dilate(flow, window) - cv2.erode(flow, window) < 2).all(axis=-1)
    warped = cv2.remap(out.image1.astype(np.float32), x1, y1, cv2.INTER_LINEAR)
    error = np.abs(warped - out.image0).mean(axis=-1)[there]
    assert there.mean() > 0.25
    assert np.quantile(error, 0.9) < 4
    standing = np.abs(out.image1.astype(np.float32) - out.image0).mean(axis=-1)[there]
    assert error.mean() < 0.25 * standing.mean()


def whole_frame_then_crop(
    sample: FlowSample, geometry: Geometry, crop: tuple[int, int]
) -> list[npt.NDArray[np.generic]]:
    """The plain way: resize everything, flip everything, cut the crop out."""
    flow, valid = ground_truth(sample)
    scale_y, scale_x = geometry.scale
    layers = [sample.image0, sample.image1, flow * np.float32([scale_x, scale_y]), (~valid).astype(np.float32)]
    done = []
    for layer in layers:
        whole = cv2.resize(layer, None, fx=scale_x, fy=scale_y, interpolation=cv2.INTER_LINEAR)
        whole = whole[:, ::-1] if geometry.hflip else whole
        whole = whole[::-1] if geometry.vflip else whole
        y, x = geometry.offset
        done.append(whole[y : y + crop[0], x : x + crop[1]])
    done[2] = done[2] * np.float32([-1 if geometry.hflip else 1, -1 if geometry.vflip else 1])
    return done


@pytest.mark.parametrize("seed", range(40))
def test_the_crop_is_that_of_the_whole_frame_resized_to_a_fraction_of_a_pixel(seed: int) -> None:
    pair = synthetic_pair(seed, *SIZE)
    geometry = geometry_of(pair, LIVELY, seed)
    out = augment(pair, LIVELY, np.random.default_rng(seed))
    image0, image1, flow, _ = whole_frame_then_crop(pair, geometry, LIVELY.crop)
    for ours, plain in ((out.image0, image0), (out.image1, image1)):
        assert ours.shape == plain.shape
        difference = np.abs(ours.astype(int) - plain.astype(int))
        assert difference.mean() < 0.6  # the grids meet to about 1/32 px; half a pixel off makes 6
        assert np.quantile(difference, 0.99) < 6
    out_flow, _ = ground_truth(out)
    assert np.abs(out_flow - flow).mean() < 0.1


@pytest.mark.parametrize("sparse", [False, True])
def test_without_scale_or_flip_the_crop_is_a_part_of_the_frame_to_the_bit(sparse: bool) -> None:
    config = AugmentConfig((96, 128), 0, 0, hflip=0, vflip=0, photometric=False)
    pair = synthetic_pair(1, *SIZE, sparse=sparse)
    flow, valid = ground_truth(pair)
    unscaled = 0
    for seed in range(30):
        geometry = geometry_of(pair, config, seed)
        if geometry.scale == (1, 1):
            unscaled += 1
            out = augment(pair, config, np.random.default_rng(seed))
            part = (
                slice(geometry.offset[0], geometry.offset[0] + 96),
                slice(geometry.offset[1], geometry.offset[1] + 128),
            )
            for ours, whole in zip(
                (out.image0, out.image1, *ground_truth(out)), (pair.image0, pair.image1, flow, valid), strict=True
            ):
                np.testing.assert_array_equal(ours, whole[part])
    assert unscaled


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    crop=st.tuples(st.integers(8, 100), st.integers(8, 100)),
    scales=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    sparse=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_frame_gives_a_crop_of_the_size_asked_for(
    size: tuple[int, int], crop: tuple[int, int], scales: tuple[float, float], sparse: bool, seed: int
) -> None:
    sample = replace(numbered_points(seed, size), sparse=sparse)
    config = AugmentConfig(crop, min(scales), max(scales), vflip=0.5, photometric=seed % 2 == 0)
    out = augment(sample, config, np.random.default_rng(seed))
    flow, valid = ground_truth(out)
    assert out.image0.shape == out.image1.shape == (*crop, 3)
    assert out.image0.dtype == out.image1.dtype == np.uint8
    assert (flow.shape, flow.dtype) == ((*crop, 2), np.float32)
    assert (valid.shape, valid.dtype) == (crop, np.bool_)
    assert not flow[~valid].any()
    assert out.occluded is None


# ------------------------------------------------------------------------------------------ sparse ground truth


@pytest.mark.parametrize("seed", range(20))
def test_sparse_vectors_are_moved_never_mixed(seed: int) -> None:
    sample = numbered_points(seed)
    config = replace(LIVELY, min_log2_scale=-0.5)
    geometry = geometry_of(sample, config, seed)
    flow, valid = ground_truth(augment(sample, config, np.random.default_rng(seed)))
    (scale_y, scale_x), (_, was_valid) = geometry.scale, ground_truth(sample)
    height, width = round(SIZE[0] * scale_y), round(SIZE[1] * scale_x)

    sign = np.array([-1 if geometry.hflip else 1, -1 if geometry.vflip else 1])
    source = flow[valid] / (sign * [scale_x, scale_y]) - 1  # each vector says which pixel it was
    x, y = np.rint(source).astype(int).T
    assert np.abs(source - np.rint(source)).max() < 1e-3
    assert was_valid[y, x].all()
    assert len(set(zip(x, y, strict=True))) == x.size

    to_y, to_x = np.nonzero(valid)
    x1, y1 = (x + 0.5) * scale_x - 0.5, (y + 0.5) * scale_y - 0.5  # where its point is in the scaled frame
    x1, y1 = (width - 1 - x1 if geometry.hflip else x1), (height - 1 - y1 if geometry.vflip else y1)
    assert np.abs(x1 - geometry.offset[1] - to_x).max() < 0.5 + 1 / 16
    assert np.abs(y1 - geometry.offset[0] - to_y).max() < 0.5 + 1 / 16


def test_no_sparse_point_within_the_crop_is_lost_when_scaling_up() -> None:
    config = AugmentConfig((96, 128), 0.3, 0.5, hflip=0.5, vflip=0.5, photometric=False)
    for seed in range(20):
        sample = numbered_points(seed)
        (scale_y, scale_x), (offset_y, offset_x) = (g := geometry_of(sample, config, seed)).scale, g.offset
        _, was_valid = ground_truth(sample)
        y, x = np.nonzero(was_valid)
        x1, y1 = (x + 0.5) * scale_x - 0.5, (y + 0.5) * scale_y - 0.5
        x1 = round(SIZE[1] * scale_x) - 1 - x1 if g.hflip else x1
        y1 = round(SIZE[0] * scale_y) - 1 - y1 if g.vflip else y1
        inside = (x1 > offset_x) & (x1 < offset_x + 127) & (y1 > offset_y) & (y1 < offset_y + 95)
        _, valid = ground_truth(augment(sample, config, np.random.default_rng(seed)))
        assert inside.sum() <= valid.sum() <= inside.sum() + 2 * (96 + 128)


def test_a_sparse_frame_without_any_point_stays_without() -> None:
    out = augment(numbered_points(0, density=0), LIVELY, np.random.default_rng(0))
    flow, valid = ground_truth(out)
    assert not valid.any()
    assert not flow.any()


# ------------------------------------------------------------------------------------- invalid dense ground truth


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("seed", range(10))
def test_what_is_invalid_never_leaks_into_what_is_valid(garbage: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    valid = cv2.blur(rng.random(SIZE).astype(np.float32), (9, 9)) < 0.5
    flow = np.where(valid[..., None], np.float32([3, -2]), np.float32(garbage))
    sample = replace(numbered_points(seed), sparse=False, flow=flow, valid=valid)
    geometry = geometry_of(sample, LIVELY, seed)
    out_flow, out_valid = ground_truth(augment(sample, LIVELY, np.random.default_rng(seed)))
    assert 0.1 < out_valid.mean() < 0.9
    expected = np.array([3, -2]) * geometry.scale[::-1] * [-1 if geometry.hflip else 1, -1 if geometry.vflip else 1]
    np.testing.assert_allclose(out_flow[out_valid], np.broadcast_to(expected, (out_valid.sum(), 2)), rtol=1e-5)
    assert not out_flow[~out_valid].any()


@pytest.mark.parametrize("seed", range(20))
def test_a_pixel_is_valid_exactly_where_all_that_contribute_are(seed: int) -> None:
    pair = synthetic_pair(seed, *SIZE)
    valid = np.random.default_rng(seed).random(SIZE) < 0.98
    pair = replace(pair, valid=valid)
    plain = whole_frame_then_crop(pair, geometry_of(pair, LIVELY, seed), LIVELY.crop)[3]
    _, out_valid = ground_truth(augment(pair, LIVELY, np.random.default_rng(seed)))
    assert 0.5 < out_valid.mean() < 0.99
    # Beside a weight of zero the 1/32 px by which the grids may differ decides.
    assert not out_valid[plain > 0.1].any()
    assert (out_valid == (plain == 0)).mean() > 0.97


# --------------------------------------------------------------------------------------------------- distributions


def drawn(config: AugmentConfig, size: tuple[int, int], sparse: bool) -> list[Geometry]:
    rng = np.random.default_rng(7)
    return [draw_geometry(size, sparse, config, rng) for _ in range(DRAWS)]


def test_dense_scale_and_stretch_come_with_their_probabilities_and_ranges() -> None:
    config = AugmentConfig((32, 32), -0.2, 0.6)
    log2_scales = np.log2([geometry.scale for geometry in drawn(config, (1000, 1200), False)])
    scaled = log2_scales.any(axis=1)
    assert_rate(scaled, 0.8)
    y, x = log2_scales[scaled].T
    stretched = x != y
    assert_rate(stretched, 0.8)
    assert kolmogorov_smirnov(x[~stretched], -0.2, 0.6) < 1
    ratio = (x - y)[stretched]  # the difference of two uniform draws is triangular
    cumulative = np.where(ratio < 0, (ratio + 0.4) ** 2, 2 * 0.4**2 - (0.4 - ratio) ** 2) / (2 * 0.4**2)
    assert kolmogorov_smirnov(cumulative, 0, 1) < 1
    assert -0.4 <= log2_scales.min() < -0.3
    assert 0.7 < log2_scales.max() <= 0.8


def test_sparse_is_scaled_without_stretch() -> None:
    log2_scales = np.log2([geometry.scale for geometry in drawn(AugmentConfig((32, 32), -0.3, 0.5), (400, 500), True)])
    np.testing.assert_array_equal(log2_scales[:, 0], log2_scales[:, 1])
    scaled = log2_scales[:, 0] != 0
    assert_rate(scaled, 0.8)
    assert kolmogorov_smirnov(log2_scales[scaled, 0], -0.3, 0.5) < 1


@pytest.mark.parametrize(("sparse", "spare"), [(False, 8), (True, 1)])
def test_the_scale_never_falls_below_what_the_crop_needs(sparse: bool, spare: int) -> None:
    config = AugmentConfig((90, 100), -2, -1)
    floor = (90 + spare) / 100
    scales = [geometry.scale for geometry in drawn(config, (100, 200), sparse)]
    assert {min(scale) for scale in scales} == {floor, 1.0}
    small = [geometry.scale for geometry in drawn(config, (45, 200), sparse)]
    assert {min(scale) for scale in small} == {(90 + spare) / 45}  # also where no scaling was drawn


def test_a_frame_as_large_as_the_crop_is_taken_whole_when_not_scaled() -> None:
    unscaled = [g for g in drawn(AugmentConfig((384, 512), -0.1, 1), (384, 512), False) if g.scale == (1, 1)]
    assert_rate(np.arange(DRAWS) < len(unscaled), 0.2)
    assert {geometry.offset for geometry in unscaled} == {(0, 0)}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("hflip", "vflip"), [(0.5, 0.1), (0.5, 0), (0, 0), (1, 1)])
def test_flips_come_with_their_probabilities(sparse: bool, hflip: float, vflip: float) -> None:
    geometries = drawn(AugmentConfig((32, 32), 0, 0, hflip, vflip), (100, 100), sparse)
    assert_rate([geometry.hflip for geometry in geometries], hflip)
    assert_rate([geometry.vflip for geometry in geometries], vflip)


def test_dense_crops_are_uniform_over_all_offsets_but_the_last() -> None:
    geometries = drawn(AugmentConfig((32, 32), 0, 0), (42, 52), False)
    offsets = np.array([geometry.offset for geometry in geometries if geometry.scale == (1, 1)])
    for axis, spare in ((0, 10), (1, 20)):
        assert set(offsets[:, axis]) == set(range(spare))
        for offset in range(spare):
            assert_rate(offsets[:, axis] == offset, 1 / spare)


def test_sparse_crops_reach_over_the_border_before_they_are_clamped() -> None:
    geometries = drawn(AugmentConfig((32, 32), 0, 0), (62, 72), True)
    y, x = np.array([geometry.offset for geometry in geometries]).T
    assert (y.min(), y.max(), x.min(), x.max()) == (0, 30, 0, 40)
    assert_rate(y == 30, 20 / 50)
    assert_rate(y == 0, 1 / 50)
    assert_rate(x == 0, 51 / 140)
    assert_rate(x == 40, 50 / 140)


@pytest.mark.parametrize(("sparse", "strength", "hue"), [(False, 0.4, 0.5 / np.pi), (True, 0.3, 0.3 / np.pi)])
def test_jitter_is_drawn_uniformly_in_random_order(sparse: bool, strength: float, hue: float) -> None:
    rng = np.random.default_rng(3)
    pairs = [draw_jitters(sparse, rng) for _ in range(DRAWS)]
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


# ---------------------------------------------------------------------------------------------------------- chance


@pytest.mark.parametrize("sparse", [False, True])
def test_the_same_generator_state_gives_the_same_bits_whatever_the_global_one(sparse: bool) -> None:
    config = replace(LIVELY, photometric=True)
    pair = synthetic_pair(5, *SIZE, sparse=sparse)
    np.random.seed(0)  # noqa: NPY002  a global state that must not matter
    first = augment(pair, config, np.random.default_rng([1, 2]))
    np.random.seed(1)  # noqa: NPY002
    again = augment(pair, config, np.random.default_rng([1, 2]))
    other = augment(pair, config, np.random.default_rng([1, 3]))
    for name in ("image0", "image1", "flow", "valid"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.image0, other.image0)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_sample_given_is_left_as_it_was(sparse: bool) -> None:
    pair, same = (synthetic_pair(5, *SIZE, sparse=sparse) for _ in range(2))
    for seed in range(10):
        augment(pair, replace(LIVELY, photometric=True), np.random.default_rng(seed))
    for name in ("image0", "image1", "flow", "valid"):
        np.testing.assert_array_equal(getattr(pair, name), getattr(same, name))


# --------------------------------------------------------------------------------------------------------- colours


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


def colourful(seed: int) -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (64, 80, 3), np.uint8)
    pair = synthetic_pair(seed, 64, 80)
    return [noise, pair.image0]


@pytest.mark.parametrize("seed", range(40))
def test_jitter_is_torchvisions_to_two_grey_levels(seed: int) -> None:
    frames = colourful(seed)
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
    frames = colourful(0)
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


# ----------------------------------------------------------------------------------------------------- wrong input


def test_a_sample_without_ground_truth_is_refused_by_name() -> None:
    sample = replace(synthetic_pair(0, *SIZE), flow=None, valid=None, subset="test-clean")
    with pytest.raises(DataError, match="test-clean"):
        augment(sample, LIVELY, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("field", "value"), [("crop", (0, 64)), ("min_log2_scale", 2.0), ("hflip", 1.5), ("vflip", -0.1)]
)
def test_a_config_out_of_range_is_refused_naming_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(LIVELY, **{field: value})


@pytest.mark.parametrize("sparse", [False, True])
def test_an_augmented_sample_has_the_colours_drawn_for_its_whole_frames(sparse: bool) -> None:
    config = AugmentConfig((96, 128), 0, 0, hflip=0, vflip=0)
    pair = synthetic_pair(1, *SIZE, sparse=sparse)
    frames = [pair.image0, pair.image1]
    unscaled = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        whole = apply_jitters(frames, frames, draw_jitters(sparse, rng))
        geometry = draw_geometry(SIZE, sparse, config, rng)
        if geometry.scale == (1, 1):
            unscaled += 1
            out = augment(pair, config, np.random.default_rng(seed))
            y, x = geometry.offset
            for ours, jittered in zip((out.image0, out.image1), whole, strict=True):
                np.testing.assert_array_equal(ours, jittered[y : y + 96, x : x + 128])
    assert unscaled


def test_a_window_at_the_frames_end_holds_its_crop_whatever_the_roundings() -> None:
    """One pixel too few would end the training at this sample, after each resume again."""
    window = _window(68, 1.551904501802303, 45, 61, mirrored=False)
    assert _scaled(window.stop - window.start, window.scale) >= window.skip + window.crop
