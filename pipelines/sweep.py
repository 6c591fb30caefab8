"""Sweep windows and radii: `python pipelines/sweep.py --config FILE [key=value …]`.

One config describes two phases. The probe evaluates given weights at every setting of a grid, without training. Tuning
trains trials on Ray Tune, the probe's best settings first; each trial is a stage like the curriculum's with another
config. Run the same command again to continue where it stopped.
"""

import argparse
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.arguments import Parser
from pipelines.cluster import connected, nodes, own_node  # sets Ray's environment, so before Ray

# isort: split
from mlflow.entities.model_registry import ModelVersion

from datasets_etl.manifest import Manifest
from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store
from datasets_etl.storage_retries import waiting_for_storage
from pipelines.claim import CLAIM, claimed
from pipelines.config_file import load_config
from pipelines.errors import PipelineError, resumable_command
from pipelines.lasting import lasting_store
from pipelines.progress import print_line
from pipelines.sweeping import plots
from pipelines.sweeping.accuracy import Scores, Weights, measure_accuracy, score_jobs
from pipelines.sweeping.board import TrialBoard
from pipelines.sweeping.config import SweepConfig
from pipelines.sweeping.cost import measure_costs
from pipelines.sweeping.dry_run import show_dry_run
from pipelines.sweeping.pinned_weights import pinned_weights
from pipelines.sweeping.room import check_room, driver_memory_lack
from pipelines.sweeping.settings import Setting
from pipelines.sweeping.table import Row, best_settings, mark_front, to_csv, to_json
from pipelines.sweeping.tracking import SweepRun
from pipelines.sweeping.trials import TrialPlan, retry_failed, seed_points
from pipelines.sweeping.tuning import tune_trials
from pipelines.sweeping.view import SweepView, front_table
from pipelines.training import mlflow_client, registration
from pipelines.training.beginning import training_mark, write_training_mark
from pipelines.training.code_version import code_version
from pipelines.training.config import shown_uri
from pipelines.training.data_config import SetConfig
from pipelines.training.mlflow_client import run_link
from pipelines.training.plan import FINAL_WEIGHTS, check_measurable, learned_pairs
from pipelines.wording import counted


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Sweep GMFlow's windows and radii: probe trained weights, tune trials.")
    parser.add_argument("--config", required=True, help="a YAML file, such as pipelines/configs/sweep.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check the config, list what would run, and stop")
    parser.add_argument("--retry-failed", action="store_true", help="trials that failed before are run again")
    parser.add_argument("--verbose", action="store_true", help="show the output of Ray's workers too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides, such as cost.rounds=3")
    return parser.parse_intermixed_args(argv)


@dataclass(frozen=True)
class Sweep:
    """A checked config with what its phases share."""

    config: SweepConfig
    manifests: Mapping[str, Manifest]
    store: ObjectStore
    view: SweepView


def prepare(config: SweepConfig) -> Sweep:
    """Read the manifests and check every setting against every size, before anything starts.

    Raises PipelineError or DataError for what the user can fix.
    """
    manifests: dict[str, Manifest] = {}
    for part in config.reads:
        url = config.data[part.data]
        if part.data not in manifests and url is not None:
            manifests[part.data] = Manifest.load(url)
        part.indices(manifests[part.data])
    check_measurable("objective", config.objective, manifests[config.objective.data])
    for purpose, metric in config.tune.stage.compared if config.tune is not None else ():
        check_measurable(purpose, metric, manifests[metric.data])
    config.check_sizes(manifests)
    store = open_store(f"{lasting_store(config.storage, 'storage').url}/{config.name}")
    return Sweep(config, manifests, store, SweepView(config.metric))


def run_sweep(sweep: Sweep, *, retry: bool = False) -> list[Row]:
    """Run the phases that are configured, and make the report. Needs a connected Ray with its dashboard."""
    config = sweep.config
    check_room(config, nodes())
    with claimed({f"sweep {config.name}": sweep.store}, sweep.view.say) as held:
        return _run_phases(sweep, held, retry=retry)


