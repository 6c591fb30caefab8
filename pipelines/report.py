"""The report of a curriculum that MLflow knows: `python pipelines/report.py --run RUN_ID --output report.html`.

`curriculum.py` makes and logs the same report at its end; `evaluate.py` makes the report of an evaluation.
"""

import argparse
import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.cluster import connected, has_gpus  # sets Ray's environment, so before Ray

# isort: split
import mlflow
import pydantic
import yaml
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.manifest import Manifest
from gmflow import GMFlowConfig
from pipelines.arguments import Parser, not_negative
from pipelines.entry import first_line
from pipelines.errors import OutageError, PipelineError, command
from pipelines.lasting import lasting_object
from pipelines.published import NOTE, published_figures
from pipelines.references import resolve_model
from pipelines.report_page import (
    FIGURES,
    Cell,
    Curve,
    Report,
    Sets,
    Table,
    figure_cell,
    figures_table,
    prediction_speed,
    scene_tables,
    worst_pairs,
)
from pipelines.scoring import Evaluation, ScoringOptions, evaluate_on_ray
from pipelines.training import mlflow_client, mlflow_patience, tracking
from pipelines.training.config import CurriculumConfig
from pipelines.training.data_config import SetConfig
from pipelines.training.mlflow_client import place_of
from pipelines.wording import counted

FILE_NAME = "report.html"
PAIRS = 8
"""Pairs of each validation set in a curriculum's gallery."""

_CURVES = {
    "train/loss": "Training loss",
    "train/epe": "Training EPE, px (augmented crops)",
    "train/lr": "Learning rate",
    "train/grad_norm": "Gradient norm before clipping",
    "time/samples_per_s": "Samples a second",
    "time/data_wait": "Share of the time waiting for data",
}


def evaluation_report(
    title: str, subtitle: str, config: GMFlowConfig, sets: Sets, facts: Sequence[tuple[str, str]]
) -> Report:
    """The report of what `evaluate.py` found on its sets."""
    return Report(
        title=title,
        subtitle=subtitle,
        facts=facts,
        tables=[figures_table(config, sets), *scene_tables(sets)],
        cards=[card for _, evaluation in sets.values() for card in evaluation.cards],
        worst=worst_pairs(sets),
        speed=prediction_speed(sets),
    )


def log_curriculum_report(client: MlflowClient, run_id: str) -> None:
    """Make the report of a curriculum's parent run and log it there. Needs a connected Ray."""
    report = curriculum_report(client, read_curriculum(client, run_id), PAIRS)
    client.log_text(run_id, report.to_html(), FILE_NAME)


def curriculum_report(client: MlflowClient, found: "TrackedCurriculum", pairs: int) -> Report:
    """What MLflow has of a curriculum, and results of its last model on `pairs` of each set.

    Ray tasks score the pairs, so this needs a connected Ray unless `pairs` is 0.
    """
    sets = _score_validation_sets(client, found, pairs) if pairs else {}
    names = ", ".join(stage.name for stage in found.stages)
    return Report(
        title=f"Curriculum {found.config.name}",
        subtitle=f"{counted(len(found.stages), 'stage')} ({names}), {counted(found.steps, 'step')}, "
        f"{counted(found.config.machine.num_workers, 'worker')}",
        facts=_lineage(client, found),
        tables=_stage_tables(found),
        curves=_curves(client, found),
        cards=[card for _, evaluation in sets.values() for card in evaluation.cards],
        worst=worst_pairs(sets),
        speed=_training_speed(client, found) + prediction_speed(sets)[1:],
    )


@dataclass(frozen=True)
class _Stage:
    """A stage's run, its registered version if it got that far, and the step of the curriculum it begins at."""

    name: str
    run: Run
    version: ModelVersion | None
    begins: int
    validation: tuple[SetConfig, ...]


@dataclass(frozen=True)
class TrackedCurriculum:
    """What MLflow has of a curriculum: its run, config and datasets, the stages' runs, and their steps together."""

    run: Run
    config: CurriculumConfig
    manifests: Mapping[str, Manifest]  # by the names of the data
    stages: list[_Stage]
    steps: int

    @property
    def sets(self) -> dict[str, SetConfig]:
        """Every validation set of any stage, by name."""
        return {chosen.name: chosen for stage in self.stages for chosen in stage.validation}


