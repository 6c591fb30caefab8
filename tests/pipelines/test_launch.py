"""How a stage is launched: what workers wait for, which failures are counted, and what ends it."""

import copy
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from datasets_etl.errors import DamagedError, DataError, StorageOutageError
from pipelines.errors import OutageError, PipelineError
from pipelines.training import launch
from pipelines.training.config import StageConfig
from pipelines.training.feed import Record
from pipelines.training.machine_config import MachineConfig
from pipelines.training.stage import StageJob
from tests.pipelines.conftest import workplace_in
from tests.waiting import WAIT_SECONDS


def job_in(folder: Path, max_failures: int = 3) -> StageJob:
    stage = StageConfig.model_validate(workplace_in(folder, {}).config["stages"][0])
    return StageJob(stage, MachineConfig(max_failures=max_failures), {}, str(folder), "feed", 0, "fp32")


def snapshot(step: int, validated: int = 0) -> dict[str, int]:
    return {"step": step, "validated": validated}


class _Queue:
    """The feed, as a driver asks it how workers are and how often they left, and tells it what they wait for."""

    def __init__(self) -> None:
        self.left = 0
        self.silent = 0.0
        self.records: list[Record] = []
        self.reason: Exception | None = None

    def silent_s(self) -> float:
        return self.silent

    def send(self, record: Record) -> None:
        self.records.append(record)

    def gave_up_for(self) -> Exception | None:
        return self.reason

    def departures(self) -> int:
        return self.left


@pytest.mark.usefixtures("local_ray")
def test_workers_that_do_not_fit_are_told_of():
    """Ray itself would wait without a word."""
    assert launch.room_lacking(MachineConfig(num_workers=2)) == ""
    told = launch.room_lacking(MachineConfig(num_workers=2, min_workers=1, cpus_per_worker=999, use_gpu=True))
    assert "1 worker needs 999 CPUs and a GPU each, the cluster has room for 0" in told
    told = launch.room_lacking(MachineConfig(num_workers=2, placement="strict_spread"))
    assert "2 workers need 1 CPU each on a node of its own, the cluster has room for 1" in told
    assert "machine.placement" in told


def test_ray_train_is_told_what_the_config_says_of_machines(tmp_path, monkeypatch):
    """And waits for a collective longer than the watchdog, which says what it was."""
    gpus = MachineConfig(
        num_workers=4,
        min_workers=2,
        grow_interval_s=7.0,
        use_gpu=True,
        cpus_per_worker=3,
        placement="spread",
        max_failures=5,
        hang_timeout_s=600.0,
    )
    heard = UserCallback()
    trainer = launch._trainer(replace(job_in(tmp_path), machine=gpus), "name", [heard], str(tmp_path))
    scaling = trainer.scaling_config
    assert (scaling.num_workers, scaling.elastic_resize_monitor_interval_s) == ((2, 4), 7.0)
    assert (scaling.use_gpu, scaling.resources_per_worker) == (True, {"CPU": 3, "GPU": 1})
    assert scaling.placement_strategy == "SPREAD"
    assert trainer.run_config.failure_config.max_failures == 5
    queue = _Queue()
    monkeypatch.setattr(launch, "FeedWriter", lambda name: queue)
    for callback in trainer.run_config.callbacks:
        callback.after_exception(None, {3: RuntimeError("died")})
    assert [record.line for record in queue.records] == ["stage=chairs worker 3 failed: died"]
    assert heard in trainer.run_config.callbacks
    assert trainer.backend_config.timeout_s > 600
    alone = launch._trainer(job_in(tmp_path), "name", [], str(tmp_path)).scaling_config
    assert (alone.num_workers, alone.use_gpu, alone.resources_per_worker) == (1, False, {"CPU": 1})


def test_a_users_error_in_ray_trains_controller_is_told_as_it_is():
    mine = PipelineError("no luck")
    assert launch._user_error(ControllerError(mine)) is mine
    assert launch._user_error(copy.copy(ControllerError(mine))) is mine, "as it comes from another process"
    assert launch._user_error(ControllerError(ValueError("a bug"))) is None


def test_a_users_error_is_found_however_ray_wraps_it():
    mine = PipelineError("no luck")
    behind = RuntimeError("Ray's own words")
    behind.__cause__ = mine
    for wrapped in (UserExceptionWithTraceback(mine, "…"), RayTaskError("train", "…", mine), behind):
        assert launch._user_error(wrapped) is mine
        assert launch._user_error(WorkerGroupError("workers failed", {0: ValueError("its peer"), 2: wrapped})) is mine


