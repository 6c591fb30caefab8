"""The curriculum's config: frozen pydantic models that reject unknown keys."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from gmflow import GMFlowConfig
from gmflow.execution import Precision
from gmflow.loss import MAX_FLOW
from pipelines.config_file import Frozen, RunName, Seed, spelt
from pipelines.training.data_config import (
    DataName,
    GateConfig,
    MetricConfig,
    PartConfig,
    SetConfig,
    check_given,
    check_named_once,
)
from pipelines.training.machine_config import MachineConfig


class ModelConfig(Frozen):
    """A variant of the model; a field that is None keeps the variant's value.

    Attributes:
        variant: "base": one scale; "refine": a second, finer scale refines the flow of the first.
        backbone_channels: channels of the backbone's three levels, at 1/2, 1/4 and 1/8 of the image.
        feature_channels: channels of features and tokens.
        num_layers: transformer blocks, each of self-attention and cross-attention.
        ffn_expansion: width of the feed-forward's hidden layer, relative to its input.
        attn_splits: windows on a side of each scale, coarse to fine.
        corr_radius: radius of matching at each scale, in feature pixels; -1: over the whole map.
        prop_radius: radius of propagation at each scale, in feature pixels; -1: over the whole map.
    """

    variant: Literal["base", "refine"] = "base"
    backbone_channels: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    feature_channels: PositiveInt | None = None
    num_layers: PositiveInt | None = None
    ffn_expansion: PositiveInt | None = None
    attn_splits: tuple[PositiveInt, ...] | None = None
    corr_radius: tuple[int, ...] | None = None
    prop_radius: tuple[int, ...] | None = None

    def build(self) -> GMFlowConfig:
        """The model library's config. Raises GMFlowError if the values do not describe a valid model."""
        variant = GMFlowConfig.refine() if self.variant == "refine" else GMFlowConfig.base()
        return GMFlowConfig.from_dict(variant.to_dict() | self.model_dump(exclude={"variant"}, exclude_none=True))


def not_reserved_alias(name: str) -> str:
    """Refuses names that the registry reserves: that of a stage or sweep becomes an alias of its model."""
    if name in ("champion", "latest") or re.fullmatch(r"v\d+", name):
        raise ValueError(f"{name!r} means something else in the model registry; give another name")
    return name