def read_curriculum(client: MlflowClient, run_id: str) -> TrackedCurriculum:
    """By the run of the curriculum or of one of its stages. Raises PipelineError if the run belongs to none."""
    try:
        parent = client.get_run(run_id)
        if (above := parent.data.tags.get(tracking.PARENT_TAG)) is not None:  # the run of a stage
            run_id, parent = above, client.get_run(above)
    except MlflowException as error:
        if mlflow_patience.may_pass(error):
            raise OutageError(f"{place_of(client)} does not answer: {error.message}") from error
        raise PipelineError(f"run {run_id}: no curriculum's run at {place_of(client)} ({error.message})") from error
    try:
        text = mlflow.artifacts.load_text(f"runs:/{run_id}/config.yaml")
    except mlflow_patience.MLFLOW_ERRORS as error:
        text = (
            f"run {run_id}: its config.yaml cannot be had: this is no curriculum's run at {place_of(client)}, or its "
            f"storage of artifacts is away ({first_line(error)})"
        )
        raise mlflow_patience.as_error(error, text) from error
    try:
        config = CurriculumConfig.model_validate(yaml.safe_load(text))
    except (pydantic.ValidationError, yaml.YAMLError) as error:
        raise PipelineError(
            f"run {run_id}: its config.yaml is no curriculum's, or another version's; give a run of this version's"
        ) from error
    stages, begins = [], 0
    for stage in config.selected_stages:
        if (stage_run := parent.data.tags.get(f"{tracking.STAGE_RUN_TAG}{stage.name}")) is not None:
            try:
                run = client.get_run(stage_run)
                version = _own_version(client, stage_run, config.mlflow.registered_model)
            except MlflowException as error:
                text = f"stage {stage.name}: its run {stage_run} cannot be had from {place_of(client)}: {error.message}"
                raise mlflow_patience.as_error(error, text) from error
            stages.append(_Stage(stage.name, run, version, begins, stage.validation))
            begins += stage.steps
    if not stages:
        raise PipelineError(f"run {run_id}: has no stage; the report is made of a curriculum's parent run")
    used = {chosen.data for stage in stages for chosen in stage.validation}
    manifests = {name: Manifest.load(str(config.data[name])) for name in sorted(used)}
    return TrackedCurriculum(parent, config, manifests, stages, begins)


def _own_version(client: MlflowClient, run_id: str, model_name: str) -> ModelVersion | None:
    """The version registered of a stage's run: under the curriculum's name, if people gave it others too."""
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    return max(versions, key=lambda found: (found.name == model_name, int(found.version)), default=None)


def _score_validation_sets(client: MlflowClient, found: TrackedCurriculum, pairs: int) -> Sets:
    """Score the last stage's model on some pairs of each of its validation sets; empty if it is not registered."""
    stage = found.stages[-1]
    if stage.version is None:
        return {}
    model = resolve_model(f"models:/{stage.version.name}/{stage.version.version}", str(client.tracking_uri))
    sets: dict[str, tuple[EvaluationSet, Evaluation]] = {}
    for chosen in stage.validation:
        manifest = Manifest.load(str(found.config.data[chosen.data]))
        scored = chosen.build(manifest, at_most=pairs)
        remedy = "report.py --pairs 0, which makes no gallery"
        options = ScoringOptions(chosen.name, pairs, bidirectional=True, remedy=remedy)
        # Use GPUs if this cluster has them, whatever the training used: tasks could wait for a GPU that never comes.
        sets[chosen.name] = (scored, evaluate_on_ray(model, scored, options, use_gpu=has_gpus()))
    return sets


def _stage_tables(found: TrackedCurriculum) -> list[Table]:
    """For each validation set, its figures after every stage."""
    model = found.config.model.build()
    tables = []
    for title, chosen in found.sets.items():
        manifest = found.manifests[chosen.data]
        theirs = published_figures(model, manifest.dataset, chosen.subset, len(chosen.build(manifest)))
        rows: list[list[Cell]] = []
        for stage in found.stages:
            ours = {name: stage.run.data.metrics.get(f"val/{title}/{name}") for name in FIGURES}
            # The paper's figures are for the model after its second stage.
            beside = theirs if stage.name == "things" else {}
            if any(value is not None for value in ours.values()):
                cells = [figure_cell(ours[name], beside.get(name)) for name in FIGURES]
                rows.append([stage.name, *cells])
        if not rows:
            continue
        shown = [n for n in range(len(FIGURES) + 1) if any(row[n] is not None for row in rows)]
        columns = ["after stage", *FIGURES.values()]
        part = f", {chosen.cut}" if chosen.cut else ""
        note = NOTE if theirs else ""
        tables.append(
            Table(f"{title}{part}", [columns[n] for n in shown], [[row[n] for n in shown] for row in rows], note)
        )
    return tables


