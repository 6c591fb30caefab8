"""The one config object: YAML and dotted overrides → frozen pydantic models that know no unknown key."""

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from datasets_etl.augment import AugmentConfig
from gmflow import GMFlowConfig
from pipelines.errors import PipelineError


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Frozen):
    """A variant of the model; what is None is the variant's own."""

    variant: Literal["base", "refine"] = "base"
    backbone_channels: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    feature_channels: PositiveInt | None = None
    num_layers: PositiveInt | None = None
    ffn_expansion: PositiveInt | None = None
    attn_splits: tuple[PositiveInt, ...] | None = None
    corr_radius: tuple[int, ...] | None = None
    prop_radius: tuple[int, ...] | None = None

    def build(self) -> GMFlowConfig:
        """The model library's config. Raises GMFlowError where the values do not make a model."""
        variant = GMFlowConfig.refine() if self.variant == "refine" else GMFlowConfig.base()
        return GMFlowConfig.from_dict(variant.to_dict() | self.model_dump(exclude={"variant"}, exclude_none=True))


class PartConfig(_Frozen):
    """A part of a stage's mixture: a subset of a dataset, how often an epoch holds it, how it is augmented.

    Scales are log2, as in the paper's recipe; flips are probabilities.
    """

    data: str
    subset: str
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

    def augmentation(self, crop: tuple[int, int]) -> AugmentConfig:
        return AugmentConfig(
            crop=crop,
            min_log2_scale=self.min_log2_scale,
            max_log2_scale=self.max_log2_scale,
            hflip=self.hflip,
            vflip=self.vflip,
        )


class SetConfig(_Frozen):
    """A validation set: a subset of a dataset, or its first `limit` samples."""

    data: str
    subset: str
    limit: PositiveInt | None = None

    @property
    def name(self) -> str:
        """What metrics are called by, such as "sintel/training-clean"."""
        return f"{self.data}/{self.subset}"


class StageConfig(_Frozen):
    """One stage of the curriculum: the recipe (which decides the weights) and what is watched on the way."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
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
    max_skipped_in_a_row: PositiveInt = 10

    validation: tuple[SetConfig, ...] = ()
    validate_every: PositiveInt | None = None
    checkpoint_every: PositiveInt = 1000
    log_every: PositiveInt = 50

    @property
    def reads(self) -> tuple[PartConfig | SetConfig, ...]:
        """Every subset the stage reads, for training and for validation."""
        return (*self.mixture, *self.validation)

    def recipe(self) -> dict[str, Any]:
        """The part that decides the weights."""
        watched = {"validation", "validate_every", "checkpoint_every", "log_every"}
        return self.model_dump(mode="json", exclude=watched)


class MachineConfig(_Frozen):
    """What the machine is: changes speed and memory, never the result.

    `placement` packs workers on as few nodes as hold them, spreads them over as many as there are, or insists on a node
    for each.
    """

    num_workers: PositiveInt = 1
    use_gpu: bool = False
    cpus_per_worker: PositiveInt = 1
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    micro_batch: PositiveInt = 1
    loader_workers: NonNegativeInt = 0
    checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    max_failures: NonNegativeInt = 3


class MlflowConfig(_Frozen):
    """Where runs and models go. Without a URI: MLFLOW_TRACKING_URI, or SQLite in `runs/` of the working folder."""

    tracking_uri: str | None = None
    experiment: str = "gmflow"
    registered_model: str = "gmflow"


class PromotionConfig(_Frozen):
    """`champion` moves to a stage's model when this validation metric (lower is better) improves on it."""

    data: str
    subset: str
    metric: str = "epe"

    @property
    def name(self) -> str:
        return f"{self.data}/{self.subset}"


