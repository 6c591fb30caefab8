"""What goes into a shard comes out to the bit, and is readable by others."""

import io
import json
import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard

from datasets_etl import formats, rowcode
from datasets_etl.errors import DataError
from datasets_etl.etl import EtlResult
from datasets_etl.manifest import Manifest
from datasets_etl.reading import read_sample
from datasets_etl.samples import decode_sample, encode_sample
from datasets_etl.sources import SOURCES, SampleRef, SourceTree
from tests.conftest import ROOT


def tree_of(root: Path) -> SourceTree:
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return SourceTree(str(root), files, lambda name: (root / name).read_bytes())


def as_tar(sample: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer) as writer:
        writer.write(dict(sample))
    return buffer.getvalue()


def dense_tree(flow: np.ndarray, **others: bytes) -> SourceTree:
    height, width = flow.shape[:2]
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    files = {
        "0.ppm": formats.encode_frame_ppm(frame),
        "1.ppm": formats.encode_frame_ppm(frame[::-1].copy()),
        "f.flo": formats.encode_flo(flow),
        **others,
    }
    return SourceTree("raw", sorted(files), files.__getitem__)


REF = SampleRef("chairs", "train", "train_1", "s", "1", "0.ppm", "1.ppm", "f.flo")


def test_frames_and_dense_flow_are_kept_to_the_bit():
    flow = np.random.default_rng(1).normal(0, 30, (12, 20, 2)).astype(np.float32)
    tree = dense_tree(flow)
    encoded, facts = encode_sample(REF, tree)
    sample = decode_sample(as_tar(encoded), "here")
    np.testing.assert_array_equal(sample.flow, flow)
    np.testing.assert_array_equal(sample.image0, formats.decode_frame(tree.read("0.ppm"), "0"))
    np.testing.assert_array_equal(sample.image1, formats.decode_frame(tree.read("1.ppm"), "1"))
    assert sample.valid.all()
    assert (facts.height, facts.width, facts.invalid_pixels) == (12, 20, 0)
    assert (sample.key, sample.dataset, sample.subset, sample.sparse) == ("train_1", "chairs", "train", False)
    assert (sample.scene, sample.frame) == ("s", "1")


def test_flow_that_is_not_finite_or_absurd_is_invalid_and_zero():
    flow = np.ones((4, 5, 2), np.float32)
    flow[0, 0, 0], flow[1, 1, 1], flow[2, 2, 0], flow[3, 3, 1] = np.nan, np.inf, 1000.0, -1e9
    encoded, facts = encode_sample(REF, dense_tree(flow))
    sample = decode_sample(as_tar(encoded), "here")
    assert facts.invalid_pixels == 4
    bad = np.zeros((4, 5), bool)
    bad[[0, 1, 2, 3], [0, 1, 2, 3]] = True
    np.testing.assert_array_equal(sample.valid, ~bad)
    assert (sample.flow[bad] == 0).all()
    assert (sample.flow[~bad] == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1000.0, -1000.0, 1e9, -1e9])
def test_one_absurd_value_alone_is_found(value: float):
    """Most flow has none, and is looked at as a whole first."""
    flow = np.full((4, 5, 2), -999.0, np.float32)
    flow[2, 3, 1] = value
    assert encode_sample(REF, dense_tree(flow))[1].invalid_pixels == 1


def test_sintels_occlusion_is_kept_and_its_invalid_pixels_still_count():
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = True
    tree = dense_tree(np.ones((4, 5, 2), np.float32), occ=formats.encode_mask(mask), inv=formats.encode_mask(mask))
    ref = SampleRef("sintel", "training-clean", "k", "s", "1", "0.ppm", "1.ppm", "f.flo", "occ", "inv")
    encoded, _ = encode_sample(ref, tree)
    sample = decode_sample(as_tar(encoded), "here")
    np.testing.assert_array_equal(sample.occluded, mask)
    assert sample.valid.all()
    np.testing.assert_array_equal(formats.decode_mask(encoded["invalid.png"], "invalid.png"), mask)


