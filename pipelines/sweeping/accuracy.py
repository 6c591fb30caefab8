"""The accuracy of trained weights at many settings: Ray tasks score a set, and each result is stored by its inputs.

Settings that differ only in the last scale's radii share every computation before these: backbone and transformer run
once for all of them, and the metrics are those of separate runs, to the bit. Nothing is searched or stopped early here,
so plain Ray tasks are enough: each is a pure function of weights, settings and set, and Tune would only wrap it into an
actor.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from torch import nn

from datasets_etl.ahead import read_ahead
from datasets_etl.manifest import Manifest
from datasets_etl.objects import ObjectStore
from datasets_etl.storage import split_url
from datasets_etl.storage_retries import waiting_for_storage
from gmflow import GMFlow, load_model
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from gmflow.metrics import FlowMetrics
from pipelines.sweeping.config import ProbeConfig
from pipelines.sweeping.settings import Setting
from pipelines.task_results import fetched
from pipelines.training.data_config import SetConfig
from pipelines.training.memory import explaining_out_of_memory
from pipelines.training.validation import score


@dataclass(frozen=True)
class Weights:
    """Weights on storage.

    Attributes:
        url: URL of the `.safetensors`.
        version: the first 16 hex digits of their source's SHA-256.
        source: where they come from: "models:/NAME/N", or a file with the start of its SHA-256.
    """

    url: str
    version: str
    source: str


@dataclass(frozen=True)
class ScoreJob:
    """Settings that differ only in the last scale's radii, to be scored on one set."""

    weights: Weights
    settings: tuple[Setting, ...]
    manifest_url: str
    manifest_version: str
    chosen: SetConfig
    precision: Precision

    def key(self, setting: Setting) -> str:
        """A key that identifies everything that determines a setting's metrics."""
        chosen = self.chosen
        decides = [self.weights.version, asdict(setting), self.manifest_version, chosen.subset, chosen.limit]
        patterns = [chosen.patterns] if chosen.patterns else []
        content = json.dumps([*decides, self.precision, *patterns], sort_keys=True)
        return f"accuracy/{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"


Scores = dict[str, float]
OnScored = Callable[[Setting, SetConfig, Scores], None]


def measure_accuracy(
    store: ObjectStore, jobs: Sequence[ScoreJob], probe: ProbeConfig, storage_patience_s: float, on_scored: OnScored
) -> None:
    """Score what storage does not hold yet; `on_scored` is called for every setting and set, stored or new.

    Tasks take from here how long to wait for storage: they do not inherit the driver's environment.
    """
    waiting: dict[Any, ScoreJob] = {}
    task = score_settings.options(num_cpus=probe.cpus, num_gpus=1 if probe.use_gpu else 0)
    for job in jobs:
        missing = []
        for setting in job.settings:
            stored = _stored(store, job.key(setting))
            if stored is None:
                missing.append(setting)
            else:
                on_scored(setting, job.chosen, stored)
        if missing:
            remaining = replace(job, settings=tuple(missing))
            waiting[task.remote(remaining, probe, storage_patience_s)] = remaining
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        job = waiting.pop(ready)
        for setting, scores in zip(job.settings, fetched(ready), strict=True):
            content = {"setting": asdict(setting), "set": job.chosen.name, "cut": job.chosen.cut, "scores": scores}
            store.write(job.key(setting), json.dumps(content).encode())
            on_scored(setting, job.chosen, scores)


def _stored(store: ObjectStore, key: str) -> Scores | None:
    if store.size(key) is None:
        return None
    scores: Scores = json.loads(store.read(key))["scores"]
    return scores


def score_jobs(
    weights: Weights, settings: Sequence[Setting], chosen: SetConfig, manifest: Manifest, precision: Precision
) -> list[ScoreJob]:
    """One job for each group of settings that share their features."""
    groups: dict[Any, list[Setting]] = {}
    for setting in settings:
        shared = (setting.attn_splits, setting.corr_radius[:-1], setting.prop_radius[:-1])
        groups.setdefault(shared, []).append(setting)
    return [
        ScoreJob(weights, tuple(group), manifest.url, manifest.version, chosen, precision) for group in groups.values()
    ]


@ray.remote(max_retries=3)
def score_settings(job: ScoreJob, probe: ProbeConfig, storage_patience_s: float) -> list[Scores]:
    """The metrics of each of the job's settings; a metric that no pixel counts for (NaN) is left out.

    Raises PipelineError if a GPU's memory does not suffice.
    """
    torch.set_num_threads(probe.cpus)
    lack = explaining_out_of_memory(f"probe on {job.chosen.name}", "precision=bf16, or probe.use_gpu=false")
    with waiting_for_storage(storage_patience_s), lack:
        return _scores(job, torch.device("cuda" if probe.use_gpu else "cpu"))


def _scores(job: ScoreJob, device: torch.device) -> list[Scores]:
    with tempfile.TemporaryDirectory(prefix="gmflow-probe-") as folder:
        store, name = split_url(job.weights.url)
        path = Path(folder) / name
        path.write_bytes(store.read(name))
        models = [load_model(path, **asdict(setting)) for setting in job.settings]
    for model in models:
        prepare_model(model, ExecutionConfig(job.precision), device, keep_freed_memory=False)
    pooled = [FlowMetrics() for _ in models]
    evaluation = job.chosen.build(Manifest.load(job.manifest_url))
    shared = SharedFeatures(models)
    for sample in read_ahead(evaluation[number] for number in range(len(evaluation))):
        for model, metrics in zip(shared.each(), pooled, strict=True):
            for scored in score(model, [sample], device):
                metrics.merge(scored.metrics)
    return [{name: value for name, value in each.compute().items() if value == value} for each in pooled]


class SharedFeatures:
    """Models with the same weights and windows; the first one computes the features for all.

    Backbone and transformer get the same inputs in each of them, because the last scale's radii are used after both.
    """

    def __init__(self, models: Sequence[GMFlow]) -> None:
        self._models = models
        self._parts = [_Once(models[0].backbone), _Once(models[0].transformer)]
        for model in models:
            model.backbone, model.transformer = self._parts  # type: ignore[assignment]

    def each(self) -> Iterator[GMFlow]:
        """The models in turn, for use on one pair of images."""
        for part in self._parts:
            part.forget()
        for model in self._models:
            for part in self._parts:
                part.rewind()
            yield model


class _Once(nn.Module):
    """Stores the results of a sequence of calls, and returns them again after `rewind`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._results: list[Any] = []
        self._next = 0

    def forget(self) -> None:
        self._results.clear()

    def rewind(self) -> None:
        self._next = 0

    def forward(self, *inputs: Any) -> Any:
        if self._next == len(self._results):
            self._results.append(self.inner(*inputs))
        self._next += 1
        return self._results[self._next - 1]
