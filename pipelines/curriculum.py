"""Train the staged curriculum: `python pipelines/curriculum.py --config FILE [key=value …]`.

The same command again goes on where it was: finished stages are skipped, an interrupted one is resumed.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.cluster import connected  # sets Ray's environment, so before Ray

# isort: split
from rich.console import Console
from rich.table import Table

from datasets_etl.manifest import Manifest
from datasets_etl.storage import ObjectStore, open_store
from pipelines import report
from pipelines.errors import command
from pipelines.training import registry, tracking
from pipelines.training.code_version import code_version
from pipelines.training.config import CurriculumConfig, StageConfig, load_config
from pipelines.training.feed import Record, listening
from pipelines.training.launch import final_weights, fit_stage, provide_initial_weights
from pipelines.training.stage import StageJob

_FINAL_WEIGHTS = "final.safetensors"
_RESULT = "result.json"


@dataclass(frozen=True)
class StageResult:
    """A finished stage; written last, so its presence means the stage is done.

    Attributes:
        stage: its name.
        config_hash: names all that decided the weights.
        weights: URL of the final weights.
        metrics: of the last validation and training record.
        model: registered version, as a reference.
        mlflow_run: id of the stage's run.
    """

    stage: str
    config_hash: str
    weights: str
    metrics: dict[str, float]
    model: str
    mlflow_run: str


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train GMFlow through a staged curriculum on Ray.")
    parser.add_argument("--config", required=True, help="a YAML file, such as pipelines/configs/curriculum_base.yaml")
    parser.add_argument("--verbose", action="store_true", help="show the output of Ray's workers too")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config overrides, such as stages.chairs.steps=100"
    )
    return parser.parse_intermixed_args(argv)


def run_curriculum(config: CurriculumConfig) -> list[StageResult]:
    """Every selected stage in order, each from the weights of the one before. Needs a connected Ray.

    Raises PipelineError, DataError or GMFlowError for what the user can mend.
    """
    manifests = _load_manifests(config)
    versions = {name: manifest.version for name, manifest in manifests.items()}
    hashes = _stage_hashes(config, versions)
    store = open_store(config.storage)
    client = tracking.connect(config.mlflow.tracking_uri)
    key = hashlib.sha256(json.dumps([config.name, hashes]).encode()).hexdigest()[:12]
    run = tracking.CurriculumRun(client, config.mlflow, config.name, key)
    run.log_setup(config, manifests)

    results: list[StageResult] = []
    with run.running(run.run_id):
        for stage, stage_hash in zip(config.selected_stages, hashes, strict=True):
            folder = open_store(f"{store.url}/{config.name}-{stage.name}-{stage_hash}")
            result = _finished(folder)
            if result is not None:
                _say(f"stage={stage.name} finished earlier: {result.model}, skipped")
            else:
                plan = _StagePlan(config, stage, stage_hash, folder, manifests, results[-1] if results else None)
                result = _run_stage(plan, run)
            run.log_stage(len(results), result.metrics)
            results.append(result)
        report.log_curriculum_report(client, run.run_id)
    return results


@dataclass(frozen=True)
class _StagePlan:
    config: CurriculumConfig
    stage: StageConfig
    hash: str
    folder: ObjectStore
    manifests: Mapping[str, Manifest]
    parent: StageResult | None

    @property
    def used_data(self) -> dict[str, str]:
        """Data name → manifest URL of all the stage reads."""
        names = {used.data for used in self.stage.reads}
        return {name: self.manifests[name].url for name in sorted(names)}


def _run_stage(plan: _StagePlan, run: tracking.CurriculumRun) -> StageResult:
    """Train, keep the final weights, register them, and only then say that the stage is finished."""
    name = f"{plan.config.name}-{plan.stage.name}-{plan.hash}"
    config = plan.config
    start = plan.parent.weights if plan.parent else config.init_from
    provide_initial_weights(plan.folder, config.model, config.seed, start, config.mlflow.tracking_uri)
    job = _job(plan, name)
    stage_run = run.stage(plan.stage.name, key=f"{run.run_id}/{name}")
    stage_run.log_json(plan.stage.model_dump(mode="json"), "stage.json")

    def hear(record: Record) -> None:
        stage_run.log(record)
        if record.line:
            _say(record.line)

    with run.running(stage_run.run_id):
        with listening(job.feed, hear):
            trained = fit_stage(job, name)
        with tempfile.TemporaryDirectory(prefix="gmflow-final-") as folder:
            weights = Path(folder) / "model.safetensors"
            metrics = final_weights(job, trained, config.model, weights)
            plan.folder.upload(weights, _FINAL_WEIGHTS)
            version = registry.register(
                run.client,
                config.mlflow.registered_model,
                stage_run.run_id,
                weights,
                _lineage(plan, metrics),
                config.promotion,
            )
    result = StageResult(
        stage=plan.stage.name,
        config_hash=plan.hash,
        weights=f"{plan.folder.url}/{_FINAL_WEIGHTS}",
        metrics=metrics,
        model=f"models:/{version.name}/{version.version}",
        mlflow_run=stage_run.run_id,
    )
    plan.folder.write(_RESULT, json.dumps(asdict(result), indent=1, sort_keys=True).encode())
    return result


def _job(plan: _StagePlan, name: str) -> StageJob:
    return StageJob(
        stage=plan.stage,
        machine=plan.config.machine,
        data=plan.used_data,
        folder=plan.folder.url,
        feed=f"feed-{name}",
        seed=plan.config.seed,
        precision=plan.config.precision,
    )


def _lineage(plan: _StagePlan, metrics: Mapping[str, float]) -> registry.Lineage:
    return registry.Lineage(
        stage=plan.stage.name,
        parent=plan.parent.model if plan.parent else plan.config.init_from or "random",
        manifests={part.data: plan.manifests[part.data].url for part in plan.stage.mixture},
        config_hash=plan.hash,
        code_version=code_version(),
        metrics={name: value for name, value in metrics.items() if name.startswith("val/")},
    )


def _load_manifests(config: CurriculumConfig) -> dict[str, Manifest]:
    """The datasets the selected stages use, with every subset they name."""
    manifests: dict[str, Manifest] = {}
    for part in (part for stage in config.selected_stages for part in stage.reads):
        url = config.data[part.data]
        if part.data not in manifests and url is not None:
            manifests[part.data] = Manifest.load(url)
        manifests[part.data].select(part.subset)
    return manifests


def _stage_hashes(config: CurriculumConfig, versions: Mapping[str, str]) -> list[str]:
    parent = config.init_from or "random"
    hashes = []
    for stage in config.selected_stages:
        parent = config.stage_hash(stage, versions, parent)
        hashes.append(parent)
    return hashes


def _finished(folder: ObjectStore) -> StageResult | None:
    if folder.size(_RESULT) is None:
        return None
    content: dict[str, Any] = json.loads(folder.read(_RESULT))
    return StageResult(**content)


def _say(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {line}", flush=True)


def show_summary(config: CurriculumConfig, results: list[StageResult]) -> None:
    """A table of the stages: validation EPE by set, and the registered model."""
    sets = [chosen.name for stage in config.selected_stages for chosen in stage.validation]
    table = Table(title=f"curriculum {config.name}: EPE in pixels at the end of each stage")
    table.add_column("stage")
    for name in dict.fromkeys(sets):
        table.add_column(name, justify="right")
    table.add_column("model")
    for result in results:
        values = [result.metrics.get(f"val/{name}/epe") for name in dict.fromkeys(sets)]
        table.add_row(result.stage, *("" if v is None else f"{v:.3f}" for v in values), result.model)
    # A job's log has no width of its own.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)
    print(f"MLflow: {tracking.tracking_uri(config.mlflow.tracking_uri)}, experiment {config.mlflow.experiment}")
    for result in results:
        print(f"  {result.stage}: run {result.mlflow_run}, {result.model}, weights {result.weights}")


@command
def main() -> None:
    arguments = parse_arguments()
    config = load_config(CurriculumConfig, arguments.config, arguments.overrides)
    machine = config.machine
    with connected(machine.num_workers * machine.cpus_per_worker, verbose=arguments.verbose):
        results = run_curriculum(config)
    show_summary(config, results)


if __name__ == "__main__":
    main()
