"""One stage as its driver runs it: Ray Train around its workers until it is complete, its final weights.

The curriculum and the sweep both train through this module; there is no other training loop.
"""

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer

from datasets_etl.storage import open_store
from gmflow import GMFlow, save_weights
from pipelines.cluster import Nodes, listed, nodes, slots
from pipelines.entry import last_line
from pipelines.errors import LASTING_ERRORS, USER_ERRORS, OutageError
from pipelines.training import state
from pipelines.training.checkpoints import CheckpointStore
from pipelines.training.config import ModelConfig
from pipelines.training.feed import FeedWriter, Record
from pipelines.training.machine_config import MachineConfig
from pipelines.training.stage import StageJob, train_stage
from pipelines.training.state import result_weights
from pipelines.wording import counted

log = logging.getLogger(__name__)

# Collectives time out this long after our watchdog, which reports what the worker was doing; PyTorch would not.
_AFTER_WATCHDOG_S = 300
_CHECK_INTERVAL_S = 20.0
_SLOW_START_S = 180.0


def room_for_workers(machine: MachineConfig, nodes: Nodes) -> tuple[int, str]:
    """How many workers a cluster holds at once, and what each takes, as text for people."""
    alone = machine.placement == "strict_spread"
    each = f"{listed(machine.cpus_per_worker, machine.use_gpu)} each{' on a node of its own' if alone else ''}"
    return slots(nodes, machine.cpus_per_worker, machine.use_gpu, one_a_node=alone), each


def room_lacking(machine: MachineConfig) -> str:
    """What workers will wait for, in a line; empty if the cluster has room for them. Needs a connected Ray.

    This is no error: a cluster may grow by itself, or somebody may start another machine.
    """
    fewest = machine.min_workers or machine.num_workers
    fitting, each = room_for_workers(machine, nodes())
    if fitting >= fewest:
        return ""
    needing = f"{counted(fewest, 'worker')} {'needs' if fewest == 1 else 'need'}"
    placed = ", machine.placement" if machine.placement == "strict_spread" else ""
    return (
        f"waits for room: {needing} {each}, the cluster has room for {fitting}; add machines, or change "
        f"machine.num_workers, machine.cpus_per_worker{placed} or machine.use_gpu"
    )


def fit_stage(job: StageJob, name: str, callbacks: Sequence[UserCallback] = ()) -> dict[str, Any]:
    """Train a stage on Ray to its end, resuming from its newest checkpoint. Its folder must hold its initial weights.

    All workers end early after a preemption notice for a machine of theirs; they are restarted elsewhere, even if they
    had made no progress. Workers that fail are restarted, until `machine.max_failures` + 1 failures bring no new
    checkpoint. While no workers come up, the feed gets a line that says why.

    Args:
        job: everything the workers need to know.
        name: name of the run on Ray; the last part of `job.folder`.
        callbacks: callbacks for Ray Train, such as the one that reports to Ray Tune.

    Returns the snapshot of the last step.
    Raises one of this project's errors: the one that a worker raised, or that workers failed too often.
    """
    checkpoints = CheckpointStore(open_store(job.folder))
    feed = FeedWriter(job.feed)
    newest = checkpoints.newest(log.warning)
    failed_starts = 0
    while newest is None or not state.is_complete(newest, job.stage.steps):
        departures = feed.departures()
        failure = _fit(job, name, callbacks)
        before, newest = newest, checkpoints.newest(log.warning)
        if _progress(newest) > _progress(before) and (failure is None or job.machine.max_failures):
            failed_starts = 0
            continue
        if failure is None and feed.departures() != departures:
            continue
        # Ray starts workers again that die at work, but not if one dies while they are being connected.
        if _is_failed_start(failure) and failed_starts < job.machine.max_failures:
            failed_starts += 1
            continue
        if failure is not None:
            raise _user_error(failure) or _failed_too_often(job, failure) from failure
        raise OutageError(f"stage {job.stage.name}: ended without a new checkpoint; see Ray's logs")
    return newest


def _progress(snapshot: dict[str, Any] | None) -> tuple[int, int]:
    return (0, 0) if snapshot is None else (snapshot["step"], snapshot["validated"])


def _is_failed_start(failure: TrainingFailedError | None) -> bool:
    return isinstance(failure, ControllerError) and _user_error(failure) is None


def _failed_too_often(job: StageJob, failure: TrainingFailedError) -> OutageError:
    reason = last_line(failure)
    allowed = job.machine.max_failures
    if isinstance(failure, ControllerError):
        times = f" {allowed + 1} times, the last" if allowed else ""
        problem = f"the workers could not be started, or not be connected{times}: {reason}"
    elif allowed:
        problem = f"workers failed {allowed + 1} times without a new checkpoint, the last: {reason}"
    else:
        problem = f"a worker failed: {reason}"
    return OutageError(
        f"stage {job.stage.name}: {problem} (machine.max_failures {allowed}); the same command goes on from the newest "
        "checkpoint"
    )


