"""Train the staged curriculum: `python pipelines/curriculum.py --config FILE [key=value …]`.

Run the same command again to continue: finished stages are skipped, and an interrupted one is resumed.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.arguments import Parser
from pipelines.cluster import RayLostError, connected  # sets Ray's environment, so before Ray

# isort: split
from mlflow.entities.model_registry import ModelVersion
from rich.table import Table

from datasets_etl.objects import ObjectStore
from datasets_etl.storage_retries import waiting_for_storage
from pipelines import report
from pipelines.claim import claimed
from pipelines.config_file import load_config
from pipelines.errors import PipelineError, resumable_command
from pipelines.training import mlflow_client, registration, tracking
from pipelines.training.beginning import moved_start, provide_initial_weights, training_mark, weights_are_pinned
from pipelines.training.checkpoints import CheckpointStore
from pipelines.training.code_version import code_version
from pipelines.training.config import CurriculumConfig, StageConfig, shown_uri
from pipelines.training.display import WAITING, Display, output
from pipelines.training.dry_run import show_dry_run
from pipelines.training.feed import Record, listening
from pipelines.training.launch import final_weights, fit_stage
from pipelines.training.mlflow_client import place_of, run_link
from pipelines.training.plan import FINAL_WEIGHTS, StagePlan, StageResult, new_beside, plan_curriculum


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Train GMFlow through a staged curriculum on Ray.")
    parser.add_argument("--config", required=True, help="a YAML file, such as pipelines/configs/curriculum_base.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the resolved config and what it would take, train nothing"
    )
    parser.add_argument("--verbose", action="store_true", help="show the output of Ray's workers too")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config overrides, such as stages.chairs.steps=100"
    )
    return parser.parse_intermixed_args(argv)


def run_curriculum(config: CurriculumConfig, *, goes_on: bool = False) -> list[StageResult]:
    """Train every selected stage in order, each from the weights of the one before. Needs a connected Ray.

    Args:
        config: the curriculum.
        goes_on: whether this process ran it before, with an MLflow that answered: what is away now is waited for.

    Raises PipelineError, DataError or GMFlowError for what the user can fix, such as another driver on the same stages.
    """
    plans = plan_curriculum(config)
    display = Display(
        f"curriculum {config.name}",
        [(plan.stage.name, plan.stage.steps) for plan in plans],
        [] if config.promotion is None else [config.promotion.set_name],
    )
    client = mlflow_client.connect(config.mlflow.tracking_uri, answered=goes_on)
    unfinished = [plan for plan in plans if plan.stage in config.selected_stages and plan.result() is None]
    with claimed({f"stage {plan.stage.name}": plan.folder for plan in unfinished}, display.say) as held:
        # A selection of stages gets its own run, so that the config and the report of the whole curriculum stay.
        selected = [stage.name for stage in config.selected_stages]
        identity = [config.name, *_storage_identity(plans[0].folder), [plan.hash for plan in plans], selected]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        run = tracking.CurriculumRun(client, config.mlflow, config.name, key, display.say, held)
        return _run_stages(config, plans, run, display)


def _storage_identity(folder: ObjectStore) -> list[str]:
    """The part of a curriculum's identity that names its storage: the same config elsewhere gets a run of its own.

    It is empty for a curriculum that an earlier version began, without a `training_mark`: its run in MLflow is kept.
    """
    return [] if weights_are_pinned(folder) and not training_mark(folder) else [folder.url]


def _run_stages(
    config: CurriculumConfig, plans: Sequence[StagePlan], run: tracking.CurriculumRun, display: Display
) -> list[StageResult]:
    run.log_setup(config, plans[0].manifests)

    results: list[StageResult] = []
    with (
        display.showing(),
        run.running(run.run_id),
        # From here on storage is known to exist: it is an outage that is waited for, not a mistyped address.
        waiting_for_storage(config.machine.storage_patience_s),
    ):
        if moved := moved_start(plans[0].folder, config.init_from, config.mlflow.tracking_uri):
            display.say(f"stage={plans[0].stage.name} {moved}")
        for plan in plans:
            result = plan.result()
            if result is not None:
                _check_tracked(plan, result, run)
                display.say(f"stage={plan.stage.name} finished earlier: {result.model}, skipped")
                _check_gates(plan.stage, result.metrics)
            elif plan.stage not in config.selected_stages:
                raise PipelineError(
                    f"stage {config.selected_stages[0].name} starts from what {plan.stage.name} ended with, "
                    f"which is not finished in {plan.folder.url}: train it, or give init_from"
                )
            else:
                result = _run_stage(plan, results[-1] if results else None, run, display)
            display.state(plan.stage.name, "finished")
            run.name_stage(plan.stage.name, result.mlflow_run)
            run.log_stage(len(results), result.metrics)
            results.append(result)
        _log_report(run, display)
    return results[-len(config.selected_stages) :]


def _check_tracked(plan: StagePlan, result: StageResult, run: tracking.CurriculumRun) -> None:
    """Raises PipelineError if a finished stage's run is in another MLflow: in this one, the name of the stage's model
    would stand for nothing, or for another model.
    """
    if not run.holds(result.mlflow_run):
        raise PipelineError(
            f"stage {plan.stage.name}: finished and registered as {result.model} in {result.mlflow}, of which "
            f"{place_of(run.client)} does not know: set MLFLOW_TRACKING_URI to that one, or delete "
            f"{plan.result_url} to register the stage here, from its newest checkpoint"
        )


def _log_report(run: tracking.CurriculumRun, display: Display) -> None:
    """Make and log the report. The models are already trained and registered, so errors here are only reported."""
    try:
        report.log_curriculum_report(run.client, run.run_id)
        display.say(f"{report.FILE_NAME}: an artifact of the curriculum's run {run.run_id}")
    except Exception as error:  # noqa: BLE001 (no error here may stop the run)
        reason = " ".join(str(error).split())[:300]
        display.say(
            f"the report could not be made ({reason}); to make it: "
            f"python pipelines/report.py --run {run.run_id} --output runs/report.html"
        )


def _run_stage(
    plan: StagePlan, parent: StageResult | None, run: tracking.CurriculumRun, display: Display
) -> StageResult:
    """Train, keep the final weights, register them, and only then mark the stage as finished."""
    config, stage = plan.config, plan.stage
    display.state(stage.name, WAITING)
    if new := new_beside(plan):
        display.say(f"stage={stage.name} {new}")
    plan.folder.remove_leftovers()
    start = parent.weights if parent else config.init_from
    source = provide_initial_weights(plan.folder, config.model, config.seed, start, config.mlflow.tracking_uri)
    stage_run = _stage_run(plan, run)
    link = run_link(str(run.client.tracking_uri), config.mlflow.experiment, stage_run.run_id)
    display.say(f"stage={stage.name} MLflow: {link}")
    with run.running(stage_run.run_id):
        with listening(plan.job.feed, functools.partial(display.record, stage.name), stage_run.log):
            last = fit_stage(plan.job, plan.name)
        for step, metrics in last["records"]:
            stage_run.log(Record(step, metrics))  # those that an attempt killed here did not log
        display.state(stage.name, "registering")
        metrics, version = _register(plan, last, parent.model if parent else source, run, stage_run.run_id)
        display.say(f"stage={stage.name} {run.patience(registration.standing, run.client, version, config.promotion)}")
    result = StageResult(
        stage=stage.name,
        config_hash=plan.hash,
        weights=f"{plan.folder.url}/{FINAL_WEIGHTS}",
        metrics=metrics,
        model=f"models:/{version.name}/{version.version}",
        mlflow_run=stage_run.run_id,
        mlflow=place_of(run.client),
    )
    plan.finish(result)
    return result


def _stage_run(plan: StagePlan, run: tracking.CurriculumRun) -> tracking.TrackedRun:
    """The stage's run in MLflow, a new one or the one that was begun before."""
    # The stage's recipe decides the folder's name, so the run stays the same if later stages change.
    key = hashlib.sha256(f"{plan.folder.url}{training_mark(plan.folder)}".encode()).hexdigest()[:16]
    stage_run = run.child(plan.stage.name, key=f"stage/{key}")
    stage_run.log_json(plan.stage.model_dump(mode="json"), "stage.json")
    return stage_run