def test_kitti_keeps_its_png_and_tells_occlusion_from_the_two_truths(raw_kitti):
    ref = next(ref for ref in SOURCES["kitti"](tree_of(raw_kitti)) if ref.flow)
    flow, valid = formats.decode_kitti_flow((raw_kitti / ref.flow).read_bytes(), ref.flow)
    seen = valid.copy()
    seen[: seen.shape[0] // 2] = False
    files = {name: (raw_kitti / name).read_bytes() for name in (ref.image0, ref.image1, ref.flow)}
    files["noc.png"] = formats.encode_kitti_flow(flow, seen)
    tree = SourceTree("raw", sorted(files), files.__getitem__)
    with_noc = SampleRef(**{**ref.__dict__, "flow_noc": "noc.png"})
    encoded, facts = encode_sample(with_noc, tree)
    sample = decode_sample(as_tar(encoded), "here")
    assert encoded["flow.png"] == files[ref.flow]
    assert sample.sparse
    np.testing.assert_array_equal(sample.flow, flow)
    np.testing.assert_array_equal(sample.valid, valid)
    np.testing.assert_array_equal(sample.occluded, valid & ~seen)
    assert facts.invalid_pixels == (~valid).sum() > 0


def test_frames_and_flow_of_different_size_are_refused_naming_both():
    tree = dense_tree(np.ones((4, 5, 2), np.float32))
    files = {"0.ppm": tree.read("0.ppm"), "1.ppm": tree.read("1.ppm"), "f.flo": formats.encode_flo(np.ones((4, 6, 2)))}
    with pytest.raises(DataError, match=r"0\.ppm is 5x4 but f\.flo is 6x4"):
        encode_sample(REF, SourceTree("raw", sorted(files), files.__getitem__))
    smaller = files | {"1.ppm": formats.encode_frame_ppm(np.zeros((3, 5, 3), np.uint8))}
    with pytest.raises(DataError, match=r"0\.ppm is 5x4 but 1\.ppm is 5x3"):
        encode_sample(REF, SourceTree("raw", sorted(smaller), smaller.__getitem__))
    masked = dense_tree(np.ones((4, 5, 2), np.float32), occ=formats.encode_mask(np.zeros((4, 4), bool)))
    with pytest.raises(DataError, match=r"0\.ppm is 5x4 but occ is 4x4"):
        encode_sample(replace(REF, occlusion="occ"), masked)
    sparse = formats.encode_kitti_flow(np.ones((4, 5, 2), np.float32), np.ones((4, 5), bool))
    other = formats.encode_kitti_flow(np.ones((4, 4, 2), np.float32), np.ones((4, 4), bool))
    kitti = files | {"flow.png": sparse, "noc.png": other}
    with pytest.raises(DataError, match=r"0\.ppm is 5x4 but noc\.png is 4x4"):
        encode_sample(
            replace(REF, dataset="kitti", flow="flow.png", flow_noc="noc.png"),
            SourceTree("raw", sorted(kitti), kitti.__getitem__),
        )


@pytest.mark.parametrize("damage", ["cut", "json", "frame", "flow"])
def test_damage_is_an_error_that_names_the_sample(damage):
    encoded, _ = encode_sample(REF, dense_tree(np.ones((8, 9, 2), np.float32)))
    if damage == "cut":
        data = as_tar(encoded)[:1500]
    else:
        member = {"json": "json", "frame": "frame0.zst", "flow": "flow.zst"}[damage]
        data = as_tar({**encoded, member: b"\x00" + bytes(encoded[member])[1:]})
    with pytest.raises(DataError, match="shard 3, sample 5: damaged"):
        decode_sample(data, "shard 3, sample 5")


def test_stock_tar_and_stock_webdataset_read_a_shard(sharded_chairs: EtlResult, raw_chairs: Path):
    manifest = Manifest.load(sharded_chairs.manifest_url)
    folder = Path(manifest.store().url.removeprefix("file://"))
    keys = []
    for shard in manifest.shards:
        listed = subprocess.run(["tar", "-tf", folder / shard.name], capture_output=True, text=True, check=True)
        assert len(listed.stdout.split()) == 4 * len(shard.samples)
        for sample in webdataset.WebDataset(str(folder / shard.name), shardshuffle=False, empty_check=False):
            described = json.loads(sample["json"])
            frame = rowcode.decode_frame(sample["frame0.zst"], (described["height"], described["width"]))
            raw = formats.decode_frame((raw_chairs / described["image0"]).read_bytes(), "")
            np.testing.assert_array_equal(frame, raw)
            assert described["key"] == sample["__key__"]
            keys.append(sample["__key__"])
    assert keys == [sample.key for sample in manifest.samples]


def test_a_sample_tells_where_it_comes_from(sharded_chairs: EtlResult, raw_chairs: Path):
    manifest = Manifest.load(sharded_chairs.manifest_url)
    shard, entry = manifest.place(0)
    data = manifest.store().read_range(shard.name, entry.offset, entry.length)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        described = json.load(tar.extractfile(f"{entry.key}.json"))
    assert set(described["sha256"]) == {described["image0"], described["image1"], described["flow"]}
    assert all((raw_chairs / name).exists() for name in described["sha256"])


def test_real_samples_survive_to_the_bit(samples: Path):
    root = samples / "Sintel"
    tree = tree_of(root)
    ref = next(ref for ref in SOURCES["sintel"](tree) if ref.subset == "training-final")
    sample = decode_sample(as_tar(encode_sample(ref, tree)[0]), "here")
    np.testing.assert_array_equal(sample.flow, formats.decode_flo(tree.read(ref.flow), ref.flow))
    np.testing.assert_array_equal(sample.image1, formats.decode_frame(tree.read(ref.image1), ref.image1))
    np.testing.assert_array_equal(sample.occluded, formats.decode_mask(tree.read(ref.occlusion), ref.occlusion))


def test_reading_by_number_gives_the_raw_pair(sharded_chairs: EtlResult, raw_chairs: Path):
    manifest = Manifest.load(sharded_chairs.manifest_url)
    refs = SOURCES["chairs"](tree_of(raw_chairs))
    assert [sample.key for sample in manifest.samples] == [ref.key for ref in refs]
    for number, ref in enumerate(refs):
        sample = read_sample(manifest, number)
        np.testing.assert_array_equal(sample.flow, formats.decode_flo((raw_chairs / ref.flow).read_bytes(), ref.flow))


def awkward(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """All bit patterns are possible: NaN with payloads, infinities, signed zeros, denormals."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 4), (33, 65)])
def test_the_row_code_keeps_every_bit_of_any_array(shape):
    frame, flow = awkward((*shape, 3), "u1"), awkward((*shape, 2), "<f4")
    assert np.array_equal(rowcode.decode_frame(rowcode.encode_frame(frame), shape), frame)
    decoded = rowcode.decode_flow(rowcode.encode_flow(flow), shape)
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == flow.tobytes()


def test_the_row_code_takes_views():
    frame, flow = awkward((9, 8, 3), "u1"), awkward((9, 8, 2), "<f4")
    code = rowcode.encode_frame(frame[1::2, ::-1])
    assert np.array_equal(rowcode.decode_frame(code, (4, 8)), frame[1::2, ::-1])
    code = rowcode.encode_flow(flow[::-1, 2:5])
    assert rowcode.decode_flow(code, (9, 3)).tobytes() == flow[::-1, 2:5].tobytes()


def test_the_row_code_reads_as_the_documentation_says():
    frame, flow = awkward((9, 8, 3), "u1"), awkward((9, 8, 2), "<f4")
    text = (ROOT / "docs/data.md").read_text()
    read_frame, read_flow = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {"np": np, "zstandard": zstandard, "height": 9, "width": 8}
    exec(read_frame, names | {"data": rowcode.encode_frame(frame)}, found := {})
    assert np.array_equal(found["frame"], frame)
    exec(read_flow, names | {"data": rowcode.encode_flow(flow)}, found)
    assert found["flow"].tobytes() == flow.tobytes()


@pytest.mark.parametrize("data", [b"", b"nothing", rowcode.encode_frame(awkward((4, 5, 3), "u1"))[:-3]])
def test_the_row_code_refuses_what_it_did_not_write(data):
    with pytest.raises(ValueError):  # noqa: PT011
        rowcode.decode_frame(data, (4, 5))
    with pytest.raises(ValueError):  # noqa: PT011
        rowcode.decode_flow(data, (4, 5))


@pytest.mark.parametrize("shape", [(4, 4), (5, 5), (2000, 2000)])
def test_the_row_code_refuses_another_size(shape):
    with pytest.raises(ValueError):  # noqa: PT011
        rowcode.decode_frame(rowcode.encode_frame(awkward((4, 5, 3), "u1")), shape)


def test_real_frames_and_flow_are_well_under_their_raw_size(samples: Path):
    root = samples / "Sintel/training"
    frame = formats.decode_frame((root / "final/market_5/frame_0002.png").read_bytes(), "")
    flow = formats.decode_flo((root / "flow/market_5/frame_0002.flo").read_bytes(), "")
    assert len(rowcode.encode_frame(frame)) < 0.5 * frame.nbytes
    assert len(rowcode.encode_flow(flow)) < 0.5 * flow.nbytes


def test_the_occlusion_mask_is_left_out_where_it_is_not_wanted():
    mask = formats.encode_mask(np.eye(4, 5, dtype=bool))
    tree = dense_tree(np.ones((4, 5, 2), np.float32), occ=mask)
    ref = SampleRef("sintel", "training-clean", "k", "s", "1", "0.ppm", "1.ppm", "f.flo", "occ")
    data = as_tar(encode_sample(ref, tree)[0])
    assert decode_sample(data, "here").occluded.sum() == 4
    assert decode_sample(data, "here", occlusion=False).occluded is None


def test_a_sample_of_another_schema_is_refused():
    encoded, _ = encode_sample(REF, dense_tree(np.ones((4, 5, 2), np.float32)))
    encoded["json"] = json.dumps({**json.loads(encoded["json"]), "schema": 99}).encode()
    with pytest.raises(DataError, match="schema 99"):
        decode_sample(as_tar(encoded), "here")


def test_a_sample_without_a_member_is_damaged():
    encoded, _ = encode_sample(REF, dense_tree(np.ones((4, 5, 2), np.float32)))
    del encoded["frame1.zst"]
    with pytest.raises(DataError, match="here: damaged sample"):
        decode_sample(as_tar(encoded), "here")
