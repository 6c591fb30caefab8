"""The sweep's config: what is probed, how cost is measured, what is tuned, and how the best are registered."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from datasets_etl.manifest import Manifest
from gmflow import GMFlowConfig, GMFlowError
from gmflow.config import GLOBAL
from pipelines.config_file import Frozen, RunName, Seed
from pipelines.errors import PipelineError
from pipelines.sweeping.settings import Setting, check_crop, check_size, grid_settings
from pipelines.training.config import MlflowConfig, ModelConfig, StageConfig, not_reserved_alias
from pipelines.training.data_config import DataName, MetricConfig, PartConfig, SetConfig, check_given, check_named_once
from pipelines.training.machine_config import MachineConfig
from pipelines.wording import counted


class GridConfig(Frozen):
    """Values to combine. A field that is left out stays as in the config's model.

    Attributes:
        attn_splits: for each scale, coarse to fine, the numbers of windows on a side to try.
        corr_radius: matching radii of the second scale to try; a model of one scale matches globally.
        prop_radius: propagation radii of the last scale to try.
    """

    attn_splits: tuple[tuple[PositiveInt, ...], ...] | None = None
    corr_radius: tuple[int, ...] | None = None
    prop_radius: tuple[int, ...] | None = None

    @pydantic.model_validator(mode="after")
    def _values_differ(self) -> Self:
        """Without a value there is nothing to try, and with one twice two trials would share a folder."""
        for name, values in self:
            for some in (values or ()) if name == "attn_splits" else (values,):
                if isinstance(some, tuple) and not 0 < len(set(some)) == len(some):
                    raise ValueError(f"{name}: {list(some)}: give at least one value, and each once")
        return self

    def settings(self, reference: Setting) -> list[Setting]:
        return grid_settings(reference, self.attn_splits, self.corr_radius, self.prop_radius)


class RangeConfig(Frozen):
    """A range that is searched on a logarithmic scale.

    Attributes:
        low, high: its ends.
    """

    low: PositiveFloat
    high: PositiveFloat

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class SpaceConfig(GridConfig):
    """What trials differ in. A field that is left out stays as in the config's model and stage.

    Attributes:
        peak_lr: learning rates to try, or a range of them.
        num_layers: numbers of transformer blocks to try.
        feature_channels: channels of features and tokens to try.
    """

    peak_lr: tuple[PositiveFloat, ...] | RangeConfig | None = None
    num_layers: tuple[PositiveInt, ...] | None = None
    feature_channels: tuple[PositiveInt, ...] | None = None

    @property
    def changes_layout(self) -> bool:
        """Whether trials differ in the shapes of their weights."""
        return self.num_layers is not None or self.feature_channels is not None


class ProbeConfig(Frozen):
    """The probe: it scores the weights at every setting of a grid, without training.

    Attributes:
        grid: the settings; the setting of the config's model is always added, as the reference.
        validation: the sets to score on.
        cpus: number of CPUs of a task, and of its threads.
        use_gpu: whether a task gets a GPU too.
    """

    grid: GridConfig
    validation: tuple[SetConfig, ...] = Field(min_length=1)
    cpus: PositiveInt = 1
    use_gpu: bool = False

    @pydantic.model_validator(mode="after")
    def _sets_differ(self) -> Self:
        check_named_once(self.validation, "probe")
        return self


class CostConfig(Frozen):
    """How latency and memory are measured: one pair at a time, settings in turn, in one separate process.

    Attributes:
        height, width: size of the images, before they are padded as the setting needs.
        rounds: number of timings of each setting; the median counts. A new process first warms up each setting.
        cpus: number of threads, and of CPUs reserved for them.
        use_gpu: whether to measure on a GPU.
        clock: "wall"; or "cpu", for a machine that others use too: processor time, summed over all threads.
    """

    height: PositiveInt = 436
    width: PositiveInt = 1024
    rounds: PositiveInt = 5
    cpus: PositiveInt = 1
    use_gpu: bool = False
    clock: Literal["wall", "cpu"] = "wall"

    @pydantic.model_validator(mode="after")
    def _clock_fits(self) -> Self:
        if self.use_gpu and self.clock == "cpu":
            raise ValueError("clock cpu counts processor time, which tells nothing of a GPU; use wall")
        return self

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


class TuneConfig(Frozen):
    """Trials: variants of one stage, trained as the curriculum trains its stages.

    Attributes:
        stage: the stage of every trial, except for what `space` changes.
        machine: machine config of one trial.
        space: what trials differ in.
        start: "trained": trials start from the sweep's weights; "random": from random weights.
        searcher: "grid": try every point of the space; "random" and "optuna": try `trials` points of it.
        trials: maximum number of trials; None (only for a grid): all points.
        seeds: how many settings from the probe's front are tried first, best first.
        scheduler: "asha" stops trials that fall behind the others; "none" stops no trial.
        grace_steps: no trial is stopped before this many steps; None: before its first validation.
        reduction_factor: ASHA's factor: one trial in this many continues from each rung to the next.
        max_concurrent: maximum number of trials at a time; None: as many as the cluster holds.
    """

    stage: StageConfig
    machine: MachineConfig = MachineConfig()
    space: SpaceConfig
    start: Literal["trained", "random"] = "trained"
    searcher: Literal["grid", "random", "optuna"] = "grid"
    trials: PositiveInt | None = None
    seeds: NonNegativeInt = 3
    scheduler: Literal["asha", "none"] = "asha"
    grace_steps: PositiveInt | None = None
    reduction_factor: float = Field(default=3, gt=1)
    max_concurrent: PositiveInt | None = None

    @pydantic.model_validator(mode="after")
    def _search_is_possible(self) -> Self:
        if self.searcher == "grid" and isinstance(self.space.peak_lr, RangeConfig):
            raise ValueError(
                "space.peak_lr: a grid needs values, such as [1e-4, 2e-4]; ranges are for random and optuna"
            )
        if self.searcher != "grid" and self.trials is None:
            raise ValueError(f"trials is missing: how many trials may {self.searcher} take?")
        if self.searcher == "optuna" and all(values is None for _, values in self.space):
            raise ValueError("space is empty: between what may optuna choose?")
        if self.start == "trained" and self.space.changes_layout:
            raise ValueError(
                "space: num_layers and feature_channels change the weights' layout, so no trained weights fit all "
                "trials; set tune.start=random, or leave them out"
            )
        if self.stage.gates:
            raise ValueError("stage.gates: nothing is built on a trial, so nothing waits at a gate; leave them out")
        if self.grace >= self.stage.steps and self.scheduler == "asha":
            raise ValueError(
                f"asha stops nothing: it may act from step {self.grace} of {self.stage.steps} on; "
                "set stage.validate_every or grace_steps lower, or scheduler=none"
            )
        return self

    @property
    def grace(self) -> int:
        return self.grace_steps or self.stage.validate_every or self.stage.steps


class RegistrationConfig(Frozen):
    """The best finished trials become model versions; the sweep's name becomes an alias of the very best.

    Attributes:
        best: how many trials. `champion` moves as in the curriculum: if the objective is better than the champion's.
    """

    best: PositiveInt = 1


class SweepConfig(Frozen):
    """A whole sweep.

    Attributes:
        name: name of its MLflow run and of its folder on storage; the names of its trials' Ray runs begin with it.
        storage: URL or path; every node must be able to reach it.
        data: name → manifest URL.
        model: the architecture; its windows and radii are the reference setting.
        weights: models:/…, .pth or .safetensors: the weights that are probed and that trials start from.
        objective: the metric that defines "best" (lower is better), of a set that is validated on.
        seed: seed of random points, and of trials.
        precision: precision of forward passes.
        cluster_grows: whether machines are added on demand, so that work without room waits instead of being refused.
        probe: scores the weights at every setting of a grid; None: no probe.
        cost: how latency and memory are measured.
        tune: trials; None: nothing is trained.
        registration: which trials become model versions; None: none does.
        mlflow: where runs and models go.
    """

    name: RunName
    storage: str
    data: dict[DataName, str | None]
    objective: MetricConfig
    model: ModelConfig = ModelConfig(variant="refine")
    weights: str | None = None
    seed: Seed = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    cluster_grows: bool = False
    probe: ProbeConfig | None = None
    cost: CostConfig = CostConfig()
    tune: TuneConfig | None = None
    registration: RegistrationConfig | None = None
    mlflow: MlflowConfig = MlflowConfig()

    @pydantic.model_validator(mode="after")
    def _references_hold(self) -> Self:
        if self.probe is None and self.tune is None:
            raise ValueError("neither probe nor tune: nothing to do")
        if self.weights is None and self.probe is not None:
            raise ValueError("weights is missing: which model is probed? Give models:/…, a .pth or a .safetensors")
        if self.weights is None and self.tune is not None and self.tune.start == "trained":
            raise ValueError("weights is missing: give what trials start from, or set tune.start=random")
        if self.cluster_grows and self.tune is not None and self.tune.max_concurrent is None:
            raise ValueError("tune.max_concurrent is missing: for how many trials at once may the cluster grow?")
        for used in self.reads:
            if used.data not in self.data:
                raise ValueError(f"no data {used.data!r}; data has {', '.join(self.data)}")
        check_given(self.data, self.reads)
        for phase, chosen in self._validated:
            if self.objective.set_name not in [one.name for one in chosen]:
                raise ValueError(f"{phase}.validation lacks {self.objective.set_name}, the objective; add it")
        name = self.objective.set_name
        cuts = {one.cut: None for _, chosen in self._validated for one in chosen if one.name == name}
        if len(cuts) > 1:
            raise ValueError(
                f"probe.validation and tune.stage.validation hold different pairs of {name}, the objective "
                f"({' / '.join(cut or 'all' for cut in cuts)}), so their figures cannot be compared; give both the same"
            )
        if self.registration is not None:
            not_reserved_alias(self.name)  # it becomes one
        self._check_space()
        return self

    def _check_space(self) -> None:
        """Check, before anything starts, that all settings fit the model, and trials' settings the crop."""
        scales = self.model.build().num_scales
        for phase, grid in self._grids:
            if grid.attn_splits is not None and len(grid.attn_splits) != scales:
                given = counted(len(grid.attn_splits), "list")
                raise ValueError(f"{phase}.attn_splits holds {given}; this model has {counted(scales, 'scale')}")
            if grid.corr_radius is not None and scales == 1:
                raise ValueError(f"{phase}.corr_radius: a model of one scale matches globally; leave it out")
            for name in ("corr_radius", "prop_radius"):
                for value in getattr(grid, name) or ():
                    if value < 1 and not (value == GLOBAL and scales == 1):
                        alone = ", and -1 (global)" if scales == 1 else ""
                        raise ValueError(
                            f"{phase}.{name}: {value} makes no sense; valid are whole numbers from 1{alone}"
                        )
        if self.tune is not None:
            machine, stage = self.tune.machine, self.tune.stage
            if machine.num_workers > stage.global_batch:
                raise ValueError(
                    f"tune: stage.global_batch {stage.global_batch} cannot feed machine.num_workers "
                    f"{machine.num_workers}; each worker needs a sample a step"
                )
            try:
                for setting in self.tune.space.settings(self.reference):
                    check_crop(setting.on(self.architecture), stage.crop, f"tune.space at {setting.splits}")
                for channels in self.tune.space.feature_channels or ():
                    self.model.model_copy(update={"feature_channels": channels}).build()
            except (PipelineError, GMFlowError) as error:
                raise ValueError(str(error)) from None

    def check_sizes(self, manifests: Mapping[str, Manifest]) -> None:
        """Check every setting on every image size it will meet. Raises PipelineError, which lists the valid values."""
        for phase, settings, chosen in self._evaluated:
            sizes = {f"the cost's size ({phase})": {self.cost.size}}
            for one in chosen:
                sizes[f"{phase} on {one.name}"] = image_sizes(manifests[one.data], one)
            for setting, (where, found) in itertools.product(settings, sizes.items()):
                for size in sorted(found):
                    check_size(setting.on(self.architecture), size, f"{where} at {setting.splits}")

    @property
    def architecture(self) -> GMFlowConfig:
        return self.model.build()

    @property
    def reference(self) -> Setting:
        """The setting that others are compared with: that of the config's model."""
        return Setting.of(self.architecture)

    @property
    def probed(self) -> list[Setting]:
        """The grid's settings, the reference among them."""
        if self.probe is None:
            return []
        return list(dict.fromkeys([*self.probe.grid.settings(self.reference), self.reference]))

    @property
    def storage_patience_s(self) -> float:
        """For how many seconds storage that is down is waited for."""
        return (self.tune.machine if self.tune else MachineConfig()).storage_patience_s

    @property
    def metric(self) -> str:
        """The name of the objective in the metrics that workers report."""
        return self.objective.name

    @property
    def reads(self) -> tuple[PartConfig | SetConfig, ...]:
        """Every subset the sweep reads."""
        probe = self.probe.validation if self.probe else ()
        return (*probe, *(self.tune.stage.reads if self.tune else ()))

    @property
    def _validated(self) -> list[tuple[str, Sequence[SetConfig]]]:
        found: list[tuple[str, Sequence[SetConfig]]] = []
        if self.probe is not None:
            found.append(("probe", self.probe.validation))
        if self.tune is not None:
            found.append(("tune.stage", self.tune.stage.validation))
        return found

    @property
    def _grids(self) -> list[tuple[str, GridConfig]]:
        found: list[tuple[str, GridConfig]] = []
        if self.probe is not None:
            found.append(("probe.grid", self.probe.grid))
        if self.tune is not None:
            found.append(("tune.space", self.tune.space))
        return found

    @property
    def _evaluated(self) -> list[tuple[str, list[Setting], Sequence[SetConfig]]]:
        found: list[tuple[str, list[Setting], Sequence[SetConfig]]] = []
        if self.probe is not None:
            found.append(("probe", self.probed, self.probe.validation))
        if self.tune is not None:
            found.append(("tune", self.tune.space.settings(self.reference), self.tune.stage.validation))
        return found


def image_sizes(manifest: Manifest, chosen: SetConfig) -> set[tuple[int, int]]:
    """The sizes (height, width) of a set's images, in pixels."""
    entries = (manifest.samples[int(number)] for number in chosen.indices(manifest))
    return {(entry.height, entry.width) for entry in entries}
