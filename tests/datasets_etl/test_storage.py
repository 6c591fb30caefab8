"""Objects on disk and on a real S3 server behave alike."""

import errno
import http.server
import os
import re
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import botocore.exceptions
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets_etl import s3_client, s3_store
from datasets_etl.errors import DamagedError, DataError
from datasets_etl.range_reads import RangeReader
from datasets_etl.s3_store import S3Store
from datasets_etl.storage import open_store, split_url
from datasets_etl.storage_retries import PATIENCE_VARIABLE, may_pass, waiting_for_storage
from tests.datasets_etl.refusals import refusal


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("s3")
        return open_store(f"s3://data/{tmp_path.name}")
    return open_store(str(tmp_path / "root"))


def test_what_was_written_is_read_whole_and_in_ranges(store):
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.size("a/b.bin") == 10


def test_an_upload_larger_than_a_part_arrives_whole(store, tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 50_000)  # 12.8 MB: two parts on S3
    store.upload(path, "large.tar")
    assert store.size("large.tar") == path.stat().st_size
    assert store.read_range("large.tar", 9_000_000, 300) == path.read_bytes()[9_000_000:9_000_300]


def test_writing_again_replaces(store):
    store.write("x", b"old")
    store.write("x", b"new")
    assert store.read("x") == b"new"


def test_what_is_not_there_has_no_size_and_reading_it_names_it(store):
    assert store.size("no/such") is None
    with pytest.raises(DataError, match="no/such"):
        store.read("no/such")


def test_a_range_past_the_end_is_an_error_not_a_short_answer(store):
    store.write("short", b"0123456789")
    for offset, left in ((8, 2), (10, 0), (512, 0)):
        with pytest.raises(DamagedError, match=f"short: {left} bytes at offset {offset} instead of 5; .* is cut short"):
            store.read_range("short", offset, 5)


def test_a_walk_lists_everything_below_a_prefix_sorted(store):
    for key in ("b/2", "a", "b/10", "c/d/e"):
        store.write(key, key.encode())
    assert [(info.key, info.size) for info in store.walk()] == [("a", 1), ("b/10", 4), ("b/2", 3), ("c/d/e", 5)]
    assert [info.key for info in store.walk("b/")] == ["b/10", "b/2"]


def test_a_stamp_changes_with_the_content(store):
    store.write("x", b"one")
    (before,) = store.walk()
    store.write("x", b"two")
    (after,) = store.walk()
    assert before.stamp != after.stamp


