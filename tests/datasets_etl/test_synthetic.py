"""Synthetic datasets: official layouts, exact ground truth, the same bytes for the same seed."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from datasets_etl.formats import decode_flo, decode_frame, decode_kitti_flow, decode_mask, decode_pfm, image_size
from datasets_etl.sources import SOURCES, SampleRef, SourceTree
from datasets_etl.synthetic import synthetic_pair, write_dataset
from datasets_etl.synthetic_scene import make_scene

HEIGHT, WIDTH = 96, 128


def tree(root: Path) -> SourceTree:
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return SourceTree(str(root), files, lambda path: (root / path).read_bytes())


def written(name: str, root: Path, *, pairs: int = 6, seed: int = 1, held_out: int = 0) -> SourceTree:
    write_dataset(name, root, pairs=pairs, height=HEIGHT, width=WIDTH, seed=seed, held_out=held_out)
    return tree(root)


def read_frame(files: SourceTree, path: str) -> npt.NDArray[np.uint8]:
    return decode_frame(files.read(path), path)


def read_flow(files: SourceTree, ref: SampleRef) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    assert ref.flow is not None
    data = files.read(ref.flow)
    if ref.flow.endswith(".png"):
        return decode_kitti_flow(data, ref.flow)
    flow = decode_flo(data, ref.flow) if ref.flow.endswith(".flo") else decode_pfm(data, ref.flow)
    return flow, np.isfinite(flow).all(axis=-1)


def warp(image: npt.NDArray[np.uint8], flow: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What image 1 shows where the flow says that image 0's pixels went."""
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return cv2.remap(image.astype(np.float32), x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR)


