"""Checkpoints on storage: whole or absent, checked, kept by policy, written beside the training."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets_etl.errors import DamagedError
from datasets_etl.file_store import FileStore
from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store
from datasets_etl.storage_retries import PATIENCE_VARIABLE
from gmflow import GMFlow, GMFlowConfig, GMFlowError, save_weights
from pipelines import references
from pipelines.errors import PipelineError
from pipelines.training.checkpoints import CheckpointStore, CheckpointWriter, KeepPolicy, OtherFormatError
from tests.seaweedfs import S3Server, running
from tests.waiting import WAIT_SECONDS


def snapshot(step: int, size: int = 50) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((size,), float(step))}


def kept(store: CheckpointStore) -> list[int]:
    """Steps by the objects themselves, and no other object."""
    names = [found.key.removeprefix("checkpoints/") for found in store.folder.walk("checkpoints/")]
    steps = [int(name[len("step_") :].partition(".")[0]) for name in names if name.endswith(".json")]
    assert sorted(names) == sorted([f"step_{step:08d}.json" for step in steps] + [data_of(store, s) for s in steps])
    return sorted(steps)


def data_of(store: CheckpointStore, step: int) -> str:
    """The name of the one object with its data."""
    prefix = f"checkpoints/step_{step:08d}-"
    (name,) = [found.key for found in store.folder.walk(prefix) if found.key.endswith(".pt")]
    return name.removeprefix("checkpoints/")


@pytest.fixture(params=["file", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> ObjectStore:
    return open_store(str(tmp_path) if request.param == "file" else f"s3://data/{tmp_path.name}")


@pytest.fixture
def store(folder: ObjectStore) -> CheckpointStore:
    return CheckpointStore(folder)


def test_the_newest_checkpoint_comes_back(store: CheckpointStore):
    told: list[str] = []
    assert store.newest(told.append) is None
    for step in (5, 10, 100):
        store.write(snapshot(step), {})
    newest = store.newest(told.append)
    assert newest is not None
    assert torch.equal(newest["weights"], torch.full((50,), 100.0))
    assert store.steps() == [100, 10, 5]
    assert told == []


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "facts", "checksum"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(store: CheckpointStore, damage: str, monkeypatch):
    for step in (5, 10):
        store.write(snapshot(step), {})
    key = f"checkpoints/{data_of(store, 10)}"
    data = store.folder.read(key)
    if damage == "flip":
        store.folder.write(key, data[:300] + bytes([data[300] ^ 1]) + data[301:])
    elif damage == "cut":
        store.folder.write(key, data[:-10])
    elif damage == "gone":
        store.folder.delete(key)
    elif damage == "checksum":
        read = store.folder.read

        def checked(asked: str) -> bytes:
            if asked == key:
                raise DamagedError(f"{store.folder.url}/{key}: damaged: its checksum is not the one stored with it")
            return read(asked)

        monkeypatch.setattr(store.folder, "read", checked)
    else:
        key = "checkpoints/step_00000010.json"
        store.folder.write(key, b"{")
    told: list[str] = []
    found = store.newest(told.append)
    assert found is not None
    assert found["step"] == 5
    assert len(told) == 1
    assert f"{store.folder.url}/{key}" in told[0]
    assert "damaged" in told[0]
    assert store.steps() == [5], "a damaged one is not counted, nor told, twice"
    monkeypatch.undo()
    store.write(snapshot(10), {})
    again = store.newest(told.append)
    assert again is not None
    assert again["step"] == 10


def test_a_checkpoint_of_another_version_is_left_as_it_is(store: CheckpointStore):
    store.write(snapshot(100), {})
    (key,) = (found.key for found in store.folder.walk("") if found.key.endswith(".json"))
    facts = json.loads(store.folder.read(key)) | {"format": 999, "another field": 1}
    store.folder.write(key, json.dumps(facts).encode())
    before = {found.key for found in store.folder.walk("")}
    with pytest.raises(OtherFormatError, match=r"format 999.* go on with the code that wrote it \(.*sources:"):
        store.newest(pytest.fail)
    assert {found.key for found in store.folder.walk("")} == before


def test_a_write_that_was_cut_off_never_happened(store: CheckpointStore):
    store.write(snapshot(5), {})
    store.folder.write("checkpoints/step_00000010-0123456789abcdef.pt", b"half")  # killed before its facts were written
    found = store.newest(pytest.fail)
    assert found is not None
    assert found["step"] == 5
    store.write(snapshot(15), {})
    store.prune(KeepPolicy(last=2))
    assert kept(store) == [5, 15]


def test_the_last_and_the_best_are_kept(store: CheckpointStore):
    policy = KeepPolicy(last=2, best_by="val/c/val/epe")
    epe = {1: 3.0, 2: 1.0, 3: 2.0, 5: 1.5}
    seen = []
    for step in range(1, 7):
        store.write(snapshot(step), {"val/c/val/epe": epe[step]} if step in epe else {})
        store.prune(policy)
        seen.append(kept(store))
    assert seen == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]


@pytest.mark.parametrize("best_by", [None, "val/c/val/epe"])
def test_facts_that_cannot_be_read_keep_no_others_from_being_deleted(store: CheckpointStore, best_by: str | None):
    """Else every checkpoint stays, until the storage is full."""
    for step in (5, 10, 15):
        store.write(snapshot(step), {"val/c/val/epe": float(step)})
    store.folder.write("checkpoints/step_00000005.json", b"{")
    store.prune(KeepPolicy(last=1, best_by=best_by))
    assert kept(store) == ([15] if best_by is None else [10, 15])


class _Gate:
    """A folder whose writes wait until they are let through."""

    def __init__(self, root: Path) -> None:
        self.inner = FileStore(root)
        self.url = self.inner.url
        self.writing = threading.Event()
        self.open = threading.Event()

    def write(self, key: str, data: bytes) -> None:
        self.writing.set()
        assert self.open.wait(WAIT_SECONDS)
        self.inner.write(key, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_training_does_not_wait_for_slow_storage_and_the_newest_snapshot_is_written(tmp_path: Path):
    slow = _Gate(tmp_path)
    store = CheckpointStore(slow)
    writer = CheckpointWriter(store, KeepPolicy(last=9), pytest.fail)
    writer.submit(snapshot(1), {})
    assert slow.writing.wait(WAIT_SECONDS)
    for step in (2, 3, 4):
        writer.submit(snapshot(step), {})  # returns although nothing is written yet
    assert store.steps() == []
    slow.open.set()
    writer.flush()
    writer.close()
    assert kept(store) == [1, 4]


@pytest.mark.parametrize("waits", [CheckpointWriter.flush, CheckpointWriter.close])
def test_who_waits_for_the_writer_waits_for_all_of_it(tmp_path: Path, waits: Callable[..., None]):
    """The end of a stage, which is registered from its last checkpoint."""
    slow = _Gate(tmp_path)
    store = CheckpointStore(slow)
    writer = CheckpointWriter(store, KeepPolicy(last=9), pytest.fail)
    writer.submit(snapshot(1), {})
    assert slow.writing.wait(WAIT_SECONDS)
    waiting = threading.Thread(target=waits, args=(writer,))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    writer.submit(snapshot(2), {})
    slow.open.set()
    waiting.join(WAIT_SECONDS)
    writer.close()
    assert kept(store) == [1, 2]


def test_the_best_is_written_though_newer_ones_come_while_storage_is_slow(tmp_path: Path):
    slow = _Gate(tmp_path)
    store = CheckpointStore(slow)
    writer = CheckpointWriter(store, KeepPolicy(last=1, best_by="val/c/val/epe"), pytest.fail)
    writer.submit(snapshot(1), {"val/c/val/epe": 5.0})
    assert slow.writing.wait(WAIT_SECONDS)
    for step, epe in ((2, 2.0), (3, 1.0), (4, 4.0)):
        writer.submit(snapshot(step), {"val/c/val/epe": epe})
    writer.submit(snapshot(5), {})
    slow.open.set()
    writer.flush()
    writer.close()
    assert kept(store) == [3, 5]


def test_a_full_disk_loses_no_checkpoint_and_is_no_end(small_disk: Callable[[int], Path]):
    disk = small_disk(1)
    store = CheckpointStore(FileStore(disk))
    told: list[str] = []
    writer = CheckpointWriter(store, KeepPolicy(last=2), told.append)
    writer.submit(snapshot(1, size=50_000), {})
    writer.flush()
    filler = disk / "filler"
    filler.write_bytes(bytes(700_000))
    writer.submit(snapshot(2, size=50_000), {})
    with pytest.raises(Exception, match="No space left on device"):
        writer.flush()
    assert len(told) == 1
    assert "checkpoint of step 2 could not be written" in told[0]
    assert "No space left on device" in told[0]
    found = store.newest(pytest.fail)
    assert found is not None
    assert found["step"] == 1
    filler.unlink()
    writer.submit(snapshot(3, size=50_000), {})
    writer.flush()
    writer.close()
    assert kept(store) == [1, 3]
    assert len(list((disk / "checkpoints").iterdir())) == 4, "nothing half-written is left"


def test_who_reads_a_checkpoint_while_it_is_replaced_gets_the_new_one(store: CheckpointStore, monkeypatch):
    """Rank 0 may have gone on already, or workers that a killed driver left."""
    store.write(snapshot(10), {})
    size = type(store.folder).size

    def replace_first(folder: ObjectStore, key: str) -> int | None:
        monkeypatch.undo()
        store.write(snapshot(10) | {"validated": 10}, {})
        store.prune(KeepPolicy(last=1))
        return size(folder, key)

    monkeypatch.setattr(type(store.folder), "size", replace_first)
    assert store.read(10)["validated"] == 10


class _KilledError(Exception):
    """In the place of a SIGKILL."""


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_checkpoint_that_is_replaced_stands_until_the_new_one_does(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, killed_at: int
):
    """As after a validation at its step: the same, and what the validation found."""
    store.write(snapshot(10), {})
    calls = []

    def dying(folder: ObjectStore, key: str, data: bytes) -> None:
        calls.append(key)
        if len(calls) == killed_at:
            raise _KilledError
        write(folder, key, data)

    write = type(store.folder).write
    monkeypatch.setattr(type(store.folder), "write", dying)
    with pytest.raises(_KilledError):
        store.write(snapshot(10) | {"validated": 10}, {"val/c/val/epe": 1.0})
    monkeypatch.undo()
    found = store.newest(pytest.fail)
    assert found is not None
    assert found["step"] == 10
    assert "validated" not in found
    store.write(snapshot(10) | {"validated": 10}, {"val/c/val/epe": 1.0})
    store.prune(KeepPolicy(last=1))
    assert kept(store) == [10]
    replaced = store.newest(pytest.fail)
    assert replaced is not None
    assert replaced["validated"] == 10


@pytest.mark.slow
@pytest.mark.usefixtures("s3", "fresh_client")
def test_a_checkpoint_waits_for_storage_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with running(tmp_path) as server:
        for name, value in server.settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(PATIENCE_VARIABLE, "120")
        store = CheckpointStore(open_store("s3://data/away"))
        writer = CheckpointWriter(store, KeepPolicy(last=2), pytest.fail)
        writer.submit(snapshot(1), {})
        writer.flush()
        server.kill()
        writer.submit(snapshot(2), {})
        back = threading.Timer(15, server.start)  # longer than a command would wait for a mistyped endpoint
        back.start()
        writer.flush()
        back.join()
        writer.close()
        assert kept(store) == [1, 2]


@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_is_a_model_by_reference(tmp_path: Path, averaged: bool):
    """What `keep_best` keeps, or what a stage under way has come to, is scored and trained from like any other."""
    store = CheckpointStore(open_store(str(tmp_path)))
    config = GMFlowConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)
    torch.manual_seed(0)
    initial, newest, average = (GMFlow(config) for _ in range(3))
    save_weights(initial, tmp_path / "init.safetensors")
    kept_average = {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in average.state_dict().items()}
    store.write({"step": 7, "model": newest.state_dict(), "average": kept_average if averaged else None}, {})
    reference = tmp_path / "checkpoints" / data_of(store, 7)
    model = references.resolve_model(str(reference))
    expected = (average if averaged else newest).state_dict()
    assert model.config == config
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    references.check_reference(reference.as_uri())
    assert references.stands_for(reference.as_uri()).startswith(f"{reference.as_uri()} (sha256 ")

    initial_file = tmp_path / "init.safetensors"
    initial_file.write_bytes(initial_file.read_bytes()[:-1])
    with pytest.raises(GMFlowError, match=f"^file://{initial_file}: damaged"):
        references.resolve_model(str(reference))
    reference.write_bytes(reference.read_bytes()[:-1] + b"x")
    with pytest.raises(PipelineError, match=r"step_00000007-\w+\.pt: damaged checkpoint: its content is not what"):
        references.resolve_model(str(reference))
    for name in ("other.pt", reference.name):  # the model's configuration lies beside a stage's checkpoints
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(PipelineError, match=rf"/{name}: no checkpoint; write"):
            references.resolve_model(str(tmp_path / name))


def test_the_writer_deletes_what_is_not_to_be_kept(tmp_path: Path):
    store = CheckpointStore(FileStore(tmp_path))
    writer = CheckpointWriter(store, KeepPolicy(last=1), pytest.fail)
    for step in (1, 2, 3):
        writer.submit(snapshot(step), {})
        writer.flush()
    writer.close()
    assert kept(store) == [3]


def test_what_somebody_else_keeps_beside_them_is_left_alone(store: CheckpointStore):
    others = ["checkpoints/step_best.pt", "checkpoints/step_00000005-copy.pt", "checkpoints/step_x.json"]
    for key in others:
        store.folder.write(key, b"mine")
    writer = CheckpointWriter(store, KeepPolicy(last=1), pytest.fail)
    for step in (5, 10):
        writer.submit(snapshot(step), {})
        writer.flush()
    writer.close()
    assert store.steps() == [10]
    assert {found.key for found in store.folder.walk()} >= set(others)


@pytest.mark.parametrize(("broken", "lost"), [("write", True), ("prune", False)])
def test_whatever_a_write_meets_is_told_and_the_writer_goes_on(tmp_path: Path, monkeypatch, broken: str, lost: bool):
    """A checkpoint that is stored is none that could not be written, though an old one cannot be deleted."""
    store, told = CheckpointStore(FileStore(tmp_path)), []
    writer = CheckpointWriter(store, KeepPolicy(last=1), told.append)

    def fail(*_: object) -> None:
        raise RuntimeError("nobody thought of it")

    with monkeypatch.context() as patch:
        patch.setattr(store, broken, fail)
        writer.submit(snapshot(5), {})
        if lost:
            with pytest.raises(RuntimeError, match="nobody thought of it"):
                writer.flush()
        else:
            writer.flush()
    assert len(told) == 1
    assert ("could not be written" if lost else "could not be deleted") in told[0]
    writer.submit(snapshot(10), {})
    writer.flush()
    writer.close()
    assert store.steps() == [10]
