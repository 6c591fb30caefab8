"""Training augmentation: true geometry, ground truth that is never mixed, nothing but the given generator's chance."""

from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_etl.augment import AugmentConfig, Geometry, _scaled, _window, augment, draw_geometry
from datasets_etl.colour_jitter import apply_jitters, draw_jitters
from datasets_etl.errors import DataError
from datasets_etl.samples import FlowSample
from datasets_etl.synthetic import synthetic_pair

SIZE = (150, 210)
LIVELY = AugmentConfig((96, 128), -0.3, 0.8, hflip=0.5, vflip=0.5, photometric=False)


def ground_truth(sample: FlowSample) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
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


def plain_crop(sample: FlowSample, geometry: Geometry, crop: tuple[int, int]) -> list[npt.NDArray[np.generic]]:
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
    image0, image1, flow, _ = plain_crop(pair, geometry, LIVELY.crop)
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
    plain = plain_crop(pair, geometry_of(pair, LIVELY, seed), LIVELY.crop)[3]
    _, out_valid = ground_truth(augment(pair, LIVELY, np.random.default_rng(seed)))
    assert 0.5 < out_valid.mean() < 0.99
    # Beside a weight of zero the 1/32 px by which the grids may differ decides.
    assert not out_valid[plain > 0.1].any()
    assert (out_valid == (plain == 0)).mean() > 0.97


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


def test_a_window_at_the_frames_end_holds_its_crop_whatever_the_roundings() -> None:
    """One pixel too few would end the training at this sample, after each resume again."""
    window = _window(68, 1.551904501802303, 45, 61, mirrored=False)
    assert _scaled(window.stop - window.start, window.scale) >= window.skip + window.crop


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
