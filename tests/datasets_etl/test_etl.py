"""Raw dataset → shards and manifest: the same bytes however it is run, and nothing half done to be seen."""

import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from datasets_etl import etl, formats, shards
from datasets_etl.errors import DamagedError, DataError, NotFoundError
from datasets_etl.etl import EtlResult, ShardTask, run_etl, run_tasks
from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.file_store import FileStore
from datasets_etl.inspection import MOTION_EDGES, Damage, _problems, motion_histogram, spread, verify_manifest
from datasets_etl.manifest import FORMAT_VERSION, Manifest, build
from datasets_etl.shards import plan_shards, write_shard
from datasets_etl.sources import SOURCES, SampleRef, SourceTree
from datasets_etl.storage import open_store
from datasets_etl.synthetic import synthetic_pair, write_dataset
from tests.waiting import WAIT_SECONDS

pytestmark = pytest.mark.usefixtures("local_ray")


def shards_of(url: str) -> dict[str, bytes]:
    manifest = Manifest.load(url)
    return {shard.name: manifest.store().read(shard.name) for shard in manifest.shards}


def test_any_number_of_workers_and_any_place_give_the_same_bytes(sharded_chairs, raw_chairs, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(raw_chairs, copy)
    again = run_etl("chairs", copy.as_uri(), str(tmp_path / "out"), workers=1, shard_bytes=100_000)
    assert Path(again.manifest_url).name == Path(sharded_chairs.manifest_url).name
    assert shards_of(again.manifest_url) == shards_of(sharded_chairs.manifest_url)
    assert again.shards == 3
    assert again.subsets == {"train": 6, "val": 2}


GROWING = """
import threading, time
import ray
from ray.cluster_utils import Cluster
from datasets_etl.etl import run_tasks

def work(number):
    began = time.monotonic()
    time.sleep(2)
    return began, time.monotonic()

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
spans = []
tasks = range(9)
running = threading.Thread(target=lambda: spans.extend(span for _, span in run_tasks(work, tasks, None)), daemon=True)
running.start()
time.sleep(1)
cluster.add_node(num_cpus=3)
running.join()
print("at once", max(sum(start <= moment < end for start, end in spans) for moment, _ in spans))
"""


@pytest.mark.slow
def test_a_cluster_that_begins_empty_is_filled_once_it_has_grown():
    """As under an autoscaler, which adds machines for tasks that wait."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", GROWING], env=clean, capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert done.stdout.splitlines()[-1:] == ["at once 3"], done.stderr


def test_s3_holds_the_same_bytes_as_a_folder(sharded_chairs, raw_chairs, tmp_path, s3):
    target = f"s3://data/{tmp_path.name}"
    result = run_etl("chairs", str(raw_chairs), target, shard_bytes=100_000)
    assert result.manifest_url.startswith(f"{target}/chairs/manifest-")
    assert shards_of(result.manifest_url) == shards_of(sharded_chairs.manifest_url)
    from_s3 = EvaluationSet(Manifest.load(result.manifest_url), "val")
    assert [from_s3[i].key for i in range(2)] == ["val_00007", "val_00008"]


def test_a_source_on_s3_gives_the_same_manifest(sharded_chairs, raw_chairs, tmp_path, s3):
    store = open_store(f"s3://data/{tmp_path.name}/raw")
    for path in raw_chairs.rglob("*"):
        if path.is_file():
            store.upload(path, path.relative_to(raw_chairs).as_posix())
    result = run_etl("chairs", store.url, str(tmp_path), shard_bytes=100_000)
    assert Path(result.manifest_url).name == Path(sharded_chairs.manifest_url).name


def test_a_second_run_writes_only_what_is_missing(raw_chairs, tmp_path):
    first = run_etl("chairs", str(raw_chairs), str(tmp_path), shard_bytes=100_000)
    folder = tmp_path / "chairs"
    lost = sorted((folder / "shards").iterdir())[1]
    content = lost.read_bytes()
    lost.unlink()
    Path(first.manifest_url.removeprefix("file://")).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "shards").iterdir()}
    second = run_etl("chairs", str(raw_chairs), str(tmp_path), shard_bytes=100_000)
    assert second.manifest_url == first.manifest_url
    assert (first.reused, second.reused) == (0, 2)
    assert lost.read_bytes() == content
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_changed_raw_file_is_noticed(raw_chairs, tmp_path):
    source = tmp_path / "raw"
    shutil.copytree(raw_chairs, source)
    first = run_etl("chairs", str(source), str(tmp_path), shard_bytes=100_000)
    flow = next(source.rglob("*_flow.flo"))
    data = bytearray(flow.read_bytes())
    data[20] ^= 1
    flow.write_bytes(bytes(data))
    second = run_etl("chairs", str(source), str(tmp_path), shard_bytes=100_000)
    assert second.manifest_url != first.manifest_url
    assert second.reused == 2
    for version in (first, second):  # the old one is still whole
        assert verify_manifest(Manifest.load(version.manifest_url)) == []


@pytest.fixture
def damaged_chairs(raw_chairs: Path, tmp_path: Path) -> Path:
    """Pair 2 has a truncated flow, pair 8 an empty frame."""
    source = tmp_path / "raw"
    shutil.copytree(raw_chairs, source)
    truncated = source / "data/00002_flow.flo"
    truncated.write_bytes(truncated.read_bytes()[:-5])
    (source / "data/00008_img2.ppm").write_bytes(b"")
    return source


REASONS = {
    "train_00002": "data/00002_flow.flo is truncated: 24583 of 24588 bytes: copy or download the file again",
    "val_00008": "data/00008_img2.ppm is empty: copy or download the file again",
}


def test_damaged_pairs_are_left_out_and_the_manifest_says_why(damaged_chairs, tmp_path):
    result = run_etl("chairs", str(damaged_chairs), str(tmp_path / "out"), shard_bytes=100_000)
    assert result.quarantined == REASONS
    assert result.subsets == {"train": 5, "val": 1}
    manifest = Manifest.load(result.manifest_url)
    assert manifest.quarantined == REASONS
    assert [sample.key for sample in manifest.samples] == [f"train_0000{n}" for n in (1, 3, 4, 5, 6)] + ["val_00007"]
    assert verify_manifest(manifest) == []


@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_what_is_left_out_does_not_depend_on_workers_place_or_an_earlier_run(damaged_chairs, tmp_path, shard_bytes):
    first = run_etl("chairs", str(damaged_chairs), str(tmp_path / "1"), workers=2, shard_bytes=shard_bytes)
    again = run_etl("chairs", str(damaged_chairs), str(tmp_path / "1"), shard_bytes=shard_bytes)
    moved = tmp_path / "moved"
    shutil.copytree(damaged_chairs, moved)
    other = run_etl("chairs", moved.as_uri(), str(tmp_path / "2"), workers=1, shard_bytes=shard_bytes)
    assert first.manifest_url == again.manifest_url
    assert Path(other.manifest_url).name == Path(first.manifest_url).name
    assert again.quarantined == first.quarantined == REASONS
    assert again.reused == again.shards == first.shards


def test_a_mended_file_comes_in_again(damaged_chairs, raw_chairs, tmp_path):
    run_etl("chairs", str(damaged_chairs), str(tmp_path / "out"), shard_bytes=100_000)
    shutil.copytree(raw_chairs, damaged_chairs, dirs_exist_ok=True)
    result = run_etl("chairs", str(damaged_chairs), str(tmp_path / "out"), shard_bytes=100_000)
    assert not result.quarantined
    assert result.subsets == {"train": 6, "val": 2}


def test_mending_a_broken_header_writes_its_shard_only(sharded_chairs, raw_chairs, tmp_path):
    source = tmp_path / "raw"
    shutil.copytree(raw_chairs, source)
    (source / "data/00002_img1.ppm").write_bytes(b"P6 broken")
    run_etl("chairs", str(source), str(tmp_path), shard_bytes=100_000)
    shutil.copy(raw_chairs / "data/00002_img1.ppm", source / "data")
    mended = run_etl("chairs", str(source), str(tmp_path), shard_bytes=100_000)
    assert (mended.shards, mended.reused) == (3, 2)
    assert Path(mended.manifest_url).name == Path(sharded_chairs.manifest_url).name


def test_records_that_are_empty_or_not_ours_are_written_again(raw_chairs, tmp_path):
    first = run_etl("chairs", str(raw_chairs), str(tmp_path), shard_bytes=100_000)
    records = sorted((tmp_path / "chairs/records").iterdir())
    for record, content in zip(records, (b"", b"null", b'{"shard": {}, "quarantined": {}}'), strict=True):
        record.write_bytes(content)
    second = run_etl("chairs", str(raw_chairs), str(tmp_path), shard_bytes=100_000)
    assert (second.manifest_url, second.reused) == (first.manifest_url, 0)


def test_what_a_killed_run_left_goes_and_what_another_one_writes_stays(raw_chairs, tmp_path):
    shards = tmp_path / "chairs/shards"
    shards.mkdir(parents=True)
    names = (".chairs-00000-0123456789abcdef.tar.k1ll3d.part", ".chairs-00001-0123456789abcdef.tar.wr1t35.part")
    left, written = (shards / name for name in names)
    for path in (left, written):
        path.write_bytes(b"x")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (two_days_ago, two_days_ago))
    run_etl("chairs", str(raw_chairs), str(tmp_path), shard_bytes=100_000)
    assert [path.name for path in shards.glob(".*")] == [written.name]


KILLED = """
import sys, time
from datasets_etl.shards import plan_shards, write_shard
from datasets_etl.sources import SOURCES, SourceTree
from datasets_etl.storage import open_store

source, target = sys.argv[1:]
store = open_store(source)
files = [info.key for info in store.walk()]

def read(path):
    if "00004" in path:
        print("half written", flush=True)
        time.sleep(900)
    return store.read(path)

refs = SOURCES["chairs"](SourceTree(source, files, store.read))
(plan,) = plan_shards(refs, {ref.key: 1 for ref in refs}, dict.fromkeys(files, ""), 2**30)
write_shard(plan, SourceTree(source, files, read), open_store(target))
"""


def test_a_worker_killed_while_it_writes_a_shard_leaves_nothing_in_the_temporary_folder(raw_chairs, tmp_path):
    place = tmp_path / "tmp"
    place.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(raw_chairs), str(tmp_path / "out")],
        env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "half written\n"
        worker.kill()
    assert list(place.iterdir()) == []


def test_a_strict_run_stops_at_a_damaged_file_without_a_manifest(damaged_chairs, raw_chairs, tmp_path):
    shutil.copy(raw_chairs / "data/00008_img2.ppm", damaged_chairs / "data")
    with pytest.raises(DataError, match=r"raw: shard 0: data/00002_flow\.flo is truncated"):
        run_etl("chairs", str(damaged_chairs), str(tmp_path / "out"), shard_bytes=100_000, strict=True)
    assert not list((tmp_path / "out").rglob("manifest-*"))
    assert not list((tmp_path / "out").rglob("*.part"))
    assert not list((tmp_path / "out").rglob("*-00000-*"))


def test_a_strict_run_does_not_take_over_what_a_tolerant_one_left_out(damaged_chairs, tmp_path):
    for path in damaged_chairs.glob("data/00008_*"):
        path.unlink()
    tolerant = run_etl("chairs", str(damaged_chairs), str(tmp_path / "out"), shard_bytes=100_000)
    assert set(tolerant.quarantined) == {"train_00002"}
    with pytest.raises(DataError, match=r"train_00002: data/00002_flow\.flo is truncated"):
        run_etl("chairs", str(damaged_chairs), str(tmp_path / "out"), shard_bytes=100_000, strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_a_size_mismatch_is_an_error_before_anything_is_written(raw_chairs, tmp_path, strict):
    source = tmp_path / "raw"
    shutil.copytree(raw_chairs, source)
    smaller = source / "data/00004_flow.flo"
    smaller.write_bytes(formats.encode_flo(formats.decode_flo(smaller.read_bytes(), "")[:-8]))
    with pytest.raises(DataError, match=r"raw: data/00004_img1\.ppm is 64x48 but data/00004_flow\.flo is 64x40"):
        run_etl("chairs", str(source), str(tmp_path / "out"), shard_bytes=100_000, strict=strict)
    assert not (tmp_path / "out").exists()


def test_a_mask_of_another_size_is_an_error_before_anything_is_written(raw_kitti, tmp_path):
    source = tmp_path / "raw"
    shutil.copytree(raw_kitti, source)
    smaller = source / "training/flow_noc/000001_10.png"
    flow, valid = formats.decode_kitti_flow(smaller.read_bytes(), "")
    smaller.write_bytes(formats.encode_kitti_flow(flow[:-8], valid[:-8]))
    with pytest.raises(DataError, match=r"raw: training/image_2/000001_10\.png is .* but training/flow_noc/000001_10"):
        run_etl("kitti", str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_shards_that_only_the_node_which_wrote_them_can_see_are_not_published(raw_chairs, tmp_path, monkeypatch):
    """A folder of each node's own as --target: training elsewhere would miss them."""

    def lose_shards(work, tasks, at_once):
        for task, shard in run_tasks(work, tasks, at_once):
            (tmp_path / "chairs" / shard.entry.name).unlink()
            yield task, shard

    monkeypatch.setattr(etl, "run_tasks", lose_shards)
    with pytest.raises(
        DataError, match=r"chairs/shards/chairs-00000-\w+\.tar: written by another node, .*all nodes share"
    ):
        run_etl("chairs", str(raw_chairs), str(tmp_path))
    assert not list(tmp_path.rglob("manifest-*"))


def test_a_source_that_only_the_drivers_node_has_is_said_with_the_node(raw_chairs, tmp_path, monkeypatch):
    source = tmp_path / "raw"
    shutil.copytree(raw_chairs, source)

    def lose_source(work, tasks, at_once):
        shutil.rmtree(source)
        return run_tasks(work, tasks, at_once)

    monkeypatch.setattr(etl, "run_tasks", lose_source)
    with pytest.raises(DataError, match=rf"raw: no such folder on node {socket.gethostname()}: --source .* all nodes"):
        run_etl("chairs", str(source), str(tmp_path))


def test_damage_that_storage_tells_of_is_named_by_its_place_in_the_dataset(raw_chairs, tmp_path, monkeypatch):
    """Else the manifest would be another one for every place."""
    store = open_store(str(raw_chairs))
    objects = {info.key: info for info in store.walk()}
    refs = SOURCES["chairs"](SourceTree(str(raw_chairs), tuple(objects), store.read))
    (plan,) = plan_shards(refs, {ref.key: 1 for ref in refs}, dict.fromkeys(objects, ""), 2**30)
    read = FileStore.read

    def checked(self, key, size=None):
        if key == "data/00002_img1.ppm":
            raise DamagedError(f"{self.url}/{key}: damaged: its checksum is not the one stored with it")
        return read(self, key, size)

    monkeypatch.setattr(FileStore, "read", checked)
    sizes = {path: info.size for path, info in objects.items()}
    shard = etl._write_task(ShardTask(plan, str(raw_chairs), str(tmp_path), sizes, strict=False))
    reason = "data/00002_img1.ppm: damaged: its checksum is not the one stored with it"
    assert shard.quarantined == {"train_00002": reason}


def test_a_temporary_folder_that_is_full_is_said_in_a_line(raw_chairs, small_disk, tmp_path, monkeypatch):
    disk = small_disk(1)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    (disk / "filler").write_bytes(bytes(990_000))
    store = open_store(str(raw_chairs))
    files = [info.key for info in store.walk()]
    tree = SourceTree(str(raw_chairs), files, store.read)
    refs = SOURCES["chairs"](tree)
    (plan,) = plan_shards(refs, {ref.key: 1 for ref in refs}, dict.fromkeys(files, ""), 2**30)
    with pytest.raises(DataError, match=r"No space left on device; .* set TMPDIR .* --shard-mib"):
        write_shard(plan, tree, open_store(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["size", "content"])
def test_a_subset_with_nothing_but_damaged_pairs_is_an_error(raw_chairs, tmp_path, damage):
    source = tmp_path / "raw"
    shutil.copytree(raw_chairs, source)
    for number in (7, 8):
        flow = source / f"data/0000{number}_flow.flo"
        flow.write_bytes(b"PIEH" if damage == "size" else flow.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"every pair of val is damaged, the first: data/00007_flow\.flo is truncated"):
        run_etl("chairs", str(source), str(tmp_path / "out"), shard_bytes=10**9)
    assert not list((tmp_path / "out").rglob("manifest-*"))


def test_of_a_dataset_with_nothing_but_damaged_pairs_nothing_is_written(raw_kitti, tmp_path):
    source = tmp_path / "raw"
    shutil.copytree(raw_kitti, source)
    shutil.rmtree(source / "testing")
    for path in (source / "training/flow_occ").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="every pair of training is damaged"):
        run_etl("kitti", str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_storage_out_of_reach_quarantines_nothing(raw_chairs, tmp_path, monkeypatch):
    source = tmp_path / "raw"
    shutil.copytree(raw_chairs, source)

    def unreachable(self, key, offset, length):
        raise DataError(f"{key}: is the object store up?")

    monkeypatch.setattr(FileStore, "read_range", unreachable)
    with pytest.raises(DataError, match="is the object store up"):
        run_etl("chairs", str(source), str(tmp_path / "out"))


class TestVerify:
    @pytest.fixture
    def copy(self, sharded_chairs: EtlResult, tmp_path: Path) -> Manifest:
        source = Path(sharded_chairs.manifest_url.removeprefix("file://"))
        shutil.copytree(source.parent, tmp_path / "chairs")
        return Manifest.load(str(tmp_path / "chairs" / source.name))

    def test_a_whole_dataset_has_no_damage(self, copy):
        assert verify_manifest(copy) == []

    def test_a_flipped_byte_names_shard_and_sample(self, copy, tmp_path):
        shard, entry = copy.place(4)
        path = tmp_path / "chairs" / shard.name
        data = bytearray(path.read_bytes())
        data[entry.offset + 700] ^= 1
        path.write_bytes(bytes(data))
        assert verify_manifest(copy) == [
            Damage(shard.name, "its SHA-256 is not the manifest's"),
            Damage(shard.name, f"sample {entry.key}: damaged, its checksum differs"),
        ]

    def test_a_flipped_byte_behind_the_samples_is_found(self, copy, tmp_path):
        shard = copy.shards[0]
        path = tmp_path / "chairs" / shard.name
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert verify_manifest(copy) == [Damage(shard.name, "its SHA-256 is not the manifest's")]

    def test_a_shard_is_never_in_memory_as_a_whole(self, copy, monkeypatch):
        shard = copy.shards[0]
        largest = max(entry.length for entry in shard.samples)
        assert largest < shard.bytes / 2
        monkeypatch.setattr(FileStore, "read", lambda *_: pytest.fail("read whole"))
        lengths = []
        read_range = FileStore.read_range
        monkeypatch.setattr(
            FileStore, "read_range", lambda self, *where: lengths.append(where[2]) or read_range(self, *where)
        )
        assert _problems(copy.store(), shard, shard.bytes) == []
        assert sum(lengths) == shard.bytes, "and no byte is read twice"
        assert max(lengths) <= max(largest, 2**22)

    def test_a_truncated_and_a_missing_shard_are_named(self, copy, tmp_path):
        first, second = (tmp_path / "chairs" / shard.name for shard in copy.shards[:2])
        first.write_bytes(first.read_bytes()[:-12_000])
        second.unlink()
        damages = verify_manifest(copy)
        assert {damage.shard for damage in damages} == {copy.shards[0].name, copy.shards[1].name}
        assert damages[0].problem == f"{copy.shards[0].bytes - 12_000} bytes instead of {copy.shards[0].bytes}"
        assert damages[-1].problem == "it is not there"

    def test_storage_that_cannot_be_read_is_no_damage(self, copy, tmp_path):
        """Else whoever follows the advice deletes sound shards."""
        path = tmp_path / "chairs" / copy.shards[1].name
        path.unlink()
        path.mkdir()
        with pytest.raises(DataError, match=rf"{copy.shards[1].name}: Is a directory"):
            verify_manifest(copy)

    def test_a_sample_that_is_not_what_the_manifest_says_is_found(self, copy):
        shard = copy.shards[0]
        wrong = dataclasses.replace(shard.samples[0], invalid_pixels=7)
        lying = dataclasses.replace(
            copy, shards=(dataclasses.replace(shard, samples=(wrong, *shard.samples[1:])), *copy.shards[1:])
        )
        assert [damage.shard for damage in verify_manifest(lying)] == [shard.name]


def test_motion_is_counted_over_valid_pixels_by_length():
    flow = np.zeros((2, 4, 2), np.float32)
    flow[0] = [[0.5, 0], [3, 4], [0, 200], [1, 0]]
    valid = np.ones((2, 4), bool)
    valid[1] = False
    pair = synthetic_pair(1, 16, 16)
    counted = motion_histogram([dataclasses.replace(pair, flow=flow, valid=valid)])
    assert dict(zip(MOTION_EDGES, counted.tolist(), strict=True)) == {
        **dict.fromkeys(MOTION_EDGES, 0),
        0.0: 1,
        1.0: 1,
        5.0: 1,
        160.0: 1,
    }


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))])
def test_samples_are_spread_evenly(count, chosen):
    assert spread(range(10), count) == chosen


