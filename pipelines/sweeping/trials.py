"""Trials: what each one is, in which order they come, and what storage keeps of them.

A trial's name contains a hash of everything that determines it, so the same config finds the same trials again. Its
folder is that of its stage, with three more files: `trial.json` (what it is, and its number in the search),
`history.json` (its validations so far), and `result.json` (how it ended), which is written last.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store
from pipelines.sweeping.accuracy import Weights
from pipelines.sweeping.config import RangeConfig, SweepConfig, TuneConfig
from pipelines.sweeping.settings import Setting
from pipelines.training.config import ModelConfig, StageConfig

_TRIAL = "trial.json"
_HISTORY = "history.json"
_RESULT = "result.json"

Point = dict[str, float]
"""A point of the space: dimension → value. Dimensions are named as in MLflow: attn_splits_1, corr_radius, peak_lr, …"""

_MOST_REPEATS = 100


@dataclass(frozen=True)
class Trial:
    """One point of the space as a stage. `key` identifies everything that determines it; `folder` is its URL."""

    name: str
    key: str
    point: Point
    model: ModelConfig
    stage: StageConfig
    folder: str


@dataclass(frozen=True)
class TrialPlan:
    """What all trials share; it is sent to their drivers.

    Attributes:
        config: config of the sweep.
        weights: the weights that trials start from; None: random.
        data: name → manifest URL of what trials read.
        versions: name → manifest version.
        folder: URL of the trials' folders.
        feed: name of the queue the sweep's driver listens to.
    """

    config: SweepConfig
    weights: Weights | None
    data: dict[str, str]
    versions: dict[str, str]
    folder: str
    feed: str

    @property
    def tune(self) -> TuneConfig:
        assert self.config.tune is not None
        return self.config.tune

    def trial(self, point: Mapping[str, float]) -> Trial:
        """The trial at a point."""
        setting = setting_of(point, self.config.reference)
        model = self.config.model.model_copy(
            update={**asdict(setting), **_chosen(point, ("num_layers", "feature_channels"))}
        )
        stage = self.tune.stage.model_copy(update=_chosen(point, ("peak_lr",)))
        versions = {used.data: self.versions[used.data] for used in stage.reads}
        start = "random" if self.weights is None else self.weights.version
        decides = [*stage_identity(stage), model.build().to_dict(), versions, start]
        content = json.dumps([*decides, self.config.seed, self.config.precision], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:12]
        name = f"{setting.name}-{key[:6]}"
        return Trial(name, key, dict(point), model, stage, f"{self.folder}/{self.config.name}-{setting.name}-{key}")


def stage_identity(stage: StageConfig) -> list[Any]:
    """The part of a stage that determines a trial's metrics: the recipe, and what is validated when."""
    return [stage.recipe(), stage.model_dump(mode="json", include={"validation", "validate_every"})]


def _chosen(point: Mapping[str, float], names: Sequence[str]) -> Point:
    return {name: point[name] for name in names if name in point}


def setting_of(point: Mapping[str, float], reference: Setting) -> Setting:
    """The setting of a point; dimensions it lacks are taken from the reference."""
    splits = tuple(
        int(point.get(f"attn_splits_{scale}", value)) for scale, value in enumerate(reference.attn_splits, start=1)
    )
    corr, prop = (int(point.get(name, getattr(reference, name)[-1])) for name in ("corr_radius", "prop_radius"))
    return Setting(splits, (*reference.corr_radius[:-1], corr), (*reference.prop_radius[:-1], prop))


def dimensions(tune: TuneConfig) -> dict[str, tuple[float, ...] | RangeConfig]:
    """What trials differ in, by name: values to choose from, or a range."""
    space = tune.space
    found: dict[str, tuple[float, ...] | RangeConfig] = {}
    for scale, values in enumerate(space.attn_splits or (), start=1):
        found[f"attn_splits_{scale}"] = values
    for name in ("corr_radius", "prop_radius", "peak_lr", "num_layers", "feature_channels"):
        chosen = getattr(space, name)
        if chosen is not None:
            found[name] = chosen
    return found


def all_points(tune: TuneConfig) -> list[Point]:
    """All points of a space of values; none if a dimension is a range."""
    space = dimensions(tune)
    values = [values for values in space.values() if not isinstance(values, RangeConfig)]
    if len(values) < len(space):
        return []
    return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*values)]


def seed_points(config: SweepConfig, settings: Sequence[Setting]) -> list[Point]:
    """Points of the space at these settings; other dimensions are as near to the config's model and stage as possible.

    Settings outside the space are left out.
    """
    assert config.tune is not None
    space = dimensions(config.tune)
    usual = {
        "peak_lr": config.tune.stage.peak_lr,
        "num_layers": config.architecture.num_layers,
        "feature_channels": config.architecture.feature_channels,
    }
    points = []
    for setting in settings:
        wanted: Mapping[str, float] = setting.point
        point: Point = {}
        for name, values in space.items():
            point[name] = wanted[name] if name in wanted else _nearest(usual[name], values)
        if _is_inside(point, space) and setting_of(point, config.reference) == setting:
            points.append(point)
    return points


