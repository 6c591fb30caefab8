"""Only one driver works on a folder: on disk and on a real S3 server, with real processes that are killed."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from datasets_etl.errors import DataError
from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store
from datasets_etl.storage_retries import PATIENCE_VARIABLE
from pipelines import claim
from pipelines.claim import CLAIM, Claim, claimed
from pipelines.config_file import load_config
from pipelines.errors import PipelineError
from pipelines.sweep import prepare, run_sweep
from pipelines.sweeping.config import SweepConfig
from tests.conftest import ROOT
from tests.pipelines.conftest import Workplace
from tests.seaweedfs import running
from tests.waiting import WAIT_SECONDS, output_of, wait_until

ELSEWHERE = Claim("abc", "gpu-7", 123, "2026-11-28 06:00:00 UTC", "another machine", "1")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every tenth of a second, waited for three seconds."""
    for name, seconds in (("_FIRST_RENEWAL_S", 0.05), ("_RENEWAL_S", 0.1), ("_LOOK_S", 0.1)):
        monkeypatch.setattr(claim, name, seconds)
    monkeypatch.setattr(claim, "_LOOKS", 30)


@pytest.fixture(params=["file", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return open_store(f"s3://data/{tmp_path.name}/stage")
    return open_store(str(tmp_path / "stage"))


def write(folder: ObjectStore, content: Claim) -> None:
    folder.write(CLAIM, json.dumps(asdict(content)).encode())


def read(folder: ObjectStore) -> Claim:
    return Claim(**json.loads(folder.read(CLAIM)))


def test_a_second_driver_is_refused_as_long_as_the_first_lives(folder: ObjectStore):
    told: list[str] = []
    with claimed({"stage chairs": folder}, pytest.fail):
        own = read(folder)
        with pytest.raises(PipelineError) as refused, claimed({"stage chairs": folder}, told.append):
            pytest.fail("two at once")
        assert str(refused.value).startswith(f"stage chairs: {own} works on it; let it go on, or stop it")
        wait_until(lambda: read(folder).renewed > own.renewed + 2)
        assert read(folder).token == own.token
    assert told == [f"stage chairs: claimed by {own}; waits up to 3 s for a sign of life"]
    assert folder.size(CLAIM) is None, "it is released"
    with claimed({"stage chairs": folder}, pytest.fail):
        assert read(folder).token != own.token


def test_one_of_several_folders_that_is_taken_leaves_the_others_free(folder: ObjectStore, tmp_path: Path):
    other = open_store(str(tmp_path / "other"))
    with claimed({"stage things": folder}, pytest.fail):
        both = {"stage chairs": other, "stage things": folder}
        with pytest.raises(PipelineError, match=r"^stage things: "), claimed(both, str):
            pytest.fail("two at once")
        assert other.size(CLAIM) is None
        with claimed({"stage chairs": other}, pytest.fail):
            assert other.size(CLAIM)


CLAIMER = """
import sys, time
from datasets_etl.storage import open_store
from pipelines import claim
claim._RENEWAL_S = 0.1
with claim.claimed({"stage chairs": open_store(sys.argv[1])}, print):
    print("claimed", flush=True)
    time.sleep(1000)
"""


@contextlib.contextmanager
def claimer(folder: ObjectStore) -> Iterator[subprocess.Popen[str]]:
    """Another process of this machine that has claimed a folder."""
    command = [sys.executable, "-c", CLAIMER, folder.url]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "claimed\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "a zombie"])
def test_what_a_killed_driver_of_this_machine_claimed_is_free_at_once(folder: ObjectStore, reaped: bool):
    """The same command goes on without a wait, and without a word."""
    with claimer(folder) as process:
        process.kill()
        if reaped:
            process.wait()
        wait_until(lambda: read(folder).is_left)
        with claimed({"stage chairs": folder}, pytest.fail):
            assert read(folder).pid != process.pid


def test_a_driver_that_stood_still_is_taken_over_and_ends_once_it_goes_on(folder: ObjectStore):
    told: list[str] = []
    with claimer(folder) as process:
        process.send_signal(signal.SIGSTOP)
        with claimed({"stage chairs": folder}, told.append):
            assert [line.partition("(process")[0] for line in told] == [
                f"stage chairs: claimed by the driver on {socket.gethostname()} ",
                f"stage chairs: no sign of life of the driver on {socket.gethostname()} ",
            ]
            own = read(folder).token
            process.send_signal(signal.SIGCONT)
            _, errors = output_of(process)
            assert process.returncode == 1
            assert "has taken it over" in errors.splitlines()[-1]
            assert read(folder).token == own


def test_a_driver_that_was_taken_over_by_one_that_has_ended_ends_too(folder: ObjectStore):
    """That one has told MLflow what this one would tell again, and perhaps finished the stage."""
    with claimer(folder) as process:
        process.send_signal(signal.SIGSTOP)
        with claimed({"stage chairs": folder}, str):
            pass
        process.send_signal(signal.SIGCONT)
        _, errors = output_of(process)
        assert process.returncode == 1
        assert errors.splitlines()[-1].endswith(
            "stage chairs: another driver took it over and ended: this one is ended"
        )
        assert folder.size(CLAIM) is None


def test_a_driver_asks_whether_it_was_taken_over_before_it_writes(folder: ObjectStore, monkeypatch):
    """Its renewal may not be due yet when it wakes."""
    monkeypatch.setattr(claim, "_FIRST_RENEWAL_S", 1000.0)
    monkeypatch.setattr(claim, "_RENEWAL_S", 1000.0)
    answers: list[bool] = []

    def ask(held: Callable[[], bool]) -> None:
        asking = threading.Thread(target=lambda: answers.append(held()))
        asking.start()
        asking.join()

    def work() -> None:
        with claimed({"stage chairs": folder}, pytest.fail) as held:
            other = replace(read(folder), token="other")
            ask(held)
            monkeypatch.setattr(claim, "_SURE_S", 0.0)
            ask(held)
            with monkeypatch.context() as patch:
                patch.setattr(type(folder), "read", raising(DataError("storage is down")))
                ask(held)
            assert answers == [True] * 3
            write(folder, other)
            ask(held)
            wait_until(lambda: len(answers) == 4)  # where the interruption comes

    with pytest.raises(PipelineError, match="has taken it over"):
        work()
    wait_until(lambda: answers == [True] * 3 + [False])
    assert read(folder).token == "other"


def test_storage_that_is_silent_holds_nobody_up_who_asks(folder: ObjectStore, monkeypatch):
    """Such as the end of a run, which has a moment."""
    monkeypatch.setattr(claim, "_ANSWERED_S", 0.1)
    monkeypatch.setattr(claim, "_RELEASED_S", 0.1)
    silence, waiting = threading.Event(), threading.Event()
    with claimed({"stage chairs": folder}, pytest.fail) as held:
        own = folder.read(CLAIM)

        def silent(*_: object) -> bytes:
            waiting.set()
            return own if silence.wait(WAIT_SECONDS) else b""

        monkeypatch.setattr(type(folder), "read", silent)
        assert waiting.wait(WAIT_SECONDS), "a renewal that was under way would answer"
        monkeypatch.setattr(claim, "_SURE_S", 0.0)
        assert held()
        monkeypatch.setattr(claim, "_ANSWERED_S", 1000.0)  # of many records, only the first waits
        assert held()
        assert not silence.is_set()
        silence.set()
        asked: list[object] = []
        monkeypatch.setattr(type(folder), "read", lambda *_: asked.append(_) or own)
        wait_until(lambda: held() and asked)


def test_no_answer_comes_of_a_look_that_began_before_the_question(tmp_path: Path, monkeypatch):
    """A machine may be suspended in the middle of a renewal, and the claim taken over meanwhile."""
    first, second = (open_store(str(tmp_path / name)) for name in "ab")
    monkeypatch.setattr(claim, "_ANSWERED_S", WAIT_SECONDS)
    looking, go_on = threading.Event(), threading.Event()
    answers: list[bool] = []

    def suspended(key: str) -> bytes:
        looking.set()
        assert go_on.wait(WAIT_SECONDS)
        return type(second).read(second, key)

    def slow(key: str) -> bytes:
        time.sleep(0.5)  # in which a premature answer would come
        return type(first).read(first, key)

    def is_taken_over() -> None:
        with claimed({"a": first, "b": second}, pytest.fail) as held:
            monkeypatch.setattr(second, "read", suspended)
            assert looking.wait(WAIT_SECONDS), "the first one's claim was looked at and renewed"
            write(first, replace(read(first), token="other"))
            monkeypatch.setattr(first, "read", slow)
            monkeypatch.setattr(claim, "_SURE_S", 0.0)
            threading.Timer(0.5, go_on.set).start()
            threading.Thread(target=lambda: answers.append(held())).start()
            threading.Event().wait(WAIT_SECONDS)  # where the interruption comes

    with pytest.raises(PipelineError, match=r"^a: .* has taken it over"):
        is_taken_over()
    wait_until(lambda: answers)
    assert answers == [False]


def test_who_cannot_claim_all_claims_nothing(tmp_path: Path, monkeypatch):
    """Otherwise the next driver, on another machine, waits for a sign of life of nobody."""
    first, second = (open_store(str(tmp_path / name)) for name in "ab")
    monkeypatch.setattr(second, "write", raising(DataError("the disk is full")))
    with pytest.raises(DataError, match="full"), claimed({"a": first, "b": second}, pytest.fail):
        pass
    assert first.size(CLAIM) is None


def test_an_end_gives_the_claim_up_at_once(folder: ObjectStore, monkeypatch):
    monkeypatch.setattr(claim, "_FIRST_RENEWAL_S", 1000.0)
    monkeypatch.setattr(claim, "_RELEASED_S", WAIT_SECONDS)
    with claimed({"stage chairs": folder}, pytest.fail):
        pass
    assert folder.size(CLAIM) is None


def test_the_clock_counts_while_the_machine_is_suspended(monkeypatch):
    monkeypatch.setattr(time, "clock_gettime", {time.CLOCK_BOOTTIME: 7.0}.__getitem__)
    assert claim._seconds_since_boot() == 7.0


def test_the_time_of_a_suspended_machine_passes_for_a_claim(folder: ObjectStore, monkeypatch):
    """`time.monotonic` stands still meanwhile, and the driver would think that it has just renewed its claim."""
    passed = 0.0
    clock = claim._seconds_since_boot
    monkeypatch.setattr(claim, "_FIRST_RENEWAL_S", 1000.0)
    monkeypatch.setattr(claim, "_seconds_since_boot", lambda: clock() + passed)
    with claimed({"stage chairs": folder}, pytest.fail) as held:
        before = read(folder).renewed
        assert held()
        assert read(folder).renewed == before
        passed = 3600.0
        assert held()
        assert read(folder).renewed == before + 1


def test_a_renewal_is_as_old_as_its_beginning_and_one_that_failed_is_none(tmp_path: Path, monkeypatch):
    """The machine may be suspended in the middle of it."""
    folder = open_store(str(tmp_path))
    passed = 0.0
    clock, stored = claim._seconds_since_boot, folder.read

    def suspended(key: str) -> bytes:
        nonlocal passed
        passed += 3600.0
        return stored(key)

    monkeypatch.setattr(claim, "_FIRST_RENEWAL_S", 1000.0)
    monkeypatch.setattr(claim, "_RENEWAL_S", 1000.0)
    monkeypatch.setattr(claim, "_ANSWERED_S", WAIT_SECONDS)
    monkeypatch.setattr(claim, "_seconds_since_boot", lambda: clock() + passed)
    with claimed({"stage chairs": folder}, pytest.fail) as held:
        passed += 3600.0
        attempts = []
        for answer in (raising(DataError("storage is down")), suspended, stored, stored):
            monkeypatch.setattr(folder, "read", answer)
            assert held()
            attempts.append(Claim(**json.loads(stored(CLAIM))).renewed)
        assert attempts == [0, 2, 3, 3], "each is asked for anew, but the last, for the one before was whole and quick"


def test_storage_that_is_down_lets_no_claim_on_another_lapse(tmp_path: Path, monkeypatch):
    down, other = (open_store(str(tmp_path / name)) for name in "ab")
    with claimed({"stage chairs": down, "stage things": other}, pytest.fail):
        monkeypatch.setattr(down, "read", raising(DataError("storage is down")))
        before = read(other).renewed
        wait_until(lambda: read(other).renewed > before + 2)


def test_who_claims_outside_the_main_thread_hears_of_a_loss_only_by_asking(tmp_path: Path):
    """Nobody else in the process is interrupted, nor the process killed."""
    folder, interrupted = open_store(str(tmp_path)), []

    def work() -> None:
        with claimed({"stage chairs": folder}, pytest.fail) as held:
            wait_until(lambda: write(folder, ELSEWHERE) or not held())

    before = signal.signal(claim._LOST, lambda *_: interrupted.append(True))
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        signal.signal(claim._LOST, before)
    assert read(folder) == ELSEWHERE
    assert not interrupted


def raising(error: Exception) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise error

    return fail


def test_another_process_with_the_number_of_a_killed_one_is_not_it(folder: ObjectStore):
    with claimed({"stage chairs": folder}, pytest.fail):
        own = read(folder)
    assert not own.is_left
    assert replace(own, started="1").is_left
    assert not replace(own, started="1", machine="another").is_left, "what of another machine has ended is not known"
    assert not replace(own, started="1", machine="").is_left


def test_a_claim_of_a_machine_that_is_gone_lapses(folder: ObjectStore):
    write(folder, ELSEWHERE)
    told: list[str] = []
    with claimed({"stage chairs": folder}, told.append):
        assert read(folder).token != ELSEWHERE.token
    who = "the driver on gpu-7 (process 123, since 2026-11-28 06:00:00 UTC)"
    assert told == [
        f"stage chairs: claimed by {who}; waits up to 3 s for a sign of life",
        f"stage chairs: no sign of life of {who}: taken over",
    ]
    assert folder.size(CLAIM) is None


def test_several_folders_of_a_driver_are_told_of_in_a_line(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(claim, "_LOOKS", 2)
    folders = {f"stage {name}": open_store(str(tmp_path / name)) for name in ("things", "sintel", "kitti")}
    for name, host in (("things", "gpu-7"), ("sintel", "gpu-8"), ("kitti", "gpu-7")):
        write(folders[f"stage {name}"], replace(ELSEWHERE, host=host))
    told: list[str] = []
    with claimed(folders, told.append):
        assert len({read(folder).token for folder in folders.values()}) == 1
    assert [line.partition(" (process")[0] for line in told] == [
        "stage things, stage kitti: claimed by the driver on gpu-7",
        "stage sintel: claimed by the driver on gpu-8",
        "stage things, stage kitti: no sign of life of the driver on gpu-7",
        "stage sintel: no sign of life of the driver on gpu-8",
    ]


def test_a_claim_that_is_given_up_meanwhile_is_not_waited_for(folder: ObjectStore, monkeypatch):
    monkeypatch.setattr(claim, "_LOOKS", 10**9)
    write(folder, ELSEWHERE)
    threading.Timer(0.5, folder.delete, [CLAIM]).start()
    with claimed({"stage chairs": folder}, str):
        assert read(folder).token != ELSEWHERE.token


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": "abc"}'])
def test_a_claim_that_cannot_be_read_keeps_nobody_out(tmp_path: Path, content: bytes):
    folder = open_store(str(tmp_path))
    folder.write(CLAIM, content)
    with claimed({"stage chairs": folder}, pytest.fail):
        assert read(folder).token


@pytest.mark.parametrize("ignored", [False, True], ids=["foreground", "background"])
def test_who_was_taken_over_ends_and_leaves_the_other_ones_claim(folder: ObjectStore, tmp_path: Path, ignored: bool):
    """As when its machine had stood still. What runs in a shell's background does not hear Ctrl-C."""
    other = open_store(str(tmp_path / "other"))

    def work() -> None:
        with claimed({"stage chairs": folder, "stage things": other}, pytest.fail):
            for _ in range(100):  # a renewal that is under way while the first is written would replace it
                write(folder, ELSEWHERE)
                threading.Event().wait(0.2)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        with pytest.raises(PipelineError) as ended:
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    who = "the driver on gpu-7 (process 123, since 2026-11-28 06:00:00 UTC)"
    assert str(ended.value) == f"stage chairs: {who} has taken it over, and goes on with it: this one is ended"
    assert read(folder) == ELSEWHERE
    assert other.size(CLAIM) is None, "what nobody took is free"
    assert signal.getsignal(claim._LOST) is signal.SIG_DFL


def test_ctrl_c_is_ctrl_c(tmp_path: Path):
    folder = open_store(str(tmp_path))
    with pytest.raises(KeyboardInterrupt), claimed({"stage chairs": folder}, pytest.fail):
        raise KeyboardInterrupt
    assert folder.size(CLAIM) is None


def test_storage_that_is_away_ends_no_claim_and_holds_up_no_end(tmp_path: Path, fresh_client, monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.1")
    monkeypatch.setattr(claim, "_RELEASED_S", 0.5)
    with running(tmp_path) as server:
        for name, value in server.settings.items():
            monkeypatch.setenv(name, value)
        folder = open_store("s3://data/stage")
        with claimed({"stage chairs": folder}, pytest.fail):
            before = read(folder)
            server.kill()
            time.sleep(1)
            server.start()
            wait_until(lambda: read(folder).renewed > before.renewed + 1)
            assert read(folder).token == before.token
            monkeypatch.setenv(PATIENCE_VARIABLE, str(WAIT_SECONDS))
            server.kill()
        # Nobody waited for it; a process that goes on gives the claim up once it can, another one's lapses.
        server.start()
        wait_until(lambda: folder.size(CLAIM) is None)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_sweep_is_one_drivers(workplace: Workplace):
    stage = {**workplace.config["stages"][0], "validate_every": 10}
    config = {
        **{name: workplace.config[name] for name in ("name", "storage", "data", "model")},
        "objective": {"data": "chairs", "subset": "val"},
        "tune": {"stage": stage, "start": "random", "space": {"attn_splits": [[1, 2]]}, "trials": 1},
        "mlflow": {"tracking_uri": workplace.tracking_uri},
    }
    path = Workplace(workplace.folder, config).write()
    sweep = prepare(load_config(SweepConfig, str(path), []))
    with (
        claimed({"sweep tiny": sweep.store}, pytest.fail),
        pytest.raises(PipelineError, match=r"^sweep tiny: the driver on .* works on it"),
    ):
        run_sweep(sweep)
    assert [found.key for found in sweep.store.walk()] == []
    assert not (workplace.folder / "mlflow.db").exists()