def _run_phases(sweep: Sweep, held: Callable[[], bool], *, retry: bool) -> list[Row]:
    config = sweep.config
    _say_overlap(sweep)
    begun = sweep_mark(sweep.store)
    weights = pinned_weights(config, sweep.store, sweep.view.say)
    run = SweepRun(config, weights, sweep.manifests, sweep.view.say, held, begun)
    sweep.view.say(f"MLflow: {run_link(str(run.client.tracking_uri), config.mlflow.experiment, run.run_id)}")
    # From here on storage is known to exist, so an outage is waited for.
    with run.parent.running(run.run_id), waiting_for_storage(config.storage_patience_s):
        with sweep.view.showing():
            rows = []
            if config.probe is not None and weights is not None:
                rows = with_costs(sweep, probe(sweep, weights, run))
            if config.tune is not None:
                seeds = seeds_of(config, rows)
                rows = with_costs(sweep, rows + tune(sweep, weights, seeds, run, retry=retry))
        for row in rows:
            run.judge(row)
        report(sweep, rows, run)
        register_best(sweep, rows, run, plan_trials(sweep, weights))
    failed = [row for row in rows if row.status == "failed"]
    if failed and not any(row.phase == "trial" and row.status == "finished" for row in rows):
        raise PipelineError(
            f"no trial finished, and {len(failed)} failed; {failed[0].name} because: {failed[0].reason}"
        )
    return rows


def seeds_of(config: SweepConfig, rows: Sequence[Row]) -> list[Setting]:
    """The settings that trials try first: the best of the probe's front that lie in their space."""
    count = 0 if config.tune is None else config.tune.seeds
    front = best_settings(rows, config.metric)
    return [setting for setting in front if seed_points(config, [setting])][:count]


def sweep_mark(store: ObjectStore) -> str:
    """The `training_mark` of a sweep's folder, written first of all; empty for a sweep of an earlier version."""
    if not training_mark(store) and all(found.key == CLAIM for found in store.walk()):
        write_training_mark(store)
    return training_mark(store)


def _say_overlap(sweep: Sweep) -> None:
    """Say if training and validation overlap: trials are then compared by pairs that they are trained on."""
    tuned = sweep.config.tune
    if tuned is None:
        return
    (chosen,) = (chosen for chosen in tuned.stage.validation if chosen.name == sweep.config.objective.set_name)
    if learned := learned_pairs(tuned.stage.mixture, chosen, sweep.manifests):
        sweep.view.say(
            f"trials are trained on {learned:,} of the {len(chosen.indices(sweep.manifests[chosen.data])):,} pairs of "
            f"{chosen.name} that they are compared by (to hold pairs out: without, in the mixture)"
        )


def probe(sweep: Sweep, weights: Weights, run: SweepRun) -> list[Row]:
    """Measure the accuracy of the weights at every setting of the grid."""
    config = sweep.config
    assert config.probe is not None
    jobs = [
        job
        for chosen in config.probe.validation
        for job in score_jobs(weights, config.probed, chosen, sweep.manifests[chosen.data], config.precision)
    ]
    rows = {}
    for setting in config.probed:
        scores = sorted(job.key(setting) for job in jobs if setting in job.settings)
        key = hashlib.sha256("".join(scores).encode()).hexdigest()[:12]
        marked = setting == config.reference
        rows[setting] = Row(setting.name, "probe", key, setting.on(config.architecture), reference=marked)
    for row in rows.values():
        sweep.view.show(row)
    missing = dict.fromkeys(rows, len(config.probe.validation))

    def on_scored(setting: Setting, chosen: SetConfig, scores: Scores) -> None:
        metrics = {f"val/{chosen.name}/{name}": value for name, value in scores.items()}
        missing[setting] -= 1
        status = "running" if missing[setting] else "finished"
        rows[setting] = replace(rows[setting], status=status, metrics=rows[setting].metrics | metrics)
        if not missing[setting]:
            run.end(rows[setting])
        sweep.view.show(rows[setting])

    measure_accuracy(sweep.store, jobs, config.probe, config.storage_patience_s, on_scored)
    return list(rows.values())


def with_costs(sweep: Sweep, rows: Sequence[Row]) -> list[Row]:
    """The rows with latency and memory, for which each model is measured once, and with the front marked."""
    config = sweep.config
    names = {row.model: row.setting.name for row in rows if row.status != "failed"}
    costs = measure_costs(sweep.store, names, config.cost, config.precision, sweep.view.say)
    measured = [replace(row, cost=costs.get(row.model)) for row in rows]
    for row in measured:
        sweep.view.show(row)
    return mark_front(measured, config.metric)


def plan_trials(sweep: Sweep, weights: Weights | None) -> TrialPlan:
    """What the sweep's trials share."""
    config = sweep.config
    trained = config.tune is not None and config.tune.start == "trained"
    return TrialPlan(
        config=config,
        weights=weights if trained else None,
        data={name: manifest.url for name, manifest in sweep.manifests.items()},
        versions={name: manifest.version for name, manifest in sweep.manifests.items()},
        folder=f"{sweep.store.url}/trials",
        feed=f"feed-sweep-{config.name}",
    )