def _is_inside(point: Point, space: Mapping[str, tuple[float, ...] | RangeConfig]) -> bool:
    """Whether a point is one of a space's, in exactly its dimensions."""
    return point.keys() == space.keys() and all(
        values.low <= point[name] <= values.high if isinstance(values, RangeConfig) else point[name] in values
        for name, values in space.items()
    )


def _nearest(value: float, values: tuple[float, ...] | RangeConfig) -> float:
    if isinstance(values, RangeConfig):
        return min(max(value, values.low), values.high)
    return min(values, key=lambda one: abs(math.log(one / value)))


def listed_points(config: SweepConfig, seeds: Sequence[Setting], known: Sequence[Point] = ()) -> list[Point]:
    """The points of a grid or random search, in order: those that were tried before, then those at the seeds' settings.

    Without the first, a sweep that goes on with other seeds (costs were measured anew) could leave trained trials out.

    Args:
        config: config of the sweep.
        seeds: settings to try first.
        known: points of announced trials.
    """
    assert config.tune is not None
    if config.tune.searcher == "grid":
        points = all_points(config.tune)
        ranks = {setting: rank for rank, setting in enumerate(seeds)}
        points.sort(key=lambda p: (p not in known, ranks.get(setting_of(p, config.reference), len(ranks))))
        return points[: config.tune.trials]
    points = [*known, *(point for point in seed_points(config, seeds) if point not in known)]
    generator, space = np.random.default_rng(config.seed), dimensions(config.tune)
    repeats = 0
    while len(points) < (config.tune.trials or 0) and repeats < _MOST_REPEATS:
        drawn = {name: _draw(values, generator) for name, values in space.items()}
        if drawn in points:
            repeats += 1
        else:
            points.append(drawn)
            repeats = 0
    if len(points) < (config.tune.trials or 0):  # few are left: they are hardly ever drawn
        points += [point for point in all_points(config.tune) if point not in points]
    return points[: config.tune.trials]


def _draw(values: tuple[float, ...] | RangeConfig, generator: np.random.Generator) -> float:
    if isinstance(values, RangeConfig):
        return float(np.exp(generator.uniform(math.log(values.low), math.log(values.high))))
    return values[int(generator.integers(len(values)))]


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Attributes:
        status: "finished", "stopped" by the scheduler, or "failed".
        reason: why it ended, in a line.
        step: number of steps done.
    """

    status: str
    reason: str = ""
    step: int = 0


@dataclass
class TrialRecords:
    """What storage keeps of one trial. The history holds (step, metrics), oldest first."""

    store: ObjectStore
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: str) -> "TrialRecords":
        """What is there of the trial whose folder has this URL."""
        store = open_store(folder)
        entries = json.loads(store.read(_HISTORY)) if store.size(_HISTORY) is not None else []
        return cls(store, [(step, metrics) for step, metrics in entries])

    @property
    def last_step(self) -> int:
        """Step of the newest validation; 0 if there is none."""
        return self.history[-1][0] if self.history else 0

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Store a validation."""
        self.history = sorted([*self.history, (step, metrics)], key=lambda entry: entry[0])
        self.store.write(_HISTORY, json.dumps(self.history).encode())

    @property
    def result(self) -> TrialResult | None:
        """How the trial ended; None if it has not, or if that was taken back."""
        if self.store.size(_RESULT) is None:
            return None
        content: dict[str, Any] | None = json.loads(self.store.read(_RESULT))
        return None if content is None else TrialResult(**content)

    def end(self, result: TrialResult) -> TrialResult:
        """Store how it ended, and return it. An earlier end is kept, for example if a stopped trial's driver fails."""
        if (earlier := self.result) is not None:
            return earlier
        self.store.write(_RESULT, json.dumps(asdict(result)).encode())
        return result

    def take_back_end(self) -> None:
        """Let the trial go on from its newest checkpoint."""
        self.store.write(_RESULT, b"null")


def announce(trial: Trial, number: int) -> None:
    """Store what the trial is before it starts, so that a continued search tries the same points again."""
    store = open_store(trial.folder)
    if store.size(_TRIAL) is None:
        content = {"name": trial.name, "key": trial.key, "number": number, "point": trial.point}
        store.write(_TRIAL, json.dumps(content).encode())


def announced(plan: TrialPlan) -> list[Trial]:
    """The announced trials that are still trials of this config, in the order in which they came."""
    store = open_store(plan.folder)
    found = []
    for entry in store.walk():
        if entry.key.endswith(f"/{_TRIAL}"):
            content = json.loads(store.read(entry.key))
            if _is_inside(content["point"], dimensions(plan.tune)):
                trial = plan.trial(content["point"])
                if trial.key == content["key"]:
                    found.append((content["number"], trial))
    return [trial for _, trial in sorted(found, key=lambda pair: pair[0])]


def retry_failed(plan: TrialPlan) -> int:
    """Take back the end of every failed trial, so that it resumes from its newest checkpoint. Returns how many."""
    failed = 0
    for trial in announced(plan):
        records = TrialRecords.open(trial.folder)
        if records.result is not None and records.result.status == "failed":
            records.take_back_end()
            failed += 1
    return failed