@pytest.mark.parametrize("content", ["missing", "empty", "other"])
def test_a_source_without_the_dataset_is_one_clear_error(content, tmp_path):
    source = tmp_path / "source"
    if content != "missing":
        source.mkdir()
    if content == "other":
        (source / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=str(source)) as caught:
        run_etl("sintel", str(source), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_was_tampered_with_is_refused(sharded_chairs: EtlResult, tmp_path):
    source = Path(sharded_chairs.manifest_url.removeprefix("file://"))
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes().replace(b'"train"', b'"trein"', 1))
    with pytest.raises(DataError, match="damaged"):
        Manifest.load(str(copy))


def test_a_missing_manifest_says_how_to_get_one(tmp_path):
    with pytest.raises(NotFoundError, match=r"no manifest: .*nothing\.json.*pipelines/etl\.py"):
        Manifest.load(str(tmp_path / "nothing.json"))
    with pytest.raises(NotFoundError, match=r"no manifest: .*: a folder, no file; pipelines/etl\.py"):
        Manifest.load(str(tmp_path))


@pytest.mark.usefixtures("local_ray")
def test_a_bucket_that_is_missing_is_said_before_the_source_is_read(raw_chairs: Path, s3, monkeypatch):
    """Listing a large dataset takes minutes, and encoding its first shard, too."""
    monkeypatch.setattr(etl, "_open_source", lambda source: pytest.fail("read"))
    with pytest.raises(DataError, match="no bucket nothing-here; create it"):
        run_etl("chairs", str(raw_chairs), "s3://nothing-here/flow")
    with pytest.raises(DataError) as caught:
        Manifest.load("s3://nothing-here/manifest.json")
    assert "no bucket nothing-here" in str(caught.value)
    assert "etl.py" not in str(caught.value), "which prints the URLs of manifests, not the names of buckets"