def _register(
    plan: StagePlan, last: dict[str, Any], parent: str, run: tracking.CurriculumRun, run_id: str
) -> tuple[dict[str, float], ModelVersion]:
    """Keep the weights of a stage's last checkpoint and register them. Returns their metrics and the version.

    Raises PipelineError if the stage stops at a gate, or belongs to another driver by now; its weights are kept.
    """
    stage, mlflow_config = plan.stage, plan.config.mlflow
    with tempfile.TemporaryDirectory(prefix="gmflow-final-") as folder:
        weights = Path(folder) / "model.safetensors"
        metrics = final_weights(last, plan.config.model, weights)
        plan.folder.upload(weights, FINAL_WEIGHTS)
        _check_gates(stage, metrics)
        if not run.held():
            raise PipelineError(f"stage {stage.name}: another driver has taken it over; this one registers nothing")
        lineage = _lineage(plan, parent, metrics)
        promotion = plan.config.promotion
        version = run.patience(
            registration.register, run.client, mlflow_config.registered_model, run_id, weights, lineage, promotion
        )
    return metrics, version


def _check_gates(stage: StageConfig, metrics: Mapping[str, float]) -> None:
    """Raises PipelineError if a stage did not reach the accuracy that the next stage needs."""
    for gate in stage.gates:
        value = metrics.get(gate.name)
        if value is None:
            raise PipelineError(
                f"stage {stage.name}: its gate {gate.name} has no value: the predicted flow is not finite, or it was "
                f"not measured; then remove the gate, or validate on {gate.set_name} under another name="
            )
        if not value < gate.below:
            raise PipelineError(
                f"stage {stage.name}: stopped at its gate: {gate.name} is {value:.3f}, not below {gate.below:g}; "
                "its weights are kept, the next stage was not started"
            )