@pytest.mark.parametrize(
    ("error", "is_lasting"),
    [(DataError("storage is away"), False), (DamagedError("a flipped bit"), True), (PipelineError("a gate"), True)],
    ids=str,
)
def test_only_what_lasts_ends_a_stage_at_once(error, is_lasting, tmp_path, monkeypatch):
    """Storage that was away after three crashes within weeks is a failure like any other."""
    job = job_in(tmp_path)
    failure = WorkerGroupError("workers failed", {1: error})

    def train(*_: object) -> None:
        raise failure

    monkeypatch.setattr(launch, "FeedWriter", lambda name: _Queue())
    monkeypatch.setattr(launch, "_train_interruptibly", train)
    monkeypatch.setattr(launch, "TorchTrainer", lambda *_, **__: None)
    if is_lasting:
        with pytest.raises(type(error), match=str(error)):
            launch._fit(job, "name", [])
    else:
        assert launch._fit(job, "name", []) is failure
    monkeypatch.setattr(launch.CheckpointStore, "newest", lambda store, warn: None)
    with pytest.raises(type(error), match=str(error)):
        launch.fit_stage(job, "name")


def test_what_a_worker_gave_up_for_ends_a_stage_though_ray_train_knows_of_no_failure(tmp_path, monkeypatch):
    queue = _Queue()
    queue.reason = PipelineError("stage chairs: 20 steps in a row had no finite gradients")
    monkeypatch.setattr(launch, "FeedWriter", lambda name: queue)
    monkeypatch.setattr(launch, "_train_interruptibly", lambda *_: None)
    monkeypatch.setattr(launch.CheckpointStore, "newest", lambda store, warn: snapshot(10))
    with pytest.raises(PipelineError, match="20 steps in a row"):
        launch.fit_stage(job_in(tmp_path), "name")


@pytest.mark.parametrize(
    ("found", "max_failures", "fits", "told"),
    [
        ([None, None, None, snapshot(40, 40)], 2, 3, ""),
        ([None, None, None, snapshot(10), snapshot(10), snapshot(40, 40)], 2, 5, ""),  # counted from a new checkpoint
        ([None, None, None, None], 2, 3, " 3 times, the last: connection refused"),
        ([None, None], 0, 1, ": connection refused"),
    ],
)
def test_workers_that_cannot_be_connected_are_started_again(found, max_failures, fits, told, tmp_path, monkeypatch):
    """One that dies while they connect ends Ray Train's run, as a machine that is taken soon after another."""
    job = job_in(tmp_path, max_failures=max_failures)
    seen, runs = iter(found), []
    monkeypatch.setattr(launch, "FeedWriter", lambda name: _Queue())
    monkeypatch.setattr(launch.CheckpointStore, "newest", lambda store, warn: next(seen))
    refused = ControllerError(RuntimeError("connection refused"))
    monkeypatch.setattr(launch, "_fit", lambda *_: runs.append(1) or refused)
    if told:
        with pytest.raises(OutageError, match=f"could not be started, or not be connected{told}"):
            launch.fit_stage(job, "name")
    else:
        assert launch.fit_stage(job, "name") == found[-1]
    assert len(runs) == fits


def test_an_outage_that_ray_trains_controller_met_is_no_failed_start(tmp_path, monkeypatch):
    """Whoever met it has already waited for storage as long as it was told to."""
    runs = []
    outage = ControllerError(StorageOutageError("storage is away"))
    monkeypatch.setattr(launch, "FeedWriter", lambda name: _Queue())
    monkeypatch.setattr(launch.CheckpointStore, "newest", lambda store, warn: None)
    monkeypatch.setattr(launch, "_fit", lambda *_: runs.append(1) or outage)
    with pytest.raises(StorageOutageError, match="storage is away"):
        launch.fit_stage(job_in(tmp_path), "name")
    assert len(runs) == 1


def test_what_workers_wait_for_is_told_each_time_it_changes(tmp_path, monkeypatch):
    job = job_in(tmp_path)
    queue, lacking = _Queue(), [""]
    monkeypatch.setattr(launch, "room_lacking", lambda machine: lacking[0])
    waiting = launch._Wait(job, queue)
    told = []
    for silent, lacks in (
        *((1, "waits for room"), (20, "waits for room"), (40, ""), (300, ""), (320, "")),
        (15, ""),  # a worker is there
        (20, "waits for room"),  # a machine is lost
        (25, ""),
        (200, ""),  # there is another, but the workers do not come up on it: as after hours of training
        *((1, "waits for room"), (2, ""), (3, "waits for room")),  # machines come and go
    ):
        queue.silent, lacking[0] = silent, lacks
        waiting.look()
        told.append(len(queue.records))
    assert told == [1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6]
    assert all(record.waiting and not record.metrics for record in queue.records)
    first, second, third, fourth, *again = [record.line for record in queue.records]
    assert [first, third, *again] == ["stage=chairs waits for room"] * 4
    assert second == fourth
    assert "the cluster could hold them, but none has come up for 180 s" in second


