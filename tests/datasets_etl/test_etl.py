"""Raw dataset → shards and manifest: the same bytes however it is run, and nothing half done to be seen."""

import shutil
from pathlib import Path

import pytest

from datasets_etl.errors import DataError
from datasets_etl.etl import EtlResult, run_etl
from datasets_etl.loader import EvaluationSet
from datasets_etl.manifest import Manifest
from datasets_etl.storage import open_store

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
    assert Manifest.load(first.manifest_url).samples  # the old version is still whole


def test_a_damaged_file_stops_the_run_without_a_manifest(raw_chairs, tmp_path):
    source = tmp_path / "raw"
    shutil.copytree(raw_chairs, source)
    broken = next(source.rglob("*_flow.flo"))
    broken.write_bytes(broken.read_bytes()[:-5])
    with pytest.raises(DataError, match=broken.name):
        run_etl("chairs", str(source), str(tmp_path / "out"), shard_bytes=100_000)
    assert not list((tmp_path / "out").rglob("manifest-*"))
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_size_mismatch_shows_before_anything_is_written(raw_chairs, tmp_path):
    source = tmp_path / "raw"
    shutil.copytree(raw_chairs, source)
    from datasets_etl import formats

    flow = sorted(source.rglob("*_flow.flo"))[-1]
    values = formats.decode_flo(flow.read_bytes(), flow.name)
    flow.write_bytes(formats.encode_flo(values[:-8]))
    with pytest.raises(DataError, match=rf"64x48 but .*{flow.name} is 64x40"):
        run_etl("chairs", str(source), str(tmp_path / "out"), shard_bytes=100_000)
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(DataError, match=r"no manifest: .*nothing\.json.*pipelines/etl\.py"):
        Manifest.load(str(tmp_path / "nothing.json"))


def test_a_missing_subset_names_those_there_are(sharded_chairs: EtlResult):
    with pytest.raises(DataError, match="no subset 'trian'; it has train, val"):
        Manifest.load(sharded_chairs.manifest_url).select("trian")


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