def steady(flow: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Pixels not beside a layer's edge, where a rendered pixel shows two layers: flow is affine within each layer."""
    bend = np.abs(cv2.Laplacian(flow, cv2.CV_32F)).max(axis=-1)
    return np.asarray(cv2.dilate((bend > 0.01).astype(np.uint8), np.ones((3, 3))) == 0)


@pytest.mark.parametrize("seed", range(12))
def test_warping_frame_1_by_the_flow_gives_frame_0_where_nothing_is_occluded(seed: int) -> None:
    scene = make_scene(np.random.default_rng(seed), HEIGHT, WIDTH, fast=True)
    for start, end in ((0, 1), (1, 2), (2, 1)):
        flow, occluded = scene.flow(start, end)
        error = np.abs(warp(scene.render(end), flow) - scene.render(start)).mean(axis=-1)
        lands_steady = warp(steady(scene.flow(end, start)[0]).astype(np.uint8), flow) == 1
        seen = ~occluded & steady(flow) & lands_steady
        assert seen.mean() > 0.25
        assert error[seen].mean() < 1.5
        assert error[seen].max() < 8
        assert error[occluded].mean() > 20  # so a wrong mask or a wrong flow would show above


@pytest.mark.parametrize("seed", range(6))
def test_a_pixel_is_occluded_exactly_where_the_way_back_leads_elsewhere_or_out(seed: int) -> None:
    scene = make_scene(np.random.default_rng(seed), HEIGHT, WIDTH, fast=True)
    (forward, occluded), (backward, _) = scene.flow(0, 1), scene.flow(1, 0)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    x1, y1 = x + forward[..., 0], y + forward[..., 1]
    outside = (x1 < 0) | (x1 > WIDTH - 1) | (y1 < 0) | (y1 > HEIGHT - 1)
    assert occluded[outside].all()
    back = cv2.remap(backward, x1, y1, cv2.INTER_NEAREST)
    there_and_back = np.hypot(*(forward + back).transpose(2, 0, 1))
    inside = ~outside & steady(forward)
    assert there_and_back[inside & ~occluded].mean() < 0.5
    consistent = there_and_back < 0.3  # up to the rounding to a whole pixel where layers rotate
    assert (consistent == ~occluded)[inside].mean() > 0.93


def test_motion_is_moderate_mostly_and_over_40_px_sometimes() -> None:
    speeds = []
    for number in range(60):
        flow, _ = make_scene(np.random.default_rng(number), HEIGHT, WIDTH, fast=number % 3 == 0).flow(0, 1)
        speeds.append(np.hypot(flow[..., 0], flow[..., 1]))
    assert 6 < np.mean(speeds) < 16
    assert np.median(speeds) < 16
    assert 0.01 < np.mean(np.array(speeds) > 40) < 0.15


def test_the_fast_shape_is_seen_in_both_frames() -> None:
    seen = 0
    for number in range(20):
        flow, occluded = make_scene(np.random.default_rng(number), HEIGHT, WIDTH, fast=True).flow(0, 1)
        seen += bool(((np.hypot(flow[..., 0], flow[..., 1]) > 40) & ~occluded).mean() > 0.01)
    assert seen >= 16


def test_max_motion_bounds_the_speed_as_a_share_of_the_width() -> None:
    for number in range(10):
        scene = make_scene(np.random.default_rng(number), HEIGHT, WIDTH, max_motion=0.05, fast=True)
        flow, _ = scene.flow(0, 1)
        rotation = 0.25 * HEIGHT  # of a shape's edge, by spin and zoom together
        assert np.hypot(flow[..., 0], flow[..., 1]).max() < 0.05 * WIDTH + rotation


@pytest.mark.parametrize(
    ("name", "held_out", "counts"),
    [
        ("chairs", 4, {"train": 6, "val": 4}),
        (
            "things",
            16,
            {"train-clean": 6, "train-final": 6, "val-clean": 3, "val-final": 3, "test-clean": 13, "test-final": 13},
        ),
        ("sintel", 3, {"training-clean": 6, "training-final": 6, "test-clean": 3, "test-final": 3}),
        ("kitti", 2, {"training": 6, "testing": 2}),
        ("hd1k", 0, {"training": 6}),
    ],
)
def test_the_layout_is_official_and_holds_the_pairs_asked_for(
    tmp_path: Path, name: str, held_out: int, counts: dict[str, int]
) -> None:
    files = written(name, tmp_path, held_out=held_out)
    refs = SOURCES[name](files)
    assert Counter(ref.subset for ref in refs) == counts
    for ref in refs:
        paths = (ref.image0, ref.image1, ref.flow, ref.occlusion, ref.invalid, ref.flow_noc)
        for path in filter(None, paths):
            assert image_size(files.read(path), path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", SOURCES)
def test_written_ground_truth_belongs_to_the_written_frames(tmp_path: Path, name: str) -> None:
    files = written(name, tmp_path)
    for ref in SOURCES[name](files):
        flow, valid = read_flow(files, ref)
        if name in ("kitti", "hd1k"):
            assert 0.2 < valid.mean() < 0.34
        else:
            assert valid.mean() > 0.98
        frame0, frame1 = read_frame(files, ref.image0), read_frame(files, ref.image1)
        flow = np.where(valid[..., None], flow, 0)
        error = np.abs(warp(frame1, flow) - frame0).mean(axis=-1)
        standing = np.abs(frame1.astype(np.float32) - frame0).mean(axis=-1)
        assert np.median(error[valid]) < 2.5
        assert np.median(error[valid]) < 0.5 * np.median(standing[valid])
        if ref.occlusion is not None and ref.invalid is not None:
            occluded = decode_mask(files.read(ref.occlusion), ref.occlusion)
            assert error[occluded].mean() > 5 * error[~occluded & steady(flow)].mean()
            assert 0 < decode_mask(files.read(ref.invalid), ref.invalid).mean() < 0.05
        if ref.flow_noc is not None:
            flow_noc, valid_noc = decode_kitti_flow(files.read(ref.flow_noc), ref.flow_noc)
            assert valid_noc.sum() < valid.sum()
            assert not (valid_noc & ~valid).any()
            np.testing.assert_array_equal(flow_noc[valid_noc], flow[valid_noc])


def test_things_holds_pixels_without_a_finite_flow(tmp_path: Path) -> None:
    files = written("things", tmp_path)
    flows = [decode_pfm(files.read(path), path) for path in files.files if path.endswith(".pfm")]
    assert any(np.isnan(flow).any() for flow in flows)


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path, name: str) -> None:
    np.random.seed(0)  # noqa: NPY002  a global state that must not matter
    first = written(name, tmp_path / "first", pairs=2)
    np.random.seed(1)  # noqa: NPY002
    again = written(name, tmp_path / "again", pairs=2)
    other = written(name, tmp_path / "other", pairs=2, seed=2)
    longer = written(name, tmp_path / "longer", pairs=4)
    assert {path: first.read(path) for path in first.files} == {path: again.read(path) for path in again.files}
    frames = [path for path in first.files if "_img" in path or "image_2" in path or "clean" in path]
    assert all(first.read(path) != other.read(path) for path in frames)
    assert all(first.read(path) == longer.read(path) for path in frames)


def test_scenes_held_out_are_not_those_trained_on(tmp_path: Path) -> None:
    files = written("chairs", tmp_path, held_out=6)
    frames = [files.read(path) for path in files.files if path.endswith(".ppm")]
    assert len(set(frames)) == len(frames) == 24


def test_a_pair_in_memory_is_exact_dense_or_sparse() -> None:
    dense, sparse = synthetic_pair(3, HEIGHT, WIDTH), synthetic_pair(3, HEIGHT, WIDTH, sparse=True)
    assert dense.flow is not None
    assert dense.valid is not None
    assert dense.occluded is not None
    assert sparse.flow is not None
    assert sparse.valid is not None
    assert not dense.sparse
    assert dense.valid.all()
    error = np.abs(warp(dense.image1, dense.flow) - dense.image0).mean(axis=-1)
    assert error[~dense.occluded & steady(dense.flow)].mean() < 1.5
    assert sparse.sparse
    assert not sparse.flow[~sparse.valid].any()
    np.testing.assert_array_equal(sparse.flow[sparse.valid], dense.flow[sparse.valid])


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    for name, pairs, held_out, words in (("kiti", 2, 0, "kiti"), ("things", 3, 0, "even"), ("hd1k", 2, 1, "HD1K")):
        with pytest.raises(ValueError, match=words):
            written(name, tmp_path, pairs=pairs, held_out=held_out)
    assert not list(tmp_path.iterdir())