def test_a_missing_subset_names_those_there_are(sharded_chairs: EtlResult):
    with pytest.raises(DataError, match="no subset 'trian'; it has train, val"):
        Manifest.load(sharded_chairs.manifest_url).select("trian")


def test_patterns_choose_among_the_samples_of_a_subset(local_ray, tmp_path):
    write_dataset("sintel", tmp_path / "raw", pairs=6, height=48, width=64, seed=1)
    manifest = Manifest.load(run_etl("sintel", str(tmp_path / "raw"), str(tmp_path / "shards")).manifest_url)

    def chosen(**patterns: list[str]) -> list[str]:
        return [manifest.samples[n].name for n in manifest.select("training-final", **patterns)]

    every = chosen()
    assert every == [f"scene_000{scene}_frame_000{frame}" for scene in range(3) for frame in (1, 2)]
    first = every[:2]
    assert chosen(only=["scene_0000*"]) == first
    assert chosen(only=["*_frame_0001"]) == every[::2]
    assert chosen(without=["scene_0000*"]) == [name for name in every if name not in first]
    assert chosen(only=["*_frame_0001", "scene_0000*"], without=["*_frame_0001"]) == first[1:]
    with pytest.raises(DataError, match=r"no sample of training-final matches 'alley\*'; names are such as scene_0000"):
        chosen(without=["alley*"])
    with pytest.raises(DataError, match="leaves no sample of training-final"):
        chosen(without=["*"])


