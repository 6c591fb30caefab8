"""The time and memory of a stage's steps, measured on one worker without training anything."""

import math
import time
from dataclasses import dataclass
from statistics import median

import ray
import torch

from gmflow import GMFlow
from gmflow.execution import prepare_model
from gmflow.loss import sequence_loss
from gmflow.replay import WARM_UPS
from pipelines.cluster import nodes, slots
from pipelines.task_results import fetched
from pipelines.training.config import CurriculumConfig, StageConfig
from pipelines.training.memory import is_lack_of_memory, peak_bytes

_REPEATS = 2
_PATIENCE_S = 120


@dataclass(frozen=True)
class StepCost:
    """The cost of one step of a worker: computing time in seconds, and peak memory of its process in GiB."""

    step_s: float
    memory_gib: float


class TooLargeError(Exception):
    """A micro-batch does not fit into a worker's memory."""


def estimate(config: CurriculumConfig, stage: StageConfig) -> StepCost | None:
    """Measure the forward and backward pass of a micro-batch on a worker of this Ray.

    Returns None if no node is large enough for a worker, or if this took longer than `_PATIENCE_S`: others use the
    resources, or the pass is slow.

    Raises:
        TooLargeError: the micro-batch does not fit into memory.
        GMFlowError: the model cannot be run as configured.
    """
    machine = config.machine
    if not slots(nodes(), machine.cpus_per_worker, machine.use_gpu):
        return None
    measure = _measure.options(num_cpus=machine.cpus_per_worker, num_gpus=float(machine.use_gpu))
    measuring = measure.remote(config, stage)
    ready, _ = ray.wait([measuring], timeout=_PATIENCE_S)
    if not ready:
        ray.cancel(measuring, force=True)
        return None
    try:
        micro_batch_s, memory_gib = fetched(measuring)
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError) as error:
        raise TooLargeError from error
    except ray.exceptions.RayTaskError as error:
        if is_lack_of_memory(error.cause):
            raise TooLargeError from error
        raise
    a_rank = math.ceil(stage.global_batch / machine.num_workers)
    return StepCost(micro_batch_s * a_rank / min(machine.micro_batch, a_rank), memory_gib)


@ray.remote(max_calls=1, max_retries=0)  # Ray would retry for ever what it kills for its memory, and tell of none
def _measure(config: CurriculumConfig, stage: StageConfig) -> tuple[float, float]:
    """Seconds of one micro-batch, and peak GiB of this process, which runs nothing else (`max_calls=1`)."""
    machine = config.machine
    device = torch.device("cuda" if machine.use_gpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(machine.cpus_per_worker)
    model = GMFlow(config.model.build())
    prepared = prepare_model(model, machine.execution(config.precision), device).train()
    batch = min(machine.micro_batch, math.ceil(stage.global_batch / machine.num_workers))
    frames = torch.zeros(batch, 3, *stage.crop, device=device)
    flow = torch.zeros(batch, 2, *stage.crop, device=device)
    valid = torch.ones(batch, *stage.crop, dtype=torch.bool, device=device)
    seconds = []
    warm_ups = WARM_UPS if machine.use_gpu else 1
    for _ in range(warm_ups + _REPEATS):
        before = time.perf_counter()
        predictions = prepared(frames, frames).predictions
        loss = sequence_loss(
            predictions, flow, valid, gamma=stage.gamma, max_flow=stage.max_flow, normalizer=float(batch)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - before)
    return median(seconds[warm_ups:]), peak_bytes(device) / 2**30
