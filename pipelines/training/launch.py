"""One stage from the outside: its initial weights, Ray Train around its workers, its final weights.

The curriculum and the sweep both train through this; there is no other loop.
"""

import logging
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from ray.train import (
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer

from datasets_etl.storage import ObjectStore, open_store
from gmflow import GMFlow, load_weights, save_weights
from pipelines.cluster import Nodes, listed, nodes, slots
from pipelines.errors import USER_ERRORS, PipelineError
from pipelines.references import fetch_weights, telling
from pipelines.training import state
from pipelines.training.checkpoints import INITIAL_WEIGHTS, CheckpointStore
from pipelines.training.config import MachineConfig, ModelConfig
from pipelines.training.feed import FeedWriter
from pipelines.training.stage import StageJob, train_stage
from pipelines.training.state import result_weights

log = logging.getLogger(__name__)

_INITIAL_SOURCE = "init.txt"
# How much longer than the watchdog's PyTorch waits for other ranks: it would not say for what.
_WATCHDOG_FIRST_S = 300


def weights_are_pinned(folder: ObjectStore) -> bool:
    """Whether a stage's folder holds what it starts from already."""
    return folder.size(_INITIAL_SOURCE) is not None


def provide_initial_weights(
    folder: ObjectStore, model: ModelConfig, seed: int, reference: str | None, tracking_uri: str | None
) -> str:
    """Pin what a stage starts from in its folder, once: an alias may move, a file may be replaced.

    Returns what was pinned, for the lineage: "models:/NAME/N", a file with the first 16 hex digits of its SHA-256, or
    "random".

    Args:
        folder: of the stage, on storage.
        model: to build.
        seed: of the random weights.
        reference: models:/…, .pth or .safetensors to take the weights from; None leaves them random.
        tracking_uri: of the registry that knows models:/… references.
    """
    if weights_are_pinned(folder):
        return folder.read(_INITIAL_SOURCE).decode()
    source = "random"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initial = GMFlow(model.build())
    with tempfile.TemporaryDirectory(prefix="gmflow-init-") as scratch:
        if reference is not None:
            fetched, source = fetch_weights(reference, Path(scratch), tracking_uri)
            with telling(reference, fetched):
                load_weights(initial, fetched)
        path = Path(scratch) / f"pinned-{INITIAL_WEIGHTS}"
        save_weights(initial, path)
        folder.upload(path, INITIAL_WEIGHTS)
    folder.write(_INITIAL_SOURCE, source.encode())  # last: it says that the weights are there
    return source


def room_for_workers(machine: MachineConfig, nodes: Nodes) -> tuple[int, str]:
    """How many workers a cluster holds at once; and what each takes, for a person."""
    alone = machine.placement == "strict_spread"
    each = f"{listed(machine.cpus_per_worker, machine.use_gpu)} each{' on a node of its own' if alone else ''}"
    return slots(nodes, machine.cpus_per_worker, machine.use_gpu, one_a_node=alone), each


def room_lacking(machine: MachineConfig) -> str:
    """What workers will wait for, in a line; empty where the cluster has room for them. Needs a connected Ray.

    No error: a cluster may grow, or be waited for by somebody who starts another machine.
    """
    fewest = machine.min_workers or machine.num_workers
    fitting, each = room_for_workers(machine, nodes())
    if fitting >= fewest:
        return ""
    placed = ", machine.placement" if machine.placement == "strict_spread" else ""
    return (
        f"waits for room: {fewest} worker(s) need {each}, the cluster holds {fitting} such; add machines, or change "
        f"machine.num_workers, machine.cpus_per_worker{placed} or machine.use_gpu"
    )


def fit_stage(job: StageJob, name: str, callbacks: Sequence[UserCallback] = ()) -> dict[str, Any]:
    """Train a stage on Ray to its end, resuming what storage holds of it. Its initial weights must be in its folder.

    Workers that leave a machine about to be taken away end early; they are started again, elsewhere, also where they
    had come to nothing new yet. So are those that failed, `machine.max_failures` times without a new checkpoint in
    between.

    Args:
        job: what the workers are told.
        name: of the run on Ray; the last part of `job.folder`.
        callbacks: Ray Train's, such as the one that reports to Ray Tune.

    Returns the snapshot of the last step.
    Raises an error of ours: what a worker met, or that workers failed too often.
    """
    checkpoints = CheckpointStore(open_store(job.folder))
    feed = FeedWriter(job.feed)
    newest = checkpoints.newest(log.warning)
    while newest is None or not state.is_complete(newest, job.stage.steps):
        departures = feed.departures()
        failure = _fit(job, name, callbacks)
        before, newest = newest, checkpoints.newest(log.warning)
        if _progress(newest) > _progress(before) and (failure is None or job.machine.max_failures):
            continue
        if failure is None and feed.departures() > departures:
            continue
        if failure is not None:
            raise _failed_too_often(job, failure) from failure
        raise PipelineError(f"stage {job.stage.name}: ended without a new checkpoint; see Ray's logs")
    return newest


def _progress(snapshot: dict[str, Any] | None) -> tuple[int, int]:
    return (0, 0) if snapshot is None else (snapshot["step"], snapshot["validated"])


def _failed_too_often(job: StageJob, failure: TrainingFailedError) -> PipelineError:
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[-1][:300]
    allowed = job.machine.max_failures
    if allowed:
        told = f"workers failed {allowed + 1} times without a new checkpoint, the last: {reason}"
    else:
        told = f"a worker failed: {reason}"
    return PipelineError(
        f"stage {job.stage.name}: {told} (machine.max_failures {allowed}); the same command goes on from the newest "
        "checkpoint"
    )


def _fit(job: StageJob, name: str, callbacks: Sequence[UserCallback]) -> TrainingFailedError | None:
    """One run of Ray Train; returns what its workers failed of, if they failed too often. Raises errors of ours."""
    machine = job.machine
    fewest = machine.min_workers or machine.num_workers
    trainer = TorchTrainer(
        train_stage,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=int(machine.hang_timeout_s) + _WATCHDOG_FIRST_S),
        scaling_config=ScalingConfig(
            num_workers=machine.num_workers if fewest == machine.num_workers else (fewest, machine.num_workers),
            use_gpu=machine.use_gpu,
            resources_per_worker={"CPU": machine.cpus_per_worker, **({"GPU": 1} if machine.use_gpu else {})},
            placement_strategy=machine.placement.upper(),
            elastic_resize_monitor_interval_s=machine.grow_interval_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=job.folder.rpartition("/")[0],
            failure_config=FailureConfig(max_failures=machine.max_failures),
            callbacks=list(callbacks),
        ),
    )
    try:
        _train_interruptibly(trainer)
    except TrainingFailedError as error:
        if (mine := _user_error(error)) is not None:
            raise mine from error
        log.warning("stage %s: %s", job.stage.name, error)
        return error
    if (end := FeedWriter(job.feed).gave_up_for()) is not None:
        raise end
    return None


def _train_interruptibly(trainer: TorchTrainer) -> None:
    """`trainer.fit()` with Ctrl-C as a KeyboardInterrupt at once, as everywhere.

    In the main thread Ray Train takes it for itself: it does nothing about it as long as workers wait for room, and
    exits without a word when they have ended. Here who connected to Ray ends them, by leaving it.
    """
    ended: Future[None] = Future()

    def train() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=train, name="ray-train", daemon=True).start()
    ended.result()


def _user_error(error: BaseException | None) -> Exception | None:
    """An error of ours that Ray carried home inside its own."""
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
    """Write the weights a stage ends with to `path`; returns the newest value of every metric.

    Args:
        last: of `fit_stage`.
        model: as it was trained.
        path: a `.safetensors` file.
    """
    final = GMFlow(model.build())
    final.load_state_dict(result_weights(last))
    save_weights(final, path)
    newest = {name: value for _, metrics in last["records"] for name, value in metrics.items()}
    measured = {name for step, metrics in last["records"] if step == last["step"] for name in metrics}
    # What an earlier validation found is not of these weights.
    return {name: value for name, value in newest.items() if name in measured or not name.startswith("val/")}
