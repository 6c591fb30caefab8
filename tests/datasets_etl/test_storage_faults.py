"""A network and a server that fail: what is read is whole, the rest is one clear line."""

import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from datasets_etl import etl, s3_client
from datasets_etl.errors import DamagedError, DataError, StorageOutageError
from datasets_etl.etl import run_etl
from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.file_store import FileStore
from datasets_etl.manifest import Manifest
from datasets_etl.objects import ObjectStore
from datasets_etl.range_reads import RangeReader
from datasets_etl.storage import open_store
from datasets_etl.storage_retries import PATIENCE_VARIABLE
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.infra.metadata_server import MetadataServer
from tests.seaweedfs import S3Server, running

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def proxy(s3: S3Server, fresh_client: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A network between this process and the S3 server."""
    with faulty_proxy(s3.endpoint) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 1)
        yield between


@pytest.fixture
def store(proxy: FaultyProxy, tmp_path: Path) -> ObjectStore:
    opened = open_store(f"s3://data/{tmp_path.name}")
    opened.write("x", CONTENT)
    proxy.seen.clear()
    return opened


@pytest.mark.parametrize("fault", ["503", "500", "drop", "cut", "short", "stall"])
def test_a_read_outlives_faults(store, proxy, fault):
    proxy.faults = [fault, fault]
    assert store.read_range("x", 1000, 5000) == CONTENT[1000:6000]
    assert [met for *_, met in proxy.seen] == [fault, fault, None]


@pytest.mark.parametrize("fault", ["503", "drop", "cut", "short"])
def test_an_outage_is_told_from_a_wrong_request(store, proxy, monkeypatch, fault):
    """Its commands have another exit code."""
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")
    with pytest.raises(DataError) as caught:
        store.read("y")
    assert not isinstance(caught.value, StorageOutageError)
    proxy.faults = [fault] * 99
    with pytest.raises(StorageOutageError):
        store.read_range("x", 1000, 5000)


@pytest.mark.parametrize("fault", ["503", "drop"])
def test_a_write_outlives_faults(store, proxy, fault):
    proxy.faults = [fault, fault]
    store.write("y", CONTENT)
    assert [met for *_, met in proxy.seen] == [fault, fault, None]
    assert store.read("y") == CONTENT


@pytest.mark.parametrize("fault", ["503", "drop", "cut"])
def test_an_upload_in_parts_outlives_faults(store, proxy, tmp_path, fault):
    large = tmp_path / "large"
    large.write_bytes(os.urandom(17 << 20))
    proxy.applies = lambda method, path: "uploadId" in path  # parts and their completion
    proxy.faults = [fault, fault]
    store.upload(large, "large")
    assert not proxy.faults
    assert store.read("large") == large.read_bytes()


def test_a_listing_outlives_faults(store, proxy):
    proxy.faults = ["503", "cut"]
    assert [info.key for info in store.walk()] == ["x"]


def test_a_network_that_stays_broken_is_one_line_not_damage(store, proxy, monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "2")
    proxy.faults = ["drop"] * 200
    with pytest.raises(DataError, match=r"s3://data/.*/x: .*object store up") as caught:
        store.read("x")
    assert not isinstance(caught.value, DamagedError)
    assert "\n" not in str(caught.value)


def test_a_connection_that_fell_silent_for_longer_than_the_patience_is_made_again(store, proxy, monkeypatch):
    """By default a server may be silent for a minute, and a command waits for ten seconds."""
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.2")
    proxy.faults = ["stall"]
    assert store.read_range("x", 0, 5000) == CONTENT[:5000]
    assert [met for *_, met in proxy.seen] == ["stall", None]


def test_an_object_that_is_too_short_is_damage_at_once(store, proxy):
    with pytest.raises(DamagedError, match=r"2400 bytes at offset 100000 instead of 5000"):
        store.read_range("x", 100_000, 5000)
    assert len(proxy.seen) <= 2, "not waited for"


def test_a_short_answer_that_stays_short_is_not_mistaken_for_the_sample(store, proxy, monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "2")
    proxy.faults = ["short"] * 200
    with pytest.raises(DataError, match="2500 bytes at offset 0 instead of 5000; the answer is cut short") as caught:
        store.read_range("x", 0, 5000)
    assert not isinstance(caught.value, DamagedError)


class TestShortAnswersToTheEtl:
    """Whole objects whose length agrees with their answers' headers: the listing alone tells what is missing."""

    @pytest.fixture(params=["when_supported", "when_required"])  # objects stored with a checksum, and without
    def source(self, request, store: ObjectStore, proxy: FaultyProxy, raw_chairs: Path, monkeypatch) -> str:
        def here(work, tasks, at_once):
            for task in tasks:
                result = work(task)
                if isinstance(result, DataError):
                    raise result
                yield task, result

        monkeypatch.setattr(etl, "run_tasks", here)  # Ray's workers know another network
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", request.param)
        s3_client._client_of_process.cache_clear()
        raw = open_store(f"{store.url}/raw")
        for path in (path for path in raw_chairs.rglob("*") if path.is_file()):
            raw.upload(path, path.relative_to(raw_chairs).as_posix())
        proxy.applies = lambda method, path: method == "GET" and "00002_flow.flo" in path
        return raw.url

    def test_one_of_them_quarantines_no_sound_pair(self, source, proxy, sharded_chairs, tmp_path):
        proxy.faults = [None, "short"]  # the header comes first
        result = run_etl("chairs", source, str(tmp_path), shard_bytes=100_000)
        assert not proxy.faults
        assert not result.quarantined
        assert Path(result.manifest_url).name == Path(sharded_chairs.manifest_url).name

    def test_where_all_are_it_ends_without_a_manifest(self, source, proxy, tmp_path, monkeypatch):
        monkeypatch.setenv(PATIENCE_VARIABLE, "1")
        proxy.faults = [None] + ["short"] * 200
        with pytest.raises(DataError, match=r"00002_flow\.flo: 12294 bytes instead of 24588 as listed") as caught:
            run_etl("chairs", source, str(tmp_path), shard_bytes=100_000)
        assert not isinstance(caught.value, DamagedError)
        assert not list(tmp_path.rglob("manifest-*"))


def test_a_sample_that_was_damaged_on_its_way_is_read_again(sharded_chairs, monkeypatch):
    """Ranges have no checksum on the wire, and damage ends a training for good."""
    manifest = Manifest.load(sharded_chairs.manifest_url)
    expected, flipped = EvaluationSet(manifest, None)[3], [1]
    read = FileStore.read_range

    def damaging(store: FileStore, key: str, offset: int, length: int) -> bytes:
        data = bytearray(read(store, key, offset, length))
        if flipped:
            data[len(data) // 2] ^= flipped.pop()
        return bytes(data)

    monkeypatch.setattr(FileStore, "read_range", damaging)
    assert (EvaluationSet(manifest, None)[3].flow == expected.flow).all()
    assert not flipped
    flipped += [1, 2]
    with pytest.raises(DamagedError, match="checksum differs"):
        EvaluationSet(manifest, None)[3]


@pytest.mark.parametrize(
    ("settings", "profile", "address"),
    [
        ({"AWS_DEFAULT_REGION": "eu-south-1"}, "", "https://data.s3.eu-south-1.amazonaws.com/x?"),
        ({}, "region = eu-south-1", "https://data.s3.eu-south-1.amazonaws.com/x?"),
        ({"AWS_DEFAULT_REGION": "us-east-1"}, "", "https://data.s3.amazonaws.com/x?"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "", "http://127.0.0.1:1/data/x?"),
        ({}, "endpoint_url = http://minio.local", "http://minio.local/data/x?"),
        ({}, "s3 =\n  addressing_style = path", "https://s3.amazonaws.com/data/x?"),
    ],
)
def test_samples_are_read_from_the_regions_own_host(settings, profile, address, tmp_path, fresh_client, monkeypatch):
    """The host of all regions refuses the newer ones, and each sample would be asked for twice."""
    (tmp_path / "config").write_text(f"[default]\n{profile}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", **settings}.items():
        monkeypatch.setenv(name, value)
    assert s3_client._signed_url("data", "x", 0).startswith(address)


def test_training_reads_the_same_samples_through_a_bad_network(sharded_chairs, proxy, tmp_path):
    folder = Path(sharded_chairs.manifest_url.removeprefix("file://")).parent
    remote = open_store(f"s3://data/{tmp_path.name}")
    for path in sorted(folder.rglob("*.*")):
        remote.upload(path, path.relative_to(folder).as_posix())
    here = EvaluationSet(Manifest.load(sharded_chairs.manifest_url), None)
    proxy.faults = ["cut", None, "503", None, "short", None, "drop", None]
    there = EvaluationSet(Manifest.load(f"{remote.url}/{Path(sharded_chairs.manifest_url).name}"), None)
    assert all((here[i].flow == there[i].flow).all() and (here[i].image0 == there[i].image0).all() for i in range(8))
    assert not proxy.faults


@pytest.fixture
def role(s3: S3Server, fresh_client: None, tmp_path: Path, monkeypatch) -> Iterator[MetadataServer]:
    """Credentials of the S3 server from a metadata service, as on an EC2 machine, and from nowhere else."""
    keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    open_store(f"s3://data/{tmp_path.name}").write("x", CONTENT)
    s3_client._client_of_process.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    server = MetadataServer("127.0.0.1", 0, tmp_path / "no notice")
    server.keys = keys
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class TestMetadataService:
    def test_a_slow_answer_is_asked_for_again(self, role, tmp_path):
        role.stalls = 2
        assert open_store(f"s3://data/{tmp_path.name}").read("x") == CONTENT
        assert role.stalls == 0

    def test_a_process_that_got_no_credentials_gets_them_later(self, role, tmp_path):
        role.broken = True
        store = open_store(f"s3://data/{tmp_path.name}")
        with pytest.raises(DataError, match="no credentials"):
            store.read("x")
        role.broken = False
        assert store.read("x") == CONTENT

    def test_credentials_that_cannot_be_renewed_now_are_waited_for(self, role, tmp_path, monkeypatch):
        store = open_store(f"s3://data/{tmp_path.name}")
        assert store.read("x") == CONTENT

        def end_soon() -> None:
            """Within the quarter of an hour in which botocore renews them before each request."""
            client: Any = s3_client.s3_client()
            held = client._request_signer._credentials
            held._expiry_time = datetime.now(UTC) + timedelta(minutes=12)

        role.broken = True
        end_soon()
        threading.Timer(2.0, lambda: setattr(role, "broken", False)).start()
        assert store.read("x") == CONTENT
        assert not role.broken
        role.broken = True
        end_soon()
        monkeypatch.setenv(PATIENCE_VARIABLE, "0.5")
        with pytest.raises(DataError, match="no credentials from where they come from here: Error when retrieving"):
            store.read("x")


class TestServerKilled:
    """kill -9 of the server in the middle of something, and another one in its place a moment later."""

    @pytest.fixture
    def mortal(
        self, tmp_path_factory: pytest.TempPathFactory, s3: S3Server, fresh_client: None, monkeypatch
    ) -> Iterator[S3Server]:
        with running(tmp_path_factory.mktemp("mortal")) as server:
            for name, value in server.settings.items():
                monkeypatch.setenv(name, value)
            yield server

    def test_in_the_middle_of_a_read(self, mortal, monkeypatch):
        content = os.urandom(1 << 20)
        open_store("s3://data/a").write("x", content)
        with faulty_proxy(mortal.endpoint) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            s3_client._client_of_process.cache_clear()
            reborn = _restart_later(mortal)
            proxy.faults = ["cut", reborn]
            assert open_store("s3://data/a").read("x") == content
            assert not proxy.faults

    def test_while_a_connection_to_it_lies_idle(self, mortal):
        content = os.urandom(1 << 16)
        open_store("s3://data/idle").write("x", content)
        url = s3_client._signed_url("data", "idle/x", 0)
        reader = RangeReader(None, connect_timeout_s=5, read_timeout_s=5)
        assert reader.read(url, 100, 1000) == content[100:1100]
        mortal.kill()
        with pytest.raises(ConnectionError, match=r"^http://127\.0\.0\.1"):
            reader.read(url, 100, 1000)
        mortal.start()
        assert reader.read(url, 100, 1000) == content[100:1100]
        mortal.kill()
        mortal.start()
        assert reader.read(url, 200, 1000) == content[200:1200], "the idle connection counts for nothing"
        assert reader.read(url.replace("idle/x", "idle/y"), 0, 10) is None

    def test_in_the_middle_of_a_write_in_parts(self, mortal, tmp_path, monkeypatch):
        large = tmp_path / "large"
        large.write_bytes(os.urandom(34 << 20))
        with faulty_proxy(mortal.endpoint) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            s3_client._client_of_process.cache_clear()
            proxy.applies = lambda method, path: "partNumber=4" in path
            proxy.faults = [_restart_later(mortal)]
            store = open_store("s3://data/b")
            store.upload(large, "large")
            assert not proxy.faults
            assert store.read("large") == large.read_bytes()

    def test_what_was_written_before_is_there_after(self, mortal):
        store = open_store("s3://data/c")
        for number in range(20):
            store.write(f"{number:02d}", bytes([number]) * 1000)
        _restart_later(mortal)()
        assert [info.key for info in store.walk()] == [f"{number:02d}" for number in range(20)]
        assert all(store.read(f"{number:02d}") == bytes([number]) * 1000 for number in range(20))


def _restart_later(server: S3Server):
    def kill() -> None:
        server.kill()
        threading.Thread(target=server.start, daemon=True).start()
        time.sleep(0.1)

    return kill
