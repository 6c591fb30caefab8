"""Score a model on datasets: `python pipelines/evaluate.py --model REF --data MANIFEST_URL [--data …] [--output DIR]`.

The last line on stdout is one JSON object with the metrics pooled over every valid pixel. With several sets, they are
pooled over all sets together, and the metrics of each set are under "sets".
"""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from pipelines.cluster import connected, has_gpus  # sets Ray's environment, so before Ray

# isort: split
from mlflow.tracking import MlflowClient
from rich import box
from rich.console import Console
from rich.table import Table

from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.manifest import Manifest
from datasets_etl.objects import ObjectStore
from gmflow import GMFlow
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from gmflow.weights import weights_digest
from pipelines import report
from pipelines.arguments import Parser, add_model, add_precision, device, not_negative, positive
from pipelines.entry import first_line
from pipelines.errors import PipelineError, command
from pipelines.lasting import lasting_store
from pipelines.progress import Progress, print_line
from pipelines.references import resolve_named
from pipelines.report_page import without_nan
from pipelines.scoring import Evaluation, OnScored, ScoringOptions, evaluate, evaluate_on_ray, pool
from pipelines.training import mlflow_client, mlflow_patience, tracking
from pipelines.training.code_version import code_version
from pipelines.training.mlflow_client import place_of
from pipelines.wording import counted

console = Console(stderr=True)

_SHOWN = ("epe", "px1", "px3", "px5", "f1_all", "wauc")
_PAIRS_SHOWN = 24  # sets with more pairs than this are listed by scene

Scores = dict[str, tuple[EvaluationSet, Evaluation]]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Score a model on sharded datasets.")
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="MANIFEST[#SUBSET]",
        help="URL of a manifest, as pipelines/etl.py prints it; may be given several times",
    )
    parser.add_argument(
        "--subset", help="of every --data without its own (default: every subset with ground truth, each as a set)"
    )
    for option, what in (("--only", "score only"), ("--without", "leave out")):
        parser.add_argument(
            option,
            action="append",
            default=[],
            metavar="PATTERN",
            help=f"{what} samples whose names match, such as 'alley_*'; may be given several times",
        )
    parser.add_argument("--limit", type=positive, help="the first samples of each set only")
    parser.add_argument("--output", help="folder or URL for metrics.json, report.html and a picture of every pair")
    parser.add_argument(
        "--gallery",
        type=not_negative,
        default=24,
        metavar="PAIRS",
        help="pairs of each set in the report's gallery, half of them the worst (default: %(default)s)",
    )
    parser.add_argument("--occlusion", action="store_true", help="compute both flows, and show where they disagree")
    parser.add_argument("--track", metavar="EXPERIMENT", help="log figures and report to this experiment of MLflow")
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1; of Ray's tasks cpu or cuda (default: the best this machine or the cluster has)",
    )
    add_precision(parser)
    parser.add_argument(
        "--ray",
        action=argparse.BooleanOptionalAction,
        default=bool(os.environ.get("RAY_ADDRESS")),
        help="score by Ray tasks (default: if RAY_ADDRESS names a cluster)",
    )
    arguments = parser.parse_args(argv)
    if arguments.ray:
        # Tasks run on other machines; this one may have no GPU, so it cannot check the device.
        if arguments.device not in ("auto", "cpu", "cuda"):
            parser.error(f"argument --device: {arguments.device!r}: Ray's tasks take auto, cpu or cuda")
    else:
        try:
            arguments.device = device(arguments.device)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --device: {error}")
    return arguments


def chosen_sets(
    data: list[str],
    subset: str | None,
    limit: int | None = None,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
) -> dict[str, EvaluationSet]:
    """The sets to score, by unique names: dataset and subset, with the version added if that name is already taken.

    A manifest without a subset gives a set for each of its subsets. A pattern need not match in every manifest; one in
    which no pattern of `only` matches gives no set.
    """
    chosen = [(reference, *_manifest_and_subset(reference, subset)) for reference in data]
    matching = _matching([*only, *without], [(manifest, wanted) for _, manifest, wanted in chosen])
    sets: dict[str, EvaluationSet] = {}
    for (reference, manifest, wanted), here in zip(chosen, matching, strict=True):
        only_here, without_here = ([pattern for pattern in given if pattern in here] for given in (only, without))
        if only and not only_here:
            continue
        if wanted:
            found = [EvaluationSet(manifest, wanted, limit, only=only_here, without=without_here)]
        else:
            found = EvaluationSet.by_subset(manifest, limit, only=only_here, without=without_here)
        for one in found:
            for name, other in sets.items():
                if (other.manifest.version, other.subset) == (manifest.version, one.subset):
                    raise PipelineError(f"--data {reference}: {name} holds its pairs too, which would count twice")
            name = f"{manifest.dataset}/{one.subset}"
            sets[f"{name}@{manifest.version}" if name in sets else name] = one
    return sets