def _fit(job: StageJob, name: str, callbacks: Sequence[UserCallback]) -> TrainingFailedError | None:
    """One run of Ray Train. Returns its failure, if workers failed too often; raises `LASTING_ERRORS` of the workers,
    which a retry would meet again.
    """
    feed = FeedWriter(job.feed)
    with tempfile.TemporaryDirectory(prefix="gmflow-ray-train-") as scratch:
        try:
            _train_interruptibly(_trainer(job, name, callbacks, scratch), _Wait(job, feed).look)
        except TrainingFailedError as error:
            if isinstance(mine := _user_error(error), LASTING_ERRORS):
                raise mine from error
            log.warning("stage %s: %s", job.stage.name, error)
            return error
    if (end := feed.gave_up_for()) is not None:
        raise end
    return None


def _trainer(job: StageJob, name: str, callbacks: Sequence[UserCallback], scratch: str) -> TorchTrainer:
    """Ray Train's trainer for a stage.

    Ray Train's own storage is a folder on the driver's machine, where its controller runs too: this project stores
    everything that matters itself, and Ray would not wait for storage that is unreachable.
    """
    machine = job.machine
    fewest = machine.min_workers or machine.num_workers
    return TorchTrainer(
        train_stage,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=int(machine.hang_timeout_s) + _AFTER_WATCHDOG_S),
        scaling_config=ScalingConfig(
            num_workers=machine.num_workers if fewest == machine.num_workers else (fewest, machine.num_workers),
            use_gpu=machine.use_gpu,
            resources_per_worker={"CPU": machine.cpus_per_worker, **({"GPU": 1} if machine.use_gpu else {})},
            placement_strategy=machine.placement.upper(),
            elastic_resize_monitor_interval_s=machine.grow_interval_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=machine.max_failures),
            callbacks=[*callbacks, _Failures(job)],
        ),
    )


class _Failures(UserCallback):
    """Says in the feed that workers failed, in one line: Ray says it in a thousand characters, or in its logs alone."""

    def __init__(self, job: StageJob) -> None:
        self._stage, self._feed = job.stage.name, job.feed

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train's controller calls this. Of several workers the one that is gone failed the others."""
        gone = [rank for rank, error in worker_exceptions.items() if _is_gone(error)]
        rank = min(gone or worker_exceptions)
        error = worker_exceptions[rank]
        if isinstance(_user_error(error), LASTING_ERRORS):
            return  # the command ends with it, and says it
        why = "its process is gone: killed, out of memory, or its machine lost" if gone else last_line(error)
        line = f"stage={self._stage} worker {rank} failed: {why}"
        with contextlib.suppress(RayError, ValueError):  # the driver is gone, and its queue with it
            FeedWriter(self._feed).send(Record(0, line=line, waiting=True))


def _is_gone(error: Exception) -> bool:
    """Whether the worker's process does not answer any more. What a worker raised may be of another actor's end."""
    return isinstance(getattr(error, "health_check_failure", None), RayActorError)


class _Wait:
    """Reports why no workers have come up yet, each time the reason changes."""

    def __init__(self, job: StageJob, feed: FeedWriter) -> None:
        self._job, self._feed = job, feed
        self._reported = ""

    def look(self) -> None:
        news = room_lacking(self._job.machine) or self._slow_start()
        if news and news != self._reported:
            self._feed.send(Record(0, line=f"stage={self._job.stage.name} {news}", waiting=True))
        self._reported = news

    def _slow_start(self) -> str:
        """A line if no worker has come up for long. Ray keeps starting workers that die; only its logs say so."""
        if self._feed.silent_s() < _SLOW_START_S:
            return ""
        return (
            f"waits for workers: the cluster could hold them, but none has come up for {_SLOW_START_S:.0f} s; others "
            "use the room, or they die while they start: Ray's logs on their nodes say why (session_latest/logs)"
        )


def _train_interruptibly(trainer: TorchTrainer, look: Callable[[], None]) -> None:
    """Run `trainer.fit()` so that Ctrl-C raises KeyboardInterrupt at once; meanwhile call `look` from time to time.

    In the main thread Ray Train would handle Ctrl-C itself: it ignores it while workers wait for room, and exits
    without a message once they have ended. So it runs in another thread here, and the code that connected to Ray ends
    the workers by disconnecting.
    """
    ended: Future[None] = Future()

    def train() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 (raised by `ended.result()` below)
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=train, name="ray-train", daemon=True).start()
    while not ended.done():
        look()
        wait([ended], timeout=_CHECK_INTERVAL_S)
    ended.result()


def _user_error(error: BaseException | None) -> Exception | None:
    """The error of this project that a Ray error wraps; None if there is none."""
    while error is not None:
        if isinstance(error, USER_ERRORS):
            return error
        failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
        for failure in failures.values():
            if (mine := _user_error(failure)) is not None:
                return mine
        inner = (getattr(error, name, None) for name in ("controller_failure", "_base_exc", "cause", "__cause__"))
        error = next(filter(None, inner), None)
    return None


def final_weights(last: dict[str, Any], model: ModelConfig, path: Path) -> dict[str, float]:
    """Write a stage's final weights to `path`; return its `newest_metrics`.

    Args:
        last: the snapshot that `fit_stage` returned.
        model: config of the model that was trained.
        path: the `.safetensors` file to write.
    """
    final = GMFlow(model.build())
    final.load_state_dict(result_weights(last))
    save_weights(final, path)
    return state.newest_metrics(last["records"], last["step"])