class StageConfig(Frozen):
    """One stage of the curriculum: the recipe (which determines the weights), and how training is monitored.

    Attributes:
        name: names its runs, its folder on storage, and the alias of its model.
        steps: updates of the weights.
        global_batch: samples of a step, over all workers.
        peak_lr: highest learning rate: AdamW, one cycle, up and down along a cosine.
        crop: (height, width) of the samples, pixels.
        mixture: what it is trained on; an epoch is all parts, as often as they are repeated, in one shuffle.
        weight_decay: AdamW's.
        warmup: share of the steps in which the learning rate rises to its peak.
        clip_norm: gradients of a larger norm are scaled down to it.
        gamma: weight of a prediction in the loss, relative to that of the next, finer one.
        max_flow: pixels whose true flow is this long (px) or longer do not count in the loss.
        ema_decay: decay of an exponential moving average of the weights, which is validated and registered instead of
            the last weights. None: no average.
        max_skipped_in_a_row: the stage ends after this many steps in a row with a loss or gradient that is not finite.
        validation: the sets it is validated on, and from which `gates`, `keep_best` and the promotion take figures.
        validate_every: steps from one validation to the next; None: only after the last.
        checkpoint_every: steps from one checkpoint to the next; at most so many are lost when a worker is killed.
        keep_last: number of newest checkpoints to keep.
        keep_best: also keep the checkpoint whose validation was best by this metric.
        log_every: steps from one record of the metrics to the next.
        gates: what it must reach for the curriculum to go on.
    """

    name: Annotated[
        str,
        spelt(r"[a-z][a-z0-9_-]{0,99}", "100 lower-case letters, digits, - and _ at most, a letter first"),
        pydantic.AfterValidator(not_reserved_alias),
    ]
    steps: PositiveInt
    global_batch: PositiveInt
    peak_lr: PositiveFloat
    crop: tuple[PositiveInt, PositiveInt]
    mixture: tuple[PartConfig, ...] = Field(min_length=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup: float = Field(default=0.05, gt=0, lt=1)
    clip_norm: PositiveFloat = 1.0
    gamma: float = Field(default=0.9, gt=0, le=1)
    max_flow: PositiveFloat = MAX_FLOW
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    max_skipped_in_a_row: PositiveInt = 10

    validation: tuple[SetConfig, ...] = ()
    validate_every: PositiveInt | None = None
    checkpoint_every: PositiveInt = 1000
    keep_last: PositiveInt = 2
    keep_best: MetricConfig | None = None
    log_every: PositiveInt = 50
    gates: tuple[GateConfig, ...] = ()

    @property
    def reads(self) -> tuple[PartConfig | SetConfig, ...]:
        """Every subset the stage reads, for training and for validation."""
        return (*self.mixture, *self.validation)

    @pydantic.model_validator(mode="after")
    def _compares_what_it_validates(self) -> Self:
        check_named_once(self.validation, f"stage {self.name}")
        for purpose, metric in self.compared:
            self.check_validated(purpose, metric)
        return self

    @property
    def compared(self) -> list[tuple[str, MetricConfig]]:
        """The metrics that the stage itself bases decisions on, as (purpose, metric)."""
        best = [] if self.keep_best is None else [("keep_best", self.keep_best)]
        return [*best, *(("gates", gate) for gate in self.gates)]

    def check_validated(self, purpose: str, metric: MetricConfig) -> None:
        """Raises ValueError if the stage does not validate on a metric's set."""
        if metric.set_name not in [chosen.name for chosen in self.validation]:
            raise ValueError(
                f"stage {self.name}: validation lacks {metric.set_name}, which {purpose} compares by; add it"
            )

    def recipe(self) -> dict[str, Any]:
        """The part of the config that determines the weights.

        It is hashed, so a field that is added later must not appear here as long as it has its default: otherwise
        nothing that earlier versions trained is found again.
        """
        watched = {"validation", "validate_every", "checkpoint_every", "keep_last", "keep_best", "log_every", "gates"}
        watched.add("max_skipped_in_a_row")  # it may end a stage, but changes no weight
        return self.model_dump(mode="json", exclude=watched)


def shown_uri(uri: str) -> str:
    """A URI for people and records: without the user name and password that a database or server URI may hold."""
    return re.sub(r"(?<=://)[^/]*@", "", uri)


class MlflowConfig(Frozen):
    """Where runs and models go.

    Attributes:
        tracking_uri: MLflow's address; None: MLFLOW_TRACKING_URI, or SQLite in `runs/` of the working folder.
        experiment: the experiment of the runs.
        registered_model: the name that versions are registered under.
        patience_s: how long (s) the driver waits for a server that is away; training goes on meanwhile.
    """

    tracking_uri: str | None = None
    experiment: str = Field(default="gmflow", min_length=1)
    registered_model: Annotated[str, spelt(r"[^/:]+", "all characters but / and :")] = "gmflow"
    patience_s: PositiveFloat = 3600.0

    @pydantic.field_serializer("tracking_uri")
    def _without_password(self, uri: str | None) -> str | None:
        return None if uri is None else shown_uri(uri)


class CurriculumConfig(Frozen):
    """A whole curriculum.

    Attributes:
        name: name of the curriculum; the names of its runs begin with it.
        storage: URL or path for checkpoints and weights; every node must be able to reach it.
        data: name → manifest URL of the datasets that mixtures and validation sets refer to.
        stages: the stages in order; each starts from the weights of the one before.
        model: the variant, and what differs from it.
        machine: how the machines are used.
        mlflow: where runs and models go.
        init_from: weights the first selected stage starts from: models:/…, .pth or .safetensors. None: the final
            weights of the stage before it, or random weights if it is the first of all.
        only: run only these stages; the first continues from the stage before it unless `init_from` is given.
        seed: seed of initial weights, sample order and augmentation.
        precision: what products are computed in, see `ExecutionConfig` in gmflow/execution.py.
        promotion: the metric that must improve before a finished stage is promoted; None promotes every one.
    """

    name: RunName
    storage: str
    data: dict[DataName, str | None]
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    model: ModelConfig = ModelConfig()
    machine: MachineConfig = MachineConfig()
    mlflow: MlflowConfig = MlflowConfig()
    promotion: MetricConfig | None = None
    init_from: str | None = None
    only: tuple[str, ...] | None = Field(default=None, min_length=1)
    seed: Seed = 0
    precision: Precision = "fp32"

    @pydantic.model_validator(mode="after")
    def _references_hold(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages {names}: names must differ")
        for name in self.only or ():
            if name not in names:
                raise ValueError(f"only: no stage {name!r}; stages are {', '.join(names)}")
        check_given(self.data, [used for stage in self.selected_stages for used in stage.reads])
        multiple = self.model.build().size_multiple
        for stage in self.selected_stages:
            self._check_stage(stage, multiple)
        for stage in self.chain:
            for used in stage.mixture:
                if stage not in self.selected_stages and self.data.get(used.data) is None:
                    raise ValueError(
                        f"only: {self.selected_stages[0].name} starts from what {stage.name} ended with, whose folder "
                        f"is named by its data: set data.{used.data}, or give init_from"
                    )
        return self

    def _check_stage(self, stage: StageConfig, multiple: int) -> None:
        for used in stage.reads:
            if used.data not in self.data:
                raise ValueError(f"stage {stage.name}: no data {used.data!r}; data has {', '.join(self.data)}")
        if stage.crop[0] % multiple or stage.crop[1] % multiple:
            raise ValueError(f"stage {stage.name}: crop {stage.crop} must be divisible by {multiple} for this model")
        if self.machine.num_workers > stage.global_batch:
            raise ValueError(
                f"stage {stage.name}: global_batch {stage.global_batch} cannot feed "
                f"machine.num_workers {self.machine.num_workers}; each worker needs a sample a step"
            )
        if self.promotion is not None:
            stage.check_validated("promotion", self.promotion)

    @property
    def selected_stages(self) -> tuple[StageConfig, ...]:
        """The stages of `only`, or all."""
        return tuple(stage for stage in self.stages if self.only is None or stage.name in self.only)

    @property
    def chain(self) -> tuple[StageConfig, ...]:
        """The selected stages, and before them, unless `init_from` is given, the finished stages that lead to them."""
        selected = self.selected_stages
        before = self.stages[: self.stages.index(selected[0])]
        return selected if self.init_from else (*before, *selected)

    def stage_hash(self, stage: StageConfig, versions: Mapping[str, str], parent: str) -> str:
        """A hash that identifies everything that determines a stage's weights.

        Args:
            stage: one of the stages.
            versions: data name → content hash of its manifest.
            parent: hash of the stage, or reference of the model, whose weights it starts from.
        """
        manifests = {part.data: versions[part.data] for part in stage.mixture}
        decides = [stage.recipe(), manifests, self.model.build().to_dict(), self.seed, self.precision, parent]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
