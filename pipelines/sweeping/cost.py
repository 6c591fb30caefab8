"""What a setting costs: latency and peak memory of one forward pass at a given image size.

One process measures everything, on the CPUs or GPU reserved for it, while nothing else of the sweep runs. Settings take
turns: a round times each of them once, and every other round runs backwards, so that a disturbance of the machine
affects all alike. Every figure is stored as soon as it is measured; figures for another machine, image size, thread
count, clock or precision are stored separately.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError

from datasets_etl.objects import ObjectStore
from gmflow import GMFlow, GMFlowConfig
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from gmflow.predict import padded_flow
from gmflow.replay import WARM_UPS
from pipelines.entry import last_line
from pipelines.errors import OutageError
from pipelines.sweeping.config import CostConfig
from pipelines.task_results import fetched
from pipelines.training.memory import explaining_out_of_memory
from pipelines.wording import counted

_METERS = 4  # at most this many processes, each started because the one before was lost


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass.

    Attributes:
        latency_ms: median over the rounds.
        latency_q1_ms, latency_q3_ms: quartiles over the rounds: half of the timings lie between them.
        peak_mib: the most memory that torch held for tensors at once, beyond the weights and the two images.
    """

    latency_ms: float
    latency_q1_ms: float
    latency_q3_ms: float
    peak_mib: float


OnMeasured = Callable[[str], None]


def measure_costs(
    store: ObjectStore,
    models: Mapping[GMFlowConfig, str],
    config: CostConfig,
    precision: Precision,
    on_measured: OnMeasured,
) -> dict[GMFlowConfig, Cost]:
    """The cost of each model; weights do not matter, so they are random. Measures what storage does not hold yet.

    If the measuring process is lost (it was killed, or its machine was lost), another one replaces it.

    Args:
        store: the sweep's folder on storage.
        models: each model, with its name for messages.
        config: how to measure.
        precision: precision of the forward pass.
        on_measured: called with a line for every timing, and for every lost process.

    Raises OutageError if the process was lost too often.
    """
    lost = 0
    while True:
        try:
            return _measure_with_one_meter(store, models, config, precision, on_measured)
        except (RayActorError, OutOfMemoryError) as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise  # another process would not start either
            lost += 1
            if lost == _METERS:
                raise OutageError(
                    f"cost: the process that measures was lost {counted(lost, 'time')}, the last: {last_line(error)}; "
                    "what it timed is kept, and the same command goes on"
                ) from error
            on_measured("cost: the process that measures was lost; another goes on as soon as there is room for it")


def _measure_with_one_meter(
    store: ObjectStore,
    models: Mapping[GMFlowConfig, str],
    config: CostConfig,
    precision: Precision,
    on_measured: OnMeasured,
) -> dict[GMFlowConfig, Cost]:
    meter = _Meter.options(  # type: ignore[attr-defined]
        num_cpus=config.cpus, num_gpus=1 if config.use_gpu else 0
    ).remote(config, precision)
    try:
        machine = ray.get(meter.machine.remote())
        known = {model: _Record.load(store, _key(model, config, precision, machine)) for model in models}
        for number in range(config.rounds):
            due = [model for model, record in known.items() if len(record.seconds) <= number]
            for count, model in enumerate(due if number % 2 == 0 else due[::-1], start=1):
                peak, seconds = fetched(meter.measure.remote(model))
                known[model].add(store, peak, seconds, model, machine)
                progress = f"round {number + 1}/{config.rounds} {count}/{len(due)}"
                on_measured(f"cost {progress} {models[model]} {1000 * seconds:.0f} ms")
    finally:
        ray.kill(meter)
    return {model: record.cost() for model, record in known.items()}


def _key(model: GMFlowConfig, config: CostConfig, precision: Precision, machine: Mapping[str, str]) -> str:
    how = [config.height, config.width, config.cpus, config.clock, precision]
    content = json.dumps([model.to_dict(), how, dict(machine)], sort_keys=True)
    return f"cost/{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"


@dataclass
class _Record:
    """The measurements of one model that storage holds."""

    key: str
    peak_bytes: int
    seconds: list[float]

    @classmethod
    def load(cls, store: ObjectStore, key: str) -> "_Record":
        if store.size(key) is None:
            return cls(key, 0, [])
        content = json.loads(store.read(key))
        return cls(key, content["peak_bytes"], content["seconds"])

    def add(
        self, store: ObjectStore, peak: int, seconds: float, model: GMFlowConfig, machine: Mapping[str, str]
    ) -> None:
        self.peak_bytes = peak
        self.seconds.append(seconds)
        facts = {"model": model.to_dict(), "machine": dict(machine)}
        content = {**facts, "peak_bytes": self.peak_bytes, "seconds": self.seconds}
        store.write(self.key, json.dumps(content).encode())

    def cost(self) -> Cost:
        first, median, third = (float(1000 * found) for found in np.percentile(self.seconds, (25, 50, 75)))
        return Cost(median, first, third, self.peak_bytes / 2**20)


@ray.remote(max_restarts=0)
class _Meter:
    def __init__(self, config: CostConfig, precision: Precision) -> None:
        torch.set_num_threads(config.cpus)
        self.config = config
        self.precision = precision
        self.device = torch.device("cuda" if config.use_gpu else "cpu")
        generator = torch.Generator().manual_seed(0)
        size = (2, 1, 3, config.height, config.width)
        self.images = (255 * torch.rand(size, generator=generator)).to(self.device)
        self.peaks: dict[GMFlowConfig, int] = {}

    def machine(self) -> dict[str, str]:
        """What figures must have in common to be comparable."""
        device = torch.cuda.get_device_name() if self.config.use_gpu else _processor()
        return {"device": device, "torch": torch.__version__}

    def measure(self, model: GMFlowConfig) -> tuple[int, float]:
        """(peak bytes, seconds); the first pass of a model in this process warms up and measures its peak memory.

        Raises PipelineError if a GPU's memory does not suffice.
        """
        place = f"cost at {self.config.height}×{self.config.width}"
        with explaining_out_of_memory(place, "precision=bf16, or smaller cost.height and cost.width"):
            return self._measured(model)

    def _measured(self, model: GMFlowConfig) -> tuple[int, float]:
        built = GMFlow(model).eval()
        prepare_model(built, ExecutionConfig(self.precision, replay=True), self.device, keep_freed_memory=False)
        if model not in self.peaks:
            self.peaks[model] = self._peak_bytes(built)
        if self.config.use_gpu:  # every time: a newly built model has no recordings yet
            for _ in range(WARM_UPS):
                self._forward(built)
        now = time.process_time if self.config.clock == "cpu" else time.perf_counter
        start = now()
        self._forward(built)
        return self.peaks[model], now() - start

    def _forward(self, model: GMFlow) -> None:
        with torch.inference_mode():
            padded_flow(model, *self.images)
        if self.config.use_gpu:
            torch.cuda.synchronize()

    def _peak_bytes(self, model: GMFlow) -> int:
        if self.config.use_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._forward(model)
            return torch.cuda.max_memory_allocated() - before
        return _allocated_on_cpu(lambda: self._forward(model))


def _allocated_on_cpu(run: Callable[[], None]) -> int:
    """Peak bytes allocated at once by torch's CPU allocator: what `torch.cuda.max_memory_allocated` gives for a GPU.

    Resident memory would depend on how the system's allocator happened to keep its pages: it differs between runs by
    more than between settings.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return _highest([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])


def _highest(changes: Sequence[int]) -> int:
    level = highest = 0
    for change in changes:
        level += change
        highest = max(highest, level)
    return highest


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
