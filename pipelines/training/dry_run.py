"""`curriculum.py --dry-run`: the resolved config, and the time and memory that every stage would take."""

from collections.abc import Iterator, Sequence
from datetime import timedelta

import yaml
from rich.table import Table

from pipelines.claim import standing_claims
from pipelines.references import check_reference
from pipelines.training.beginning import moved_start, weights_are_pinned
from pipelines.training.checkpoints import CheckpointStore
from pipelines.training.config import CurriculumConfig, StageConfig
from pipelines.training.display import output
from pipelines.training.estimate import TooLargeError, estimate
from pipelines.training.launch import room_lacking
from pipelines.training.plan import StagePlan, learned_pairs, new_beside, plan_curriculum

_FINISHED = "finished"


def show_dry_run(config: CurriculumConfig) -> None:
    """Print the resolved config, and for every stage its samples, its state, and the time and memory it would take.

    Raises DataError or PipelineError if data or weights are missing.
    """
    plans = plan_curriculum(config)
    states = [_standing(plan) for plan in plans]  # now: an error of storage is told before anything is measured
    if config.init_from is not None and not weights_are_pinned(plans[0].folder):
        check_reference(config.init_from, config.mlflow.tracking_uri)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    table = Table(title=f"curriculum {config.name}, not run")
    for column in ("stage", "state", "starts from"):
        table.add_column(column)
    for column in ("steps", "batch", "crop", "samples an epoch", "epochs", "computing", "memory a worker"):
        table.add_column(column, justify="right")
    start = config.init_from or "random weights"
    for plan, standing in zip(plans, states, strict=True):
        stage = plan.stage
        samples = sum(len(part.indices(plan.manifests[part.data])) * part.repeats for part in stage.mixture)
        time = memory = ""
        if standing != _FINISHED:
            print(f"stage={stage.name} measuring a step on one worker", flush=True)
            time, memory = _cost(config, stage)
        table.add_row(
            stage.name,
            standing,
            start,
            f"{stage.steps:,}",
            f"{stage.global_batch}",
            f"{stage.crop[0]}x{stage.crop[1]}",
            f"{samples:,}",
            f"{stage.steps * stage.global_batch / samples:.1f}",
            time,
            memory,
        )
        start = stage.name
    output().print(table)
    print(
        "computing: steps × the time of one, measured just now on one worker of this Ray, without reading, validation "
        "and the workers' meeting; empty where a stage is finished, this Ray has no room for a worker, or measuring "
        "took too long"
    )
    for line in (*_beginnings(config, plans), *_learned(config, plans), room_lacking(config.machine)):
        if line:
            print(line)
    for name, claim in standing_claims({f"stage {plan.stage.name}": plan.folder for plan in plans}).items():
        print(f"{name}: claimed by {claim}; the same command is refused as long as that lives")


def _beginnings(config: CurriculumConfig, plans: Sequence[StagePlan]) -> Iterator[str]:
    """What a person may not expect of how the stages begin."""
    if moved := moved_start(plans[0].folder, config.init_from, config.mlflow.tracking_uri):
        yield f"stage {plans[0].stage.name} {moved}"
    for plan in plans:
        if new := new_beside(plan):
            yield f"stage {plan.stage.name} {new}"


def _learned(config: CurriculumConfig, plans: Sequence[StagePlan]) -> Iterator[str]:
    """A line for each decision that compares models by pairs that they were trained on."""
    promotion = [] if config.promotion is None else [("promotion", config.promotion)]
    for number, plan in enumerate(plans):
        if plan.stage not in config.selected_stages:
            continue
        mixtures = [part for before in plans[: number + 1] for part in before.stage.mixture]
        sets = {chosen.name: chosen for chosen in plan.stage.validation}
        for purpose, metric in [*plan.stage.compared, *promotion]:
            chosen = sets[metric.set_name]
            if learned := learned_pairs(mixtures, chosen, plan.manifests):
                pairs = len(chosen.indices(plan.manifests[chosen.data]))
                yield (
                    f"{purpose} compares stage {plan.stage.name} by {metric.name}: it has trained on {learned:,} of "
                    f"these {pairs:,} pairs by then (to hold pairs out: without, in mixtures)"
                )


def _cost(config: CurriculumConfig, stage: StageConfig) -> tuple[str, str]:
    """Time of all steps and memory of a worker, as text for the table."""
    try:
        cost = estimate(config, stage)
    except TooLargeError:
        return "", "does not fit"
    if cost is None:
        return "", ""
    return str(timedelta(seconds=round(stage.steps * cost.step_s))), f"{cost.memory_gib:.1f} GiB"


def _standing(plan: StagePlan) -> str:
    if plan.stage not in plan.config.selected_stages:
        return "before" if plan.result() else "before, missing"
    if plan.result():
        return _FINISHED
    steps = CheckpointStore(plan.folder).steps()
    return f"at step {steps[0]:,}" if steps else "new"