def _manifest_and_subset(reference: str, subset: str | None) -> tuple[Manifest, str | None]:
    """What MANIFEST#SUBSET names; folders may have a # in their names, manifests and subsets have none."""
    head, mark, tail = reference.rpartition("#")
    if mark and "/" not in tail:
        return Manifest.load(head), tail or subset
    return Manifest.load(reference), subset


def _matching(patterns: list[str], chosen: Sequence[tuple[Manifest, str | None]]) -> list[list[str]]:
    """Those of the patterns that match in each of the manifests and subsets; all of them if there is only one.

    Raises PipelineError for a pattern that matches in none.
    """
    if len(chosen) == 1:
        return [patterns]  # to choose by them says more about one that matches nothing
    matching = [manifest.which_match(patterns, subset) for manifest, subset in chosen]
    for pattern in patterns:
        if not any(pattern in here for here in matching):
            firsts = (manifest.samples[manifest.select(subset)[0]].name for manifest, subset in chosen)
            examples = ", ".join(dict.fromkeys(firsts))
            raise PipelineError(f"no sample of any --data matches {pattern!r}; names are such as {examples}")
    return matching


def score_sets(
    model: GMFlow, sets: dict[str, EvaluationSet], arguments: argparse.Namespace, output: ObjectStore | None
) -> Scores:
    """Score every set in turn, in this process or on Ray, and show how far it is."""
    scores: Scores = {}
    ray = connected() if arguments.ray else contextlib.nullcontext()
    with ray, Progress(console) as progress:
        pairs = progress.counting("evaluating", sum(len(chosen) for chosen in sets.values()))
        for name, chosen in sets.items():
            prefix = f"{name.replace('/', '_')}/" if len(sets) > 1 else ""

            def keep(key: str, picture: bytes | None, prefix: str = prefix) -> None:
                pairs.advance()
                if output is not None and picture is not None:
                    output.write(f"{prefix}{key}.png", picture)

            options = ScoringOptions(
                name=name,
                gallery=arguments.gallery,
                pictures=output is not None,
                bidirectional=arguments.occlusion,
                precision=arguments.precision,
                remedy="--precision bf16 or --device cpu",
            )
            scores[name] = chosen, _score(model, chosen, options, arguments, keep)
    return scores


def _score(
    model: GMFlow, chosen: EvaluationSet, options: ScoringOptions, arguments: argparse.Namespace, keep: OnScored
) -> Evaluation:
    if arguments.ray:
        use_gpu = arguments.device == "cuda" or (arguments.device == "auto" and has_gpus())
        return evaluate_on_ray(model, chosen, options, use_gpu=use_gpu, on_scored=keep)
    return evaluate(model, chosen, arguments.device, options, keep)


def show(scores: Scores) -> None:
    """Print a table of the sets: a row for each pair, or for each scene of a set with many pairs, and a pooled row."""
    title = "EPE in pixels; WAUC, more is better, and outlier rates in percent"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("pair or scene", overflow="fold")
    for name in _SHOWN:
        table.add_column(name, justify="right", no_wrap=True)
    for title, (chosen, evaluation) in scores.items():
        rows = evaluation.images if len(chosen) <= _PAIRS_SHOWN else evaluation.scenes
        for key, metrics in rows.items():
            table.add_row(key, *(f"{metrics[name]:.3f}" for name in _SHOWN))
        table.add_row(
            f"[bold]{title}, all pixels[/bold]", *(f"[bold]{evaluation.pooled[name]:.3f}[/bold]" for name in _SHOWN)
        )
        table.add_section()
    console.print(table)


def summarised(reference: str, stands_for: str, precision: Precision, scores: Scores) -> dict[str, Any]:
    """The JSON object that is printed as the last line. An alias moves, so what it stands for now is given too."""
    sets = {
        title: {
            "data": chosen.manifest.url,
            "subset": chosen.subset,
            **({"part": chosen.part} if chosen.part else {}),
            "pairs": len(chosen),
            "seconds_per_pair": evaluation.seconds,
            **without_nan(evaluation.pooled),
        }
        for title, (chosen, evaluation) in scores.items()
    }
    how = {"model": reference, "stands_for": stands_for, "precision": precision}
    if len(sets) == 1:
        return how | next(iter(sets.values()))
    pairs = sum(len(chosen) for chosen, _ in scores.values())
    pooled = pool(evaluation for _, evaluation in scores.values())
    return {**how, "pairs": pairs, **without_nan(pooled), "sets": sets}