def test_a_files_stamp_changes_where_who_unpacks_it_again_sets_its_time(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    (before,) = open_store(str(tmp_path)).walk()
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(b"two")
    os.utime(path, ns=times)
    (after,) = open_store(str(tmp_path)).walk()
    assert before.stamp != after.stamp


def test_a_walk_passes_a_thousand_keys_on_s3(s3, tmp_path):
    store = open_store(f"s3://data/{tmp_path.name}")
    for number in range(1005):
        store.write(f"{number:04d}", b"")
    assert [info.key for info in store.walk()] == [f"{number:04d}" for number in range(1005)]


def test_what_a_walk_cannot_list_does_not_pass_for_empty(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    for key in ("a/1", "b/2"):
        store.write(key, b"x")
    assert list(store.walk("no/such")) == []
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "b":  # as for a user who may not read it; a test may run as root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        with pytest.raises(DataError, match=f"^{tmp_path}/b: Permission denied"):
            list(store.walk())
    (tmp_path / "a" / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"a/link: a link to .*nothing, which is not there"):
        list(store.walk())


def test_urls_are_signed_as_every_server_accepts(s3, fresh_client, monkeypatch):
    """Left alone, botocore signs by version 2 in some regions: refused for encrypted objects."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    url = s3_client._signed_url("bucket", "key", 0)
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in url


def test_a_failed_write_leaves_neither_the_object_nor_a_part_of_it(tmp_path):
    store = open_store(str(tmp_path / "root"))
    store.write("kept", b"old")
    with pytest.raises(DataError, match="missing"):
        store.upload(tmp_path / "missing", "kept")
    assert store.read("kept") == b"old"
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["kept"]


def test_an_empty_object_that_shows_a_folder_is_none_of_its_objects(s3, tmp_path):
    boto3.client("s3").put_object(Bucket="data", Key=f"{tmp_path.name}/", Body=b"")
    assert list(open_store(f"s3://data/{tmp_path.name}").walk()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL", "localhost:8333", r"localhost:8333; AWS_ENDPOINT_URL begins with http:// or https://"),
        ("AWS_PROFILE", "nobody", r"s3://data/x: .*\(nobody\) could not be found; correct AWS_PROFILE"),
        ("AWS_SECRET_ACCESS_KEY", None, r"s3://data/x: Partial credentials .*AWS_SECRET_ACCESS_KEY; correct"),
        (PATIENCE_VARIABLE, "abc", rf"{PATIENCE_VARIABLE}=abc: not a number of seconds"),
        (PATIENCE_VARIABLE, "nan", rf"{PATIENCE_VARIABLE}=nan: not a number of seconds"),
    ],
)
def test_settings_that_cannot_be_are_said_in_a_line(name, value, words, s3, fresh_client, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    message = refusal(lambda: open_store("s3://data").read("x"))
    assert re.search(words, message)
    assert "is the object store up" not in message


def test_a_mistake_of_ours_does_not_pass_for_a_wrong_setting(s3, monkeypatch):
    def mistaken():
        raise ValueError("of ours")

    monkeypatch.setattr(s3_store, "s3_client", mistaken)
    with pytest.raises(ValueError, match="of ours"):
        open_store("s3://data").size("x")


def test_wrong_credentials_are_said_in_a_line(s3, fresh_client, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match="access denied; check AWS_ACCESS_KEY_ID"):
        open_store("s3://data").read("ready")


def test_a_missing_bucket_is_said_in_a_line(s3, tmp_path):
    store, file = open_store("s3://nothing-here/prefix"), tmp_path / "file"
    file.write_bytes(b"x")
    for use in (lambda: store.write("x", b""), lambda: store.upload(file, "x"), lambda: next(store.walk())):
        with pytest.raises(
            DataError, match=r"^s3://nothing-here/prefix/x?: no bucket nothing-here; create it or correct"
        ):
            use()


def test_a_server_that_is_away_is_said_in_a_line(s3, fresh_client, monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(DataError, match=r"s3://data/x.*object store"):
        open_store("s3://data").size("x")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), cut=st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_any_range_of_a_file_is_that_slice(tmp_path, data, cut):
    store = open_store(str(tmp_path))
    store.write("x", data)
    start, end = sorted(min(c, len(data)) for c in cut)
    assert store.read_range("x", start, end - start) == data[start:end]


@pytest.mark.parametrize(
    ("url", "root", "key"),
    [
        ("s3://b/a/c.json", "s3://b/a", "c.json"),
        ("s3://b/c.json", "s3://b", "c.json"),
        ("file:///x/y/c.json", "file:///x/y", "c.json"),
        ("/x/c.json", "file:///x", "c.json"),
        ("file:///c.json", "file:///", "c.json"),
        ("file:///x%20y/my%20weights.pth", "file:///x%20y", "my weights.pth"),
        ("/x/a%20b", "file:///x", "a%20b"),
        ("s3://b/a%20b", "s3://b", "a%20b"),
    ],
)
def test_an_objects_url_splits_into_its_store_and_its_key(url, root, key):
    store, found = split_url(url)
    assert (store.url, found) == (root, key)


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://", "file://host/x", "http://x/y"])
def test_other_urls_are_refused_with_the_way_out(url):
    with pytest.raises(DataError, match=r"file://|s3://|slashes"):
        open_store(url)


@pytest.mark.parametrize("url", ["s3://bucket/a#b", "s3://bucket/a?", "file:///a?b", "file:///a/#"])
def test_what_would_end_a_place_in_a_url_is_refused(url):
    assert url in refusal(lambda: open_store(url))


@pytest.mark.parametrize("url", ["s3://b[1]/x", "//[x/y"])
def test_brackets_where_a_host_would_stand_are_refused(url):
    assert f"{url}: neither a URL nor a path" in refusal(lambda: open_store(url))


def test_a_path_may_hold_what_a_url_may_not(tmp_path):
    store = open_store(str(tmp_path / "a#b?"))
    store.write("x", b"1")
    assert (tmp_path / "a#b?" / "x").exists()
    assert open_store(store.url).read("x") == b"1"


def test_folders_that_cannot_be_are_said_in_a_line(tmp_path):
    assert "~nosuch/x: no user of that name" in refusal(lambda: open_store("~nosuch/x"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    message = refusal(lambda: open_store(str(tmp_path / "loop")).size("x"))
    assert f"{tmp_path}/loop/x: Too many levels of symbolic links" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter any folder")
def test_a_folder_that_may_not_be_entered_is_said_in_a_line(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o600)
    assert "closed/x: Permission denied" in refusal(lambda: open_store(str(tmp_path / "closed")).size("x"))


def test_stores_open_the_bucket_they_are_told(s3, tmp_path):
    open_store(f"s3://data/{tmp_path.name}/deep").write("k", b"v")
    body = boto3.client("s3").get_object(Bucket="data", Key=f"{tmp_path.name}/deep/k")["Body"].read()
    assert body == b"v"


@pytest.mark.parametrize("way", ["write", "upload"])
def test_what_did_not_reach_the_disk_leaves_the_old_object(tmp_path, monkeypatch, way):
    """Some disks and most networks' file systems tell of a failed write at the very end."""
    (tmp_path / "new").write_bytes(b"new")
    store = open_store(str(tmp_path / "root"))
    store.write("kept", b"old")

    def refused(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(DataError, match="kept: Input/output error"):
        store.write("kept", b"new") if way == "write" else store.upload(tmp_path / "new", "kept")
    assert store.read("kept") == b"old"
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["kept"]


def test_what_a_killed_writer_left_is_no_object_and_others_may_read_what_is(tmp_path):
    store = open_store(str(tmp_path))
    store.write("a", b"whole")
    (tmp_path / ".a.x1y2.part").write_bytes(b"who")
    assert [info.key for info in store.walk()] == ["a"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_a_walk_goes_into_folders_that_are_linked(tmp_path):
    """Large datasets are seldom on the disk of the folder that names them."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "x").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "disk")
    for name, target in (("here", "."), ("up", ".."), ("root", tmp_path)):  # followed, they would lead on for ever
        (tmp_path / "disk" / name).symlink_to(target)
    assert [info.key for info in open_store(str(tmp_path / "root")).walk()] == ["linked/x"]


def test_a_stores_url_opens_the_same_folder_whatever_its_name(tmp_path):
    store = open_store(str(tmp_path / "my data, 50% ä#1"))
    store.write("x", b"here")
    assert open_store(store.url).read("x") == b"here"


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/data").url == (tmp_path / "data").as_uri()


def test_patience_is_set_for_a_while_and_the_users_own_stays(monkeypatch):
    monkeypatch.delenv(PATIENCE_VARIABLE, raising=False)
    with waiting_for_storage(120):
        assert os.environ[PATIENCE_VARIABLE] == "120"
    assert PATIENCE_VARIABLE not in os.environ
    monkeypatch.setenv(PATIENCE_VARIABLE, "5")
    with waiting_for_storage(120):
        assert os.environ[PATIENCE_VARIABLE] == "5"
    assert os.environ[PATIENCE_VARIABLE] == "5"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not(status):
    def answer(code, http_status):
        return botocore.exceptions.ClientError(
            {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": http_status}}, "GetObject"
        )

    assert may_pass(answer("SlowDown", status))
    assert not may_pass(answer("AccessDenied", 403))
    assert not may_pass(answer("NoSuchKey", 404))


def test_bytes_that_do_not_match_their_checksum_are_damage():
    with pytest.raises(DamagedError, match="s3://b/p/x: damaged"), S3Store("b", "p")._errors("x"):
        raise botocore.exceptions.FlexibleChecksumError(error_msg="differs")


def test_a_signed_url_is_renewed_before_it_expires(s3, tmp_path, monkeypatch):
    """Else every read of a long training would be refused first, and made again the slow way."""
    store = open_store(f"s3://data/{tmp_path.name}")
    store.write("x", b"0123456789")
    sign, now, periods = s3_client._signed_url, time.monotonic(), []
    monkeypatch.setattr(s3_client, "_signed_url", lambda *place: periods.append(place[-1]) or sign(*place))
    for later in (0, 0, s3_client._SIGNATURE_S):
        monkeypatch.setattr(s3_client, "time", SimpleNamespace(monotonic=lambda later=later: now + later))
        assert store.read_range("x", 2, 3) == b"234"
    assert periods[0] == periods[1] == periods[2] - 1


def test_a_server_may_take_longer_to_answer_than_to_be_reached():
    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(1.5)
            self.send_response(206)
            self.end_headers()
            self.wfile.write(b"slow")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reader = RangeReader(None, connect_timeout_s=0.5, read_timeout_s=60)
        assert reader.read(f"http://127.0.0.1:{server.server_port}/x?", 0, 4) == b"slow"
    finally:
        server.shutdown()
        server.server_close()


def test_who_may_not_look_is_not_told_that_nothing_is_there(s3, fresh_client, monkeypatch):
    """An object that counts as absent would be written again, or a checkpoint passed over."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match="access denied"):
        open_store("s3://data").size("ready")