def _curves(client: MlflowClient, found: TrackedCurriculum) -> list[Curve]:
    boundaries = [float(stage.begins) for stage in found.stages[1:]]

    def over_stages(metric: str) -> dict[str, list[tuple[float, float]]]:
        return {stage.name: _history(client, stage, metric) for stage in found.stages}

    curves = [Curve(title, over_stages(metric), boundaries) for metric, title in _CURVES.items()]
    validated = {
        title: [point for points in over_stages(f"val/{title}/epe").values() for point in points]
        for title in found.sets
    }
    curves.insert(0, Curve("Validation EPE, px", validated, boundaries))
    return [curve for curve in curves if any(curve.series.values())]


def _history(client: MlflowClient, stage: _Stage, metric: str) -> list[tuple[float, float]]:
    """(step of the curriculum, value), in order."""
    if metric not in stage.run.data.metrics:
        return []
    entries = client.get_metric_history(stage.run.info.run_id, metric)
    values = {entry.step: entry.value for entry in entries if math.isfinite(entry.value)}
    return [(float(stage.begins + step), value) for step, value in sorted(values.items())]


def _training_speed(client: MlflowClient, found: TrackedCurriculum) -> list[list[Cell]]:
    machine = found.config.machine
    workers = f"{machine.num_workers} × {'GPU' if machine.use_gpu else 'CPU'}"
    header: list[Cell] = ["what", "on", "seconds a pair (median)", "pairs a second", "peak memory, MiB"]
    rows: list[list[Cell]] = [header]
    for stage in found.stages:
        rates = sorted(value for _, value in _history(client, stage, "time/samples_per_s"))
        if rates:
            rate = rates[len(rates) // 2]
            peaks = [value for _, value in _history(client, stage, "system/memory_gib")]
            rows.append([f"train {stage.name}", workers, 1 / rate, rate, 1024 * max(peaks) if peaks else None])
    return rows


def _lineage(client: MlflowClient, found: TrackedCurriculum) -> list[tuple[str, str]]:
    facts = [
        ("MLflow", f"{place_of(client)}, run {found.run.info.run_id}"),
        ("model", ", ".join(f"{name} {value}" for name, value in found.config.model.build().to_dict().items())),
        ("seed", str(found.config.seed)),
        ("initial weights", found.config.init_from or "random"),
    ]
    for stage in found.stages:
        if stage.version is not None:
            tags = stage.version.tags
            lineage = [f"{name} {tags[name]}" for name in ("parent", "config_hash", "code_version") if name in tags]
            facts.append(
                (f"stage {stage.name}", f"models:/{stage.version.name}/{stage.version.version}: {', '.join(lineage)}")
            )
    return facts + [(f"data {name}", str(url)) for name, url in found.config.data.items() if url is not None]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Make the HTML report of a curriculum.")
    parser.add_argument(
        "--run", required=True, metavar="RUN_ID", help="MLflow's run of the curriculum, or of one of its stages"
    )
    parser.add_argument("--output", default=FILE_NAME, help="file or URL (default: %(default)s)")
    parser.add_argument(
        "--pairs",
        type=not_negative,
        default=PAIRS,
        help="pairs of each validation set in the gallery; 0 leaves it out (default: %(default)s)",
    )
    return parser.parse_args(argv)


@command
def main() -> None:
    arguments = parse_arguments()
    store, name = lasting_object(arguments.output, "--output")
    client = mlflow_client.connect_existing(None)
    found = read_curriculum(client, arguments.run)
    with connected() if arguments.pairs else contextlib.nullcontext():
        report = curriculum_report(client, found, arguments.pairs)
    store.write(name, report.to_html().encode())
    print(f"{store.url}/{name}")


if __name__ == "__main__":
    main()