def tune(
    sweep: Sweep, weights: Weights | None, seeds: Sequence[Setting], run: SweepRun, *, retry: bool = False
) -> list[Row]:
    """Train the trials. Returns a row for each, however it ended."""
    plan = plan_trials(sweep, weights)
    if retry:
        sweep.view.say(f"{counted(retry_failed(plan), 'failed trial')} will be tried again")
    for name in (setting.name for setting in seeds):
        sweep.view.say(f"the probe's front seeds {name}")
    if lack := driver_memory_lack(sweep.config, nodes(), own_node()):
        sweep.view.say(lack)
    board = TrialBoard(sweep.view, run)
    tune_trials(plan, seeds, board)
    return list(board.rows.values())


def report(sweep: Sweep, rows: Sequence[Row], run: SweepRun) -> None:
    """Write the table and plots to storage and MLflow, and print the front."""
    config = sweep.config
    size = config.cost.size
    files = {
        "sweep.csv": to_csv(rows, size),
        "sweep.json": to_json(rows, config.metric, config.cost.model_dump(mode="json")),
        "front.png": plots.front_png(rows, config.metric, size),
        "front.html": plots.front_html(rows, config.metric, size, config.name),
    }
    if (heat_map := plots.heat_map_png(rows, config.metric)) is not None:
        files["heat_map.png"] = heat_map
    for name, content in files.items():
        sweep.store.write(f"report/{name}", content)
    run.keep(files)
    sweep.view.console.print(front_table(rows, config.metric, f"{size[0]}×{size[1]}"))
    for row in (row for row in rows if row.status in ("failed", "stopped")):
        print_line(sweep.view.console, f"{row.phase} {row.name} {row.status}: {row.reason}")
    uri = mlflow_client.tracking_uri(config.mlflow.tracking_uri)
    print(f"MLflow: {shown_uri(uri)}, {run_link(uri, config.mlflow.experiment, run.run_id)}")
    for name in files:
        print(f"  {sweep.store.url}/report/{name}")


def register_best(sweep: Sweep, rows: Sequence[Row], run: SweepRun, plan: TrialPlan) -> None:
    """Register the best finished trials, the very best last, so that the alias with the sweep's name stays on it."""
    config = sweep.config
    if config.registration is None:
        return
    finished = [row for row in rows if row.phase == "trial" and row.status == "finished"]
    best = sorted(finished, key=lambda row: (row.metrics[config.metric], row.name))[: config.registration.best]
    for row in reversed(best):
        version = _register(plan, row, run)
        standing = run.parent.patience(registration.standing, run.client, version, config.objective)
        print(f"{row.name} {standing}")


def _register(plan: TrialPlan, row: Row, run: SweepRun) -> ModelVersion:
    """Register the model of a finished trial."""
    config, trial = plan.config, plan.trial(row.point)
    lineage = registration.Lineage(
        stage=config.name,
        parent="random" if plan.weights is None else plan.weights.source,
        manifests={part.data: plan.data[part.data] for part in trial.stage.mixture},
        config_hash=trial.key,
        code_version=code_version(),
        metrics=row.metrics,
        measured=registration.measured_on(trial.stage.validation, plan.versions),
    )
    name, run_id = config.mlflow.registered_model, run.child(row).run_id
    with tempfile.TemporaryDirectory(prefix="gmflow-best-") as folder:
        path = Path(folder) / FINAL_WEIGHTS
        path.write_bytes(open_store(trial.folder).read(FINAL_WEIGHTS))
        return run.parent.patience(registration.register, run.client, name, run_id, path, lineage, config.objective)


@resumable_command
def main() -> None:
    arguments = parse_arguments()
    config = load_config(SweepConfig, arguments.config, arguments.overrides)
    sweep = prepare(config)
    if arguments.dry_run:
        _say_overlap(sweep)
        show_dry_run(config, sweep.store, sweep.view.console)
        return
    cpus = [config.cost.cpus, config.probe.cpus if config.probe else 1]
    if config.tune is not None:
        cpus.append(config.tune.machine.num_workers * config.tune.machine.cpus_per_worker)
    with connected(max(cpus), verbose=arguments.verbose, dashboard=True):
        run_sweep(sweep, retry=arguments.retry_failed)


if __name__ == "__main__":
    main()
