"""What a curriculum will do: its stages, what determines their weights, and where the files of each are."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datasets_etl.manifest import Manifest
from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store, split_url
from pipelines.errors import PipelineError
from pipelines.lasting import lasting_store
from pipelines.training.beginning import weights_are_pinned
from pipelines.training.config import CurriculumConfig, StageConfig
from pipelines.training.data_config import MetricConfig, PartConfig, SetConfig, SubsetConfig
from pipelines.training.stage import StageJob

FINAL_WEIGHTS = "final.safetensors"
"""File in a finished stage's folder."""

_RESULT = "result.json"


@dataclass(frozen=True)
class StageResult:
    """The result of a finished stage. It is written last, so its presence means that the stage is done.

    Attributes:
        stage: name of the stage.
        config_hash: identifies everything that determined the weights.
        weights: URL of the final weights.
        metrics: metrics of the last validation and of the last training record.
        model: the registered version, as a reference.
        mlflow_run: id of the stage's run.
        mlflow: where that run and the model are; results that are older than this field have its default.
    """

    stage: str
    config_hash: str
    weights: str
    metrics: dict[str, float]
    model: str
    mlflow_run: str
    mlflow: str = "another MLflow"


@dataclass(frozen=True)
class StagePlan:
    """A stage of a curriculum and where its files are.

    Attributes:
        config: config of the whole curriculum.
        stage: config of this stage.
        hash: identifies everything that determines the stage's weights.
        folder: folder on storage; its name contains the hash.
        manifests: data name → manifest of every dataset that is used.
    """

    config: CurriculumConfig
    stage: StageConfig
    hash: str
    folder: ObjectStore
    manifests: Mapping[str, Manifest]

    @property
    def name(self) -> str:
        """Of its folder and its Ray run."""
        return f"{self.config.name}-{self.stage.name}-{self.hash}"

    @property
    def used_data(self) -> dict[str, str]:
        """Data name → manifest URL of every dataset the stage reads."""
        names = {used.data for used in self.stage.reads}
        return {name: self.manifests[name].url for name in sorted(names)}

    @property
    def versions(self) -> dict[str, str]:
        """Data name → version of its manifest."""
        return {name: manifest.version for name, manifest in self.manifests.items()}

    def result(self) -> StageResult | None:
        """None if the stage is not finished. Raises PipelineError if the result is damaged or its weights are gone."""
        if self.folder.size(_RESULT) is None:
            return None
        again = f"delete {self.result_url}, and the same command registers the stage again from its newest checkpoint"
        try:
            content: dict[str, Any] = json.loads(self.folder.read(_RESULT))
            result = StageResult(**content)
        except (ValueError, TypeError) as error:
            raise PipelineError(f"stage {self.stage.name}: its {_RESULT} is damaged ({error}): {again}") from error
        if self.folder.size(FINAL_WEIGHTS) is None:
            raise PipelineError(f"stage {self.stage.name}: {result.weights} is gone: {again}")
        return result

    @property
    def result_url(self) -> str:
        return f"{self.folder.url}/{_RESULT}"

    def finish(self, result: StageResult) -> None:
        """Store the result, which marks the stage as finished."""
        self.folder.write(_RESULT, json.dumps(asdict(result), indent=1, sort_keys=True).encode())

    @property
    def job(self) -> StageJob:
        """The job that its workers get."""
        return StageJob(
            stage=self.stage,
            machine=self.config.machine,
            data=self.used_data,
            folder=self.folder.url,
            feed=f"feed-{self.name}",
            seed=self.config.seed,
            precision=self.config.precision,
        )


def new_beside(plan: StagePlan) -> str:
    """A line if a stage is about to begin where a stage of the same name has begun with another hash; else empty."""
    if weights_are_pinned(plan.folder):
        return ""
    store, own = split_url(plan.folder.url)
    prefix = own.removesuffix(plan.hash)
    folders = {found.key.partition("/")[0] for found in store.walk(prefix)} - {own}
    others = sorted(name for name in folders if re.fullmatch(r"[0-9a-f]{12}", name.removeprefix(prefix)))
    if not others:
        return ""
    return f"is new: recipe, data, model, seed or start are not those of {', '.join(others)}, which is left as it is"


def plan_curriculum(config: CurriculumConfig) -> list[StagePlan]:
    """Plans of the stages that lead from the start to the last selected one; nothing is run.

    Raises DataError or PipelineError if a dataset is missing, lacks a subset, or cannot give a metric that is needed.
    """
    manifests = _load_manifests(config)
    versions = {name: manifest.version for name, manifest in manifests.items()}
    store = lasting_store(config.storage, "storage")
    parent = config.init_from or "random"
    plans = []
    for stage in config.chain:
        parent = config.stage_hash(stage, versions, parent)
        folder = open_store(f"{store.url}/{config.name}-{stage.name}-{parent}")
        plans.append(StagePlan(config, stage, parent, folder, manifests))
    return plans


def _load_manifests(config: CurriculumConfig) -> dict[str, Manifest]:
    """The datasets the stages use; checks that they have every named subset, and masks if a decision needs them."""
    manifests: dict[str, Manifest] = {}
    for stage in config.chain:
        for part in stage.reads if stage in config.selected_stages else stage.mixture:
            url = config.data[part.data]
            if part.data not in manifests and url is not None:
                manifests[part.data] = Manifest.load(url)
            part.indices(manifests[part.data])
    for stage in config.selected_stages:
        promotion = [] if config.promotion is None else [("promotion", config.promotion)]
        for purpose, metric in [*stage.compared, *promotion]:
            check_measurable(purpose, metric, manifests[metric.data])
    return manifests


def learned_pairs(mixtures: Iterable[PartConfig], chosen: SetConfig, manifests: Mapping[str, Manifest]) -> int:
    """How many pairs of a validation set are trained on too, be it in another of the dataset's passes.

    Their figures tell how well a model has learned them, and not how well it does on others.
    """

    def scenes(used: SubsetConfig) -> set[tuple[str, str]]:
        samples = (manifests[used.data].samples[int(number)] for number in used.indices(manifests[used.data]))
        # Sintel's training-clean and training-final show the same; Things' train-clean and val-clean do not.
        return {(sample.subset.partition("-")[0], sample.name) for sample in samples}

    version = manifests[chosen.data].version
    learned = [scenes(part) for part in mixtures if manifests[part.data].version == version]
    return len(scenes(chosen).intersection(set().union(*learned)))


def check_measurable(purpose: str, metric: MetricConfig, manifest: Manifest) -> None:
    """Raises PipelineError if a dataset cannot give the metric that a decision is based on."""
    if metric.metric in ("matched", "unmatched") and not manifest.has_occlusion:
        raise PipelineError(
            f"{purpose}: {metric.name} will have no value: {manifest.dataset} does not tell which pixels are occluded; "
            "choose another metric"
        )
