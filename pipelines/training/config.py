"""The curriculum's config: frozen pydantic models that reject unknown keys."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from datasets_etl.augment import AugmentConfig
from datasets_etl.cache import SampleCache
from datasets_etl.loader import EvaluationSet, MixturePart, part_label
from datasets_etl.manifest import Manifest, patterns_label
from gmflow import GMFlowConfig
from gmflow.execution import ExecutionConfig, Precision
from pipelines.config_file import Frozen, RunName, Seed, spelt

DataName = Annotated[str, spelt(r"[\w.-]+", "letters, digits, _, . and -")]
"""What a config calls a dataset; metrics are named by it."""


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


class SubsetConfig(Frozen):
    """Samples of a dataset.

    Attributes:
        data: name of the dataset in the config.
        subset: one of its subsets.
        only: patterns of samples' names, such as "alley_*"; samples that match none of them are left out.
        without: patterns of the names of samples that are left out, to validate on them.
    """

    data: str
    subset: str
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @pydantic.model_serializer(mode="wrap")
    def _patterns_if_any(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without patterns, this is what versions wrote that had none: hashes of their stages stay the same."""
        content: dict[str, Any] = dump(self)
        return {name: value for name, value in content.items() if value or name not in ("only", "without")}

    @property
    def patterns(self) -> str:
        """Which part of the subset the patterns choose, such as "only alley_*"; empty if there are none."""
        return patterns_label(self.only, self.without)

    def indices(self, manifest: Manifest) -> npt.NDArray[np.int64]:
        """Numbers of its samples in the dataset's manifest. Raises DataError if there are none."""
        return manifest.select(self.subset, only=self.only, without=self.without)


class PartConfig(SubsetConfig):
    """A part of a stage's mixture: a subset of a dataset, how often an epoch repeats it, and how it is augmented.

    Attributes:
        repeats: how often an epoch contains each sample.
        min_log2_scale, max_log2_scale: images are scaled by 2 to the power of a uniform draw between them.
        hflip, vflip: probabilities of mirroring left-right and upside down.
    """

    repeats: PositiveInt = 1
    min_log2_scale: float = 0.0
    max_log2_scale: float = 0.0
    hflip: float = Field(default=0.0, ge=0, le=1)
    vflip: float = Field(default=0.0, ge=0, le=1)

    @pydantic.model_validator(mode="after")
    def _scales_in_order(self) -> Self:
        if self.min_log2_scale > self.max_log2_scale:
            raise ValueError(f"min_log2_scale {self.min_log2_scale} is above max_log2_scale {self.max_log2_scale}")
        return self

    def build(self, manifest: Manifest, crop: tuple[int, int]) -> MixturePart:
        """The part, its samples cut to `crop` (height, width)."""
        augmentation = AugmentConfig(
            crop=crop,
            min_log2_scale=self.min_log2_scale,
            max_log2_scale=self.max_log2_scale,
            hflip=self.hflip,
            vflip=self.vflip,
        )
        return MixturePart(manifest, self.subset, self.repeats, augmentation, self.only, self.without)


def no_alias_of_the_registry(name: str) -> str:
    """Refuses names that the registry reserves: that of a stage or sweep becomes an alias of its model."""
    if name in ("champion", "latest") or re.fullmatch(r"v\d+", name):
        raise ValueError(f"{name!r} means something else in the model registry; give another name")
    return name


class SetConfig(SubsetConfig):
    """A validation set.

    Attributes:
        limit: only its first samples; None: all.
    """

    limit: PositiveInt | None = None

    @property
    def name(self) -> str:
        """The name of the set in metrics, such as "sintel/training-clean"."""
        return f"{self.data}/{self.subset}"

    @property
    def cut(self) -> str:
        """Which part of the subset this is, such as "only alley_*; first 8 pairs"; empty if it is the whole."""
        return part_label(self.only, self.without, self.limit)

    def indices(self, manifest: Manifest) -> npt.NDArray[np.int64]:
        return self.build(manifest).indices

    def build(
        self, manifest: Manifest, *, at_most: int | None = None, cache: SampleCache | None = None
    ) -> EvaluationSet:
        """Its samples, or the first `at_most` of them."""
        limits = [limit for limit in (self.limit, at_most) if limit is not None]
        return EvaluationSet(
            manifest, self.subset, min(limits, default=None), cache, only=self.only, without=self.without
        )