def detailed(summary: dict[str, Any], scores: Scores) -> dict[str, Any]:
    """The content of metrics.json: the summary, and each set's figures: pooled, by scene and by image."""
    details = {
        title: {
            "pooled": without_nan(evaluation.pooled),
            "scenes": {scene: without_nan(metrics) for scene, metrics in evaluation.scenes.items()},
            "images": {key: without_nan(metrics) for key, metrics in evaluation.images.items()},
        }
        for title, (_, evaluation) in scores.items()
    }
    if len(details) == 1:
        return {**summary, **next(iter(details.values()))}
    return {**summary, "sets": {title: {**summary["sets"][title], **found} for title, found in details.items()}}


def connect(experiment: str) -> MlflowClient:
    """A client of MLflow that can log to this experiment. Raises PipelineError if there is none."""
    client = mlflow_client.connect(None)
    try:
        mlflow_client.experiment_id(client, experiment)
    except mlflow_patience.MLFLOW_ERRORS as error:
        text = f"--track {experiment}: {place_of(client)}: {first_line(error)}"
        raise mlflow_patience.as_error(error, text) from error
    return client


def track(client: MlflowClient, experiment: str, scores: Scores, content: dict[str, Any], page: str) -> None:
    """Log an MLflow run with every set's figures as metrics, and with metrics.json and the report.

    Raises PipelineError if MLflow does not accept them.
    """
    try:
        _log(client, experiment, scores, content, page)
    except mlflow_patience.MLFLOW_ERRORS as error:
        text = (
            f"MLflow at {place_of(client)} does not take the figures, which are complete without it: "
            f"{first_line(error)}"
        )
        raise mlflow_patience.as_error(error, text) from error


def _log(client: MlflowClient, experiment: str, scores: Scores, content: dict[str, Any], page: str) -> None:
    how = {name: content[name] for name in ("model", "stands_for", "precision")}
    how |= {f"data.{title.replace('@', '_')}": _data_label(chosen) for title, (chosen, _) in scores.items()}
    run = tracking.start_run(client, experiment, f"evaluate {content['model']}", how)
    with tracking.run_status(client, run.info.run_id):
        for title, (_, evaluation) in scores.items():
            for name, value in evaluation.pooled.items():
                if math.isfinite(value):
                    client.log_metric(run.info.run_id, f"eval/{title.replace('@', '_')}/{name}", value)
        client.log_dict(run.info.run_id, content, "metrics.json")
        client.log_text(run.info.run_id, page, report.FILE_NAME)
    print_line(console, f"MLflow: {place_of(client)}, experiment {experiment}, run {run.info.run_id}")


def _data_label(chosen: EvaluationSet) -> str:
    """A set's manifest, and which part of it was scored if that was not all."""
    return f"{chosen.manifest.url} ({chosen.part})" if chosen.part else chosen.manifest.url


def keep_results(
    arguments: argparse.Namespace,
    model: GMFlow,
    scores: Scores,
    summary: dict[str, Any],
    output: ObjectStore | None,
    client: MlflowClient | None,
) -> None:
    """Write all figures and the report to the output, to MLflow, or to both."""
    content = detailed(summary, scores)
    facts = [
        ("model", f"{arguments.model}: {summary['stands_for']}"),
        ("weights", weights_digest(model)),
        ("configuration", ", ".join(f"{name} {value}" for name, value in model.config.to_dict().items())),
        ("precision", arguments.precision),
        *((f"data {name}", _data_label(chosen)) for name, (chosen, _) in scores.items()),
        ("code", code_version()),
    ]
    pairs = sum(len(chosen) for chosen, _ in scores.values())
    page = report.evaluation_report(
        "Evaluation", f"{arguments.model} on {', '.join(scores)}: {counted(pairs, 'pair')}", model.config, scores, facts
    ).to_html()
    if output is not None:
        output.write("metrics.json", json.dumps(content, indent=1).encode())
        output.write(report.FILE_NAME, page.encode())
        print_line(console, f"metrics, report and pictures: {output.url}")
    if client is not None:
        track(client, arguments.track, scores, content, page)


@command
def main() -> None:
    arguments = parse_arguments()
    sets = chosen_sets(arguments.data, arguments.subset, arguments.limit, arguments.only, arguments.without)
    model, stands_for = resolve_named(arguments.model)
    if not arguments.ray:  # Ray tasks prepare their own copy
        prepare_model(model, ExecutionConfig(arguments.precision, replay=True), arguments.device)
    output = lasting_store(arguments.output, "--output") if arguments.output else None
    client = connect(arguments.track) if arguments.track else None  # fails before hours of scoring, not after
    scores = score_sets(model, sets, arguments, output)
    show(scores)
    summary = summarised(arguments.model, stands_for, arguments.precision, scores)
    try:
        if output is not None or client is not None:
            keep_results(arguments, model, scores, summary, output, client)
    finally:  # print the summary even if the rest fails
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