def _lineage(plan: StagePlan, parent: str, metrics: Mapping[str, float]) -> registration.Lineage:
    return registration.Lineage(
        stage=plan.stage.name,
        parent=parent,
        manifests={part.data: plan.manifests[part.data].url for part in plan.stage.mixture},
        config_hash=plan.hash,
        code_version=code_version(),
        metrics={name: value for name, value in metrics.items() if name.startswith("val/")},
        measured=registration.measured_on(plan.stage.validation, plan.versions),
    )


def show_summary(config: CurriculumConfig, results: list[StageResult]) -> None:
    """Print a table of the stages (validation EPE by set, registered model), then where everything is stored."""
    sets = [chosen.name for stage in config.selected_stages for chosen in stage.validation]
    table = Table(title=f"curriculum {config.name}: EPE in pixels at the end of each stage")
    table.add_column("stage")
    for name in dict.fromkeys(sets):
        table.add_column(name, justify="right")
    table.add_column("model")
    for result in results:
        values = [result.metrics.get(f"val/{name}/epe") for name in dict.fromkeys(sets)]
        table.add_row(result.stage, *("" if v is None else f"{v:.3f}" for v in values), result.model)
    output().print(table)
    uri = mlflow_client.tracking_uri(config.mlflow.tracking_uri)
    print(f"MLflow: {shown_uri(uri)}, experiment {config.mlflow.experiment}")
    for result in results:
        run = run_link(uri, config.mlflow.experiment, result.mlflow_run)
        print(f"  {result.stage}: {run}, {result.model}, weights {result.weights}")


def _run_to_its_end(config: CurriculumConfig, arguments: argparse.Namespace) -> list[StageResult]:
    """`run_curriculum`, again and with a new connection whenever Ray lost one of its own processes beside the driver,
    such as Ray Train's controller: nobody may be there to submit the job again. After `machine.max_failures` times
    without a new checkpoint in between it raises RayLostError.
    """
    times, reached = 0, None
    while True:
        # Once storage was reached, it is an outage that is waited for, not a mistyped address.
        patience = waiting_for_storage(config.machine.storage_patience_s) if times else contextlib.nullcontext()
        try:
            with _connected(config, arguments), patience:
                return run_curriculum(config, goes_on=times > 0)
        except RayLostError as error:
            before, reached = reached, _newest_checkpoints(config)
            times = times + 1 if reached == before else 1
            if times > config.machine.max_failures:
                raise
            print(f"Ray was lost ({error.reason}); connects again and goes on", flush=True)


def _newest_checkpoints(config: CurriculumConfig) -> list[list[int]]:
    """The step of each stage's newest checkpoint, if it has one."""
    with waiting_for_storage(config.machine.storage_patience_s):
        return [CheckpointStore(plan.folder).steps()[:1] for plan in plan_curriculum(config)]


def _connected(config: CurriculumConfig, arguments: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    machine = config.machine
    return connected(machine.num_workers * machine.cpus_per_worker, verbose=arguments.verbose)


@resumable_command
def main() -> None:
    arguments = parse_arguments()
    config = load_config(CurriculumConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        with _connected(config, arguments):
            show_dry_run(config)
        return
    show_summary(config, _run_to_its_end(config, arguments))


if __name__ == "__main__":
    main()