def test_workers_may_leave_again_before_they_have_come_to_anything(tmp_path, monkeypatch):
    """Notices may come in bursts: the second group is told to go while it makes up for the first one's validation."""
    job = job_in(tmp_path)
    queue, seen = _Queue(), iter([snapshot(10), snapshot(10), snapshot(10), snapshot(40, 40)])
    fits = iter([True, True, False])

    def fit(*_: object) -> None:
        queue.left += next(fits)

    monkeypatch.setattr(launch, "FeedWriter", lambda name: queue)
    monkeypatch.setattr(launch.CheckpointStore, "newest", lambda store, warn: next(seen))
    monkeypatch.setattr(launch, "_fit", fit)
    assert launch.fit_stage(job, "name") == snapshot(40, 40)
    seen, fits = iter([snapshot(10), snapshot(10)]), iter([False])
    with pytest.raises(OutageError, match="ended without a new checkpoint"):
        launch.fit_stage(job, "name")


@pytest.mark.parametrize(
    ("found", "max_failures", "fits"),
    [
        ([None, snapshot(10), snapshot(20), snapshot(40, 40)], 1, 3),  # each failure after a new checkpoint
        ([None, snapshot(10), snapshot(10)], 1, 2),
        ([None, snapshot(10)], 0, 1),
        ([None, snapshot(40), snapshot(40, 40)], 1, 2),  # killed in its last validation
    ],
)
def test_failures_count_from_the_newest_checkpoint(found, max_failures, fits, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "FeedWriter", lambda name: _Queue())
    job = job_in(tmp_path, max_failures=max_failures)
    seen, runs = iter(found), []
    monkeypatch.setattr(launch.CheckpointStore, "newest", lambda store, warn: next(seen))
    monkeypatch.setattr(launch, "_fit", lambda *_: runs.append(1) or TrainingFailedError("a worker\ndied"))
    if found[-1] == snapshot(40, 40):
        assert launch.fit_stage(job, "name") == found[-1]
    else:
        told = "workers failed 2 times without a new checkpoint, the last" if max_failures else "a worker failed"
        with pytest.raises(OutageError, match=f"stage chairs: {told}: died .*; the same command goes on"):
            launch.fit_stage(job, "name")
    assert len(runs) == fits


def test_a_worker_that_is_gone_is_told_from_one_that_raised(tmp_path, monkeypatch):
    """The others fail with it; and what a worker raised may be of the end of an actor that it asked."""
    queue = _Queue()
    monkeypatch.setattr(launch, "FeedWriter", lambda name: queue)
    failures = launch._Failures(job_in(tmp_path))
    cut_off = RuntimeError("gloo: connection reset by peer")
    failures.after_exception(None, {0: cut_off, 2: WorkerHealthCheckFailedError("Worker(…)", ActorDiedError())})
    failures.after_exception(None, {1: cut_off, 2: ActorDiedError()})
    failures.after_exception(None, {0: WorkerHealthCheckFailedError("Worker(…)", TimeoutError("no answer yet"))})
    failures.after_exception(None, {0: PipelineError("the command ends with it, and says it")})
    assert [record.line for record in queue.records] == [
        "stage=chairs worker 2 failed: its process is gone: killed, out of memory, or its machine lost",
        "stage=chairs worker 1 failed: gloo: connection reset by peer",
        "stage=chairs worker 0 failed: no answer yet",
    ]
    assert all(record.waiting for record in queue.records)


@pytest.mark.parametrize("error", [ValueError("Failed to look up actor 'feed'"), ActorDiedError()], ids=type)
def test_ray_trains_controller_goes_on_though_nobody_hears_of_a_failure(error, tmp_path, monkeypatch):
    """It outlives its driver, and the driver's feed, for a moment."""

    def feed(name: str) -> None:
        raise error

    failures = launch._Failures(job_in(tmp_path))
    monkeypatch.setattr(launch, "FeedWriter", feed)
    failures.after_exception(None, {0: RuntimeError("died")})


def test_ray_trains_end_is_heard_of_and_what_it_waits_for_meanwhile(monkeypatch):
    """It runs in a thread, so that Ctrl-C ends this one at once."""
    looks, go_on = [], threading.Event()

    class Trainer:
        def __init__(self, error: BaseException | None) -> None:
            self.error = error

        def fit(self) -> None:
            go_on.wait(WAIT_SECONDS)
            if self.error is not None:
                raise self.error

    def look() -> None:
        looks.append(threading.current_thread())
        if len(looks) == 2:
            go_on.set()

    monkeypatch.setattr(launch, "_CHECK_INTERVAL_S", 0.01)
    launch._train_interruptibly(Trainer(None), look)
    for error in (TrainingFailedError("a worker died"), SystemExit(3)):
        with pytest.raises(type(error)) as raised:
            launch._train_interruptibly(Trainer(error), look)
        assert raised.value is error
    assert looks[:2] == [threading.main_thread()] * 2