def test_every_source_goes_through(samples, format_samples, tmp_path):
    roots = {
        "chairs": samples / "FlyingChairs_release",
        "sintel": samples / "Sintel",
        "kitti": samples / "KITTI",
        "things": format_samples / "FlyingThings3D",
        "hd1k": format_samples / "HD1K",
    }
    found = {name: run_etl(name, str(root), str(tmp_path)).subsets for name, root in roots.items()}
    assert found == {
        "chairs": {"train": 4, "val": 2},
        "sintel": {"training-clean": 2, "training-final": 2},
        "kitti": {"training": 1},
        "things": {"train-clean": 2, "train-final": 2},
        "hd1k": {"training": 1},
    }


def test_a_shard_that_was_cut_short_is_written_again(raw_chairs, tmp_path):
    first = run_etl("chairs", str(raw_chairs), str(tmp_path), shard_bytes=100_000)
    cut = sorted((tmp_path / "chairs" / "shards").iterdir())[1]
    cut.write_bytes(cut.read_bytes()[:-1024])
    second = run_etl("chairs", str(raw_chairs), str(tmp_path), shard_bytes=100_000)
    assert (second.manifest_url, second.reused) == (first.manifest_url, 2)
    assert verify_manifest(Manifest.load(second.manifest_url)) == []