def check_named_once(sets: Sequence[SetConfig], whose: str) -> None:
    """Raises ValueError if a validation names a set twice, even with another limit: metric names would be the same."""
    names = [chosen.name for chosen in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{whose}: validation names {twice[0]} twice; its figures would be of one of them")


class MetricConfig(Frozen):
    """A metric of a validation set; lower is better.

    Attributes:
        data, subset: the set, which the stage must validate on.
        metric: EPE (px) of all pixels ("epe"), by speed ("s0_10", "s10_40", "s40_plus"), or of pixels that both frames
            show and the others ("matched", "unmatched": Sintel and KITTI alone); percent of pixels with an error above
            1, 3 or 5 px ("px1", "px3", "px5"), or of KITTI's outliers ("f1_all").
    """

    data: str
    subset: str
    metric: Literal["epe", "px1", "px3", "px5", "s0_10", "s10_40", "s40_plus", "matched", "unmatched", "f1_all"] = "epe"

    @property
    def set_name(self) -> str:
        return f"{self.data}/{self.subset}"

    @property
    def name(self) -> str:
        """The name it is tracked under, such as "val/sintel/training-clean/epe"."""
        return f"val/{self.set_name}/{self.metric}"


class GateConfig(MetricConfig):
    """A value that a finished stage must stay below before anything is built on it.

    Attributes:
        below: the stage's last figure must be lower; else the curriculum stops, and says so.
    """

    below: PositiveFloat


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
        ema_decay: keep averaged weights: at each step so much of the average stays. They are validated and registered
            instead of the last ones. None: no average.
        max_skipped_in_a_row: so many steps in a row with a loss or gradient that is not finite end the stage.
        validation: the sets it is validated on, and from which `gates`, `keep_best` and the promotion take figures.
        validate_every: steps from one validation to the next; None: only after the last.
        checkpoint_every: steps from one checkpoint to the next: what is lost at most when a worker is killed.
        keep_last: so many of the newest checkpoints stay.
        keep_best: also keep the checkpoint whose validation was best by this metric.
        log_every: steps from one record of the metrics to the next.
        gates: what it must have reached before anything is built on it.
    """

    name: Annotated[
        str,
        spelt(r"[a-z][a-z0-9_-]*", "lower-case letters, digits, - and _, a letter first"),
        pydantic.AfterValidator(no_alias_of_the_registry),
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
    max_flow: PositiveFloat = 400.0
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


class CacheConfig(Frozen):
    """A folder on each machine's own disk that keeps samples read from storage.

    It takes no more samples once a twentieth of the disk or less is free, or 2 GiB or less if that is smaller.

    Attributes:
        folder: an absolute path, or one that begins with ~.
        gib: it holds at most so many GiB.
    """

    folder: str
    gib: PositiveFloat

    @pydantic.field_validator("folder")
    @classmethod
    def _is_the_same_for_all(cls, folder: str) -> str:
        """Refuses a relative path: each worker has its own working folder, which disappears with Ray."""
        if not Path(folder).expanduser().is_absolute():
            raise ValueError(f"{folder}: give an absolute path, such as /scratch/gmflow")
        return folder

    def build(self) -> SampleCache:
        return SampleCache(Path(self.folder).expanduser(), int(self.gib * 2**30))


class MachineConfig(Frozen):
    """How the machine is used: this changes speed and memory, never the recipe. What differs is rounding
    (docs/fault-tolerance.md).

    Attributes:
        num_workers: number of data-parallel workers.
        min_workers: continue with as few workers as this while machines are missing; None: wait for all of them.
        grow_interval_s: how often (s) to check whether more workers fit, while training runs with fewer; Ray itself
            notices a new machine within 20 s.
        cpus_per_worker, use_gpu: the resources that each worker takes from the cluster.
        placement: "pack": workers on as few nodes as possible; "spread": on as many nodes as possible; "strict_spread":
            each worker must have its own node.
        micro_batch: samples that a worker computes at a time; gradients are accumulated up to the recipe's batch.
        loader_workers: processes of each worker that read and augment samples; 0: the worker does it itself.
        cache: keeps samples on the machines' own disks; None: each sample is read from storage every time.
        checkpointing: which activations are recomputed in the backward pass instead of kept.
        compile: run the model through torch.compile; the machine must have a compiler (the image has one).
        replay: on GPUs, record a step's operations once and replay them, unless the model is compiled. The bits are the
            same. Small micro-batches take less time, but the recordings hold memory that validation cannot use.
        max_failures: how often a stage is restarted after a worker failed, without a new checkpoint in between; 0:
            never.
        hang_timeout_s: a worker without progress for this long is ended, so that the stage resumes.
        storage_patience_s: how long workers and driver wait for storage that is unreachable.
    """

    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    grow_interval_s: PositiveFloat = 60.0
    use_gpu: bool = False
    cpus_per_worker: PositiveInt = 1
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    micro_batch: PositiveInt = 1
    loader_workers: NonNegativeInt = 0
    cache: CacheConfig | None = None
    checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    replay: bool = True
    max_failures: NonNegativeInt = 3
    hang_timeout_s: PositiveFloat = 900.0
    storage_patience_s: PositiveFloat = 120.0

    @pydantic.model_validator(mode="after")
    def _limits_fit_together(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is above num_workers {self.num_workers}")
        if self.min_workers is not None and self.placement == "strict_spread":
            raise ValueError(
                "min_workers goes with placement pack or spread: how many fit meanwhile is counted by what nodes hold, "
                "not by nodes"
            )
        if self.hang_timeout_s <= 2 * self.storage_patience_s:
            raise ValueError(
                f"hang_timeout_s {self.hang_timeout_s:g} must be above twice storage_patience_s "
                f"{self.storage_patience_s:g}: a worker whose last two checkpoints wait for storage does not hang"
            )
        return self

    def execution(self, precision: Precision, *, ddp: bool = False) -> ExecutionConfig:
        """How a model is run for training on this machine."""
        return ExecutionConfig(
            precision=precision,
            checkpointing=self.checkpointing,
            compile=self.compile,
            ddp=ddp,
            replay=self.replay and not self.compile,
            same_bits=True,
        )


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
        multiple = self.model.build().size_multiple
        for stage in self.selected_stages:
            self._check_stage(stage, multiple)
        for stage in self.chain:
            for used in stage.mixture:
                if stage not in self.selected_stages and self.data.get(used.data) is None:
                    raise ValueError(
                        f"only: {self.selected_stages[0].name} starts from what {stage.name} ended with, "
                        f"and that is found by its data: set data.{used.data}, or give init_from"
                    )
        return self

    def _check_stage(self, stage: StageConfig, multiple: int) -> None:
        for used in stage.reads:
            if used.data not in self.data:
                raise ValueError(f"stage {stage.name}: no data {used.data!r}; data has {', '.join(self.data)}")
            if self.data[used.data] is None:
                raise ValueError(f"data.{used.data} is not set; give the manifest's URL: data.{used.data}=URL")
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
