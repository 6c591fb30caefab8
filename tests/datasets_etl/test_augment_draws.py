"""What training augmentation draws: RAFT's distributions of scales, flips and crops."""

import numpy as np
import pytest

from datasets_etl.augment import AugmentConfig, Geometry, draw_geometry
from tests.datasets_etl.distributions import assert_rate, kolmogorov_smirnov

DRAWS = 4000


def draw_geometries(config: AugmentConfig, size: tuple[int, int], sparse: bool) -> list[Geometry]:
    rng = np.random.default_rng(7)
    return [draw_geometry(size, sparse, config, rng) for _ in range(DRAWS)]


def test_dense_scale_and_stretch_come_with_their_probabilities_and_ranges() -> None:
    config = AugmentConfig((32, 32), -0.2, 0.6)
    log2_scales = np.log2([geometry.scale for geometry in draw_geometries(config, (1000, 1200), False)])
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
    log2_scales = np.log2(
        [geometry.scale for geometry in draw_geometries(AugmentConfig((32, 32), -0.3, 0.5), (400, 500), True)]
    )
    np.testing.assert_array_equal(log2_scales[:, 0], log2_scales[:, 1])
    scaled = log2_scales[:, 0] != 0
    assert_rate(scaled, 0.8)
    assert kolmogorov_smirnov(log2_scales[scaled, 0], -0.3, 0.5) < 1


@pytest.mark.parametrize(("sparse", "spare"), [(False, 8), (True, 1)])
def test_the_scale_never_falls_below_what_the_crop_needs(sparse: bool, spare: int) -> None:
    config = AugmentConfig((90, 100), -2, -1)
    floor = (90 + spare) / 100
    scales = [geometry.scale for geometry in draw_geometries(config, (100, 200), sparse)]
    assert {min(scale) for scale in scales} == {floor, 1.0}
    small = [geometry.scale for geometry in draw_geometries(config, (45, 200), sparse)]
    assert {min(scale) for scale in small} == {(90 + spare) / 45}  # also where no scaling was drawn


def test_a_frame_as_large_as_the_crop_is_taken_whole_when_not_scaled() -> None:
    unscaled = [g for g in draw_geometries(AugmentConfig((384, 512), -0.1, 1), (384, 512), False) if g.scale == (1, 1)]
    assert_rate(np.arange(DRAWS) < len(unscaled), 0.2)
    assert {geometry.offset for geometry in unscaled} == {(0, 0)}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("hflip", "vflip"), [(0.5, 0.1), (0.5, 0), (0, 0), (1, 1)])
def test_flips_come_with_their_probabilities(sparse: bool, hflip: float, vflip: float) -> None:
    geometries = draw_geometries(AugmentConfig((32, 32), 0, 0, hflip, vflip), (100, 100), sparse)
    assert_rate([geometry.hflip for geometry in geometries], hflip)
    assert_rate([geometry.vflip for geometry in geometries], vflip)


def test_dense_crops_are_uniform_over_all_offsets_but_the_last() -> None:
    geometries = draw_geometries(AugmentConfig((32, 32), 0, 0), (42, 52), False)
    offsets = np.array([geometry.offset for geometry in geometries if geometry.scale == (1, 1)])
    for axis, spare in ((0, 10), (1, 20)):
        assert set(offsets[:, axis]) == set(range(spare))
        for offset in range(spare):
            assert_rate(offsets[:, axis] == offset, 1 / spare)


def test_sparse_crops_reach_over_the_border_before_they_are_clamped() -> None:
    geometries = draw_geometries(AugmentConfig((32, 32), 0, 0), (62, 72), True)
    y, x = np.array([geometry.offset for geometry in geometries]).T
    assert (y.min(), y.max(), x.min(), x.max()) == (0, 30, 0, 40)
    assert_rate(y == 30, 20 / 50)
    assert_rate(y == 0, 1 / 50)
    assert_rate(x == 0, 51 / 140)
    assert_rate(x == 40, 50 / 140)