@pytest.mark.parametrize(
    ("shard_bytes", "shards"),
    [(1, ["a", "b", "c", "d"]), (420, ["ab", "cd"]), (421, ["abc", "d"]), (490, ["abc", "d"]), (491, ["abcd"])],
)
def test_a_shard_takes_samples_until_it_has_so_many_bytes_of_pixels_and_flow(shard_bytes, shards):
    """14 for a pixel: two colours and a flow of two floats. Frames of KITTI are of several sizes."""
    refs = [SampleRef("kitti", "training", key, "s", "1", "0", "1", "flow") for key in "abcd"]
    pixels = {"a": 10, "b": 20, "c": 5, "d": 100}
    plans = plan_shards(refs, pixels, dict.fromkeys(("0", "1", "flow"), ""), shard_bytes)
    assert ["".join(ref.key for ref in plan.refs) for plan in plans] == shards
    assert [plan.index for plan in plans] == list(range(len(shards)))


def test_a_plan_is_another_one_where_any_of_its_raw_files_or_the_format_is(monkeypatch):
    ref = SampleRef("sintel", "training-clean", "k", "s", "1", "0", "1", "flow", "occlusion", "invalid", "noc")
    names = ("0", "1", "flow", "occlusion", "invalid", "noc")

    def fingerprint(changed: str = "") -> str:
        stamps = {name: "changed" if name == changed else "" for name in names}
        return plan_shards([ref], {"k": 1}, stamps, 1)[0].fingerprint

    found = [fingerprint(), *map(fingerprint, names)]
    for version in ("FORMAT_VERSION", "SCHEMA_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(shards, version, 99)
            found.append(fingerprint())
    assert len(set(found)) == len(found)
    assert fingerprint() == found[0]


def test_a_strict_run_stops_at_a_file_that_tells_no_size_before_anything_is_written(
    damaged_chairs,
    raw_chairs,
    tmp_path,
):
    shutil.copy(raw_chairs / "data/00002_flow.flo", damaged_chairs / "data")
    with pytest.raises(DataError, match=r"raw: val_00008: data/00008_img2\.ppm is empty: .*without --strict"):
        run_etl("chairs", str(damaged_chairs), str(tmp_path / "out"), strict=True)
    assert not (tmp_path / "out").exists()


def test_a_run_tells_what_went_in_what_came_out_and_how_far_it_is(damaged_chairs, raw_kitti, tmp_path):
    told: list[tuple[int, int]] = []
    kitti = run_etl("kitti", str(raw_kitti), str(tmp_path), on_progress=lambda *progress: told.append(progress))
    assert told == [(0, 4), (4, 4)]
    manifest = Manifest.load(kitti.manifest_url)
    assert kitti.invalid_pixels == sum(sample.invalid_pixels or 0 for sample in manifest.samples) > 0
    assert kitti.stored_bytes == sum(path.stat().st_size for path in (tmp_path / "kitti/shards").iterdir())
    chairs = run_etl("chairs", str(damaged_chairs), str(tmp_path), shard_bytes=100_000)
    sound = [path for path in (damaged_chairs / "data").iterdir() if path.name[:5] not in ("00002", "00008")]
    assert chairs.raw_bytes == sum(path.stat().st_size for path in sound)


def _span(number: int) -> tuple[float, float]:
    began = time.monotonic()
    time.sleep(0.3)
    return began, time.monotonic()


def test_no_more_tasks_run_at_a_time_than_are_allowed():
    spans = sorted(span for _, span in run_tasks(_span, range(4), 1))
    assert all(end <= began for (_, end), (began, _) in itertools.pairwise(spans))


def _fail_or_finish(path: Path | None) -> DataError | None:
    if path is None:
        return DataError("the source is gone")
    time.sleep(1)
    path.write_text("whole")
    return None


def test_tasks_that_run_when_another_fails_are_finished_not_torn(tmp_path):
    """What they write is whole then, and need not be written again."""
    paths = [tmp_path / "first", None, *(tmp_path / f"later {number}" for number in range(40))]
    with pytest.raises(DataError, match="the source is gone"):
        list(run_tasks(_fail_or_finish, paths, 2))
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written["first"] == "whole"
    assert set(written.values()) == {"whole"}
    assert len(written) < 40, "no more were begun"


def _die_once(marker: Path) -> str:
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return "done"


def test_a_task_whose_worker_was_killed_is_done_again(tmp_path):
    """As by the machine's memory monitor, or with a spot machine."""
    assert [result for _, result in run_tasks(_die_once, [tmp_path / "died"], None)] == ["done"]


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_a_manifest_of_another_format_is_refused_saying_which(version, sharded_chairs, tmp_path):
    content = json.loads(Path(sharded_chairs.manifest_url.removeprefix("file://")).read_bytes())
    other = tmp_path / "manifest.json"
    other.write_text(json.dumps({**content, "format": version}))
    with pytest.raises(DataError, match=rf"manifest format {version}, this version reads {FORMAT_VERSION}"):
        Manifest.load(str(other))


def test_two_samples_of_one_key_make_no_manifest(sharded_chairs):
    manifest = Manifest.load(sharded_chairs.manifest_url)
    with pytest.raises(ValueError, match="not unique"):
        build("chairs", [*manifest.shards, manifest.shards[0]], {})


@pytest.mark.parametrize(
    "text",
    ["", "PK", "{}", "[]", "null", '{"format": 2, "dataset": "kitti", "quarantined": {}, "shards": [{"samples": []}]}'],
)
def test_what_is_no_manifest_is_refused(text, tmp_path):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(DataError, match="not a manifest"):
        Manifest.load(str(tmp_path / "m.json"))


def test_a_manifests_url_is_absolute(sharded_chairs: EtlResult, monkeypatch):
    """Workers, which have folders of their own, get it from the driver."""
    path = Path(sharded_chairs.manifest_url.removeprefix("file://"))
    monkeypatch.chdir(path.parent)
    assert Manifest.load(path.name).url == path.as_uri()


@pytest.mark.parametrize("change", [{"subset": "val", "key": "val_1"}, {"image0": "1", "image1": "0"}])
def test_a_plan_is_another_one_where_a_pair_is_of_another_subset_or_of_the_same_files_otherwise(change):
    """Shards of another list of who validates must not be taken over."""
    ref = SampleRef("chairs", "train", "train_1", "s", "1", "0", "1", "f")
    other = dataclasses.replace(ref, **change)
    first, second = (plan_shards([r], {r.key: 1}, dict.fromkeys("01f", ""), 1)[0] for r in (ref, other))
    assert first.fingerprint != second.fingerprint


def test_a_relative_source_is_this_processs_own_folder(raw_chairs, tmp_path, monkeypatch):
    """On a cluster that was started elsewhere, workers have other folders."""
    monkeypatch.chdir(raw_chairs.parent)
    result = run_etl("chairs", raw_chairs.name, str(tmp_path), shard_bytes=100_000)
    assert result.quarantined == {}