class CurriculumConfig(_Frozen):
    """A whole curriculum.

    Attributes:
        name: of the curriculum, leads the names of its runs.
        storage: URL or path for checkpoints and weights; every node must reach it.
        data: name → manifest URL, the datasets that mixtures and validation sets refer to.
        stages: in order; each starts from the weights of the one before.
        init_from: weights the first stage starts from: models:/…, .pth or .safetensors. None: random.
        only: run these stages alone.
        seed: of initial weights, order and augmentation.
        precision: arithmetic of the forward pass.
        promotion: None promotes every finished stage.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    storage: str
    data: dict[str, str | None]
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    model: ModelConfig = ModelConfig()
    machine: MachineConfig = MachineConfig()
    mlflow: MlflowConfig = MlflowConfig()
    promotion: PromotionConfig | None = None
    init_from: str | None = None
    only: tuple[str, ...] | None = None
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16"] = "fp32"

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
        if self.promotion and self.promotion.name not in [chosen.name for chosen in stage.validation]:
            raise ValueError(
                f"stage {stage.name}: validation lacks {self.promotion.name}, which promotion compares by; add it"
            )

    @property
    def selected_stages(self) -> tuple[StageConfig, ...]:
        return tuple(stage for stage in self.stages if self.only is None or stage.name in self.only)

    def stage_hash(self, stage: StageConfig, versions: Mapping[str, str], parent: str) -> str:
        """Names everything that decides a stage's weights.

        Args:
            stage: one of the stages.
            versions: data name → content hash of its manifest.
            parent: hash of the stage, or reference, whose weights it starts from.
        """
        manifests = {part.data: versions[part.data] for part in stage.mixture}
        decides = [stage.recipe(), manifests, self.model.build().to_dict(), self.seed, self.precision, parent]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


Config = typing.TypeVar("Config", bound=BaseModel)


def load_config(kind: type[Config], path: str, overrides: Sequence[str]) -> Config:
    """Read a YAML file (which may extend another), apply `dotted.key=value` overrides, validate.

    A list element is addressed by its number or by its name: `stages.chairs.steps=100`. Values are YAML.
    Raises PipelineError naming the key and, for a misspelt one, the nearest right one.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        raise PipelineError(f"{path}: {_explain(kind, error)}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file, over the one in the file beside it that `extends` names."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PipelineError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise PipelineError(f"{path}: a config is a mapping of keys to values")
    base = tree.pop("extends", None)
    return tree if base is None else _merge(_read_yaml(path.parent / base), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else is replaced."""
    both = {key: _merge(base[key], over[key]) for key in base.keys() & over.keys() if _mappings(base[key], over[key])}
    return {**base, **over, **both}


def _mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PipelineError(f"override {override!r}: write key=value, such as stages.chairs.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PipelineError(f"override {override!r}: the value is not YAML: {error}") from error
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 takes 2e-4 for a string
    node: Any = tree
    *parents, last = key.split(".")
    for name in parents:
        node = _child(node, name, override)
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise PipelineError(f"override {override!r}: {'.'.join(parents)} is a value, not a section")


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, name, override)]
    if isinstance(node, dict):
        if node.get(name) is None:
            node[name] = {}
        return node[name]
    raise PipelineError(f"override {override!r}: {name!r} lies below a value, not a section")


def _position(node: list[Any], name: str, override: str) -> int:
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(node)]
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(node):
        return int(name)
    raise PipelineError(f"override {override!r}: no {name!r} here; there is {', '.join(names)}")


def _explain(kind: type[BaseModel], error: pydantic.ValidationError) -> str:
    """The first error in a line; for an unknown key with the nearest known one."""
    first, *more = error.errors()
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, name = first["loc"]
        known = sorted(_keys_at(kind, parents))
        near = difflib.get_close_matches(str(name), known, n=1)
        told = f"unknown key {where}; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
    elif first["type"] == "missing":
        told = f"{where} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        told = f"{where}: {message}" if where else message
        if first["type"] != "value_error":
            told += f", not {first['input']!r}"
    return told + (f" (and {len(more)} more)" if more else "")


def _keys_at(kind: Any, path: Sequence[int | str]) -> set[str]:
    """Field names of the model at a location of the config."""
    for part in path:
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation
        if typing.get_origin(kind) in (typing.Union, types.UnionType, tuple):
            models = [k for k in typing.get_args(kind) if isinstance(k, type) and issubclass(k, BaseModel)]
            kind = models[0] if models else kind
    return set(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else set()
