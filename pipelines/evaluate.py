"""Score a model on a dataset: `python pipelines/evaluate.py --model REF --data MANIFEST_URL [--output DIR]`.

The last line on stdout is one JSON object with the metrics pooled over every valid pixel.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from datasets_etl.loader import EvaluationSet
from datasets_etl.manifest import Manifest
from datasets_etl.storage import open_store
from gmflow import GMFlow
from gmflow.metrics import FlowMetrics
from pipelines.arguments import device, positive
from pipelines.errors import command
from pipelines.training.pictures import comparison_png
from pipelines.training.registry import resolve_model
from pipelines.training.validation import Scored, score

console = Console(stderr=True)


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a set: pooled, and of every image by its key. See `FlowMetrics.compute`."""

    pooled: dict[str, float]
    images: dict[str, dict[str, float]]


def evaluate(
    model: GMFlow | None,
    evaluation_set: EvaluationSet,
    device: torch.device,
    on_scored: Callable[[Scored], None] = lambda scored: None,
) -> Evaluation:
    """Score every sample of a set, one at a time; without a model, zero flow is scored."""
    pooled = FlowMetrics()
    images = {}
    samples = (evaluation_set[number] for number in range(len(evaluation_set)))
    for scored in score(model, samples, device):
        pooled.merge(scored.metrics)
        images[scored.sample.key] = scored.metrics.compute()
        on_scored(scored)
    return Evaluation(pooled.compute(), images)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a model on a sharded dataset.")
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, .pth or .safetensors")
    parser.add_argument("--data", required=True, help="URL of a manifest, as pipelines/etl.py prints it")
    parser.add_argument("--subset", help="such as training-clean (default: all samples with ground truth)")
    parser.add_argument("--limit", type=positive, help="the first samples only")
    parser.add_argument("--output", help="folder or URL for metrics.json and a picture of every pair")
    parser.add_argument(
        "--device", type=device, default=device("auto"), help="cpu, cuda, cuda:1 (default: best there is)"
    )
    return parser.parse_args(argv)


def show(evaluation: Evaluation) -> None:
    names = ["epe", "px1", "px3", "px5", "f1_all"]
    table = Table(title="EPE in pixels, outlier rates in percent")
    table.add_column("pair")
    for name in names:
        table.add_column(name, justify="right")
    for key, metrics in evaluation.images.items():
        table.add_row(key, *(f"{metrics[name]:.3f}" for name in names))
    table.add_section()
    table.add_row("all pixels", *(f"{evaluation.pooled[name]:.3f}" for name in names))
    console.print(table)


def to_json(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN: a figure without a pixel becomes null."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


@command
def main() -> None:
    arguments = parse_arguments()
    evaluation_set = EvaluationSet(Manifest.load(arguments.data), arguments.subset, arguments.limit)
    model = resolve_model(arguments.model).to(arguments.device)
    output = open_store(arguments.output) if arguments.output else None
    bar = iter(track(range(len(evaluation_set)), description="evaluating", console=console))

    def keep(scored: Scored) -> None:
        next(bar)
        if output is not None:
            output.write(f"{scored.sample.key}.png", comparison_png(scored))

    evaluation = evaluate(model, evaluation_set, arguments.device, keep)
    next(bar, None)
    show(evaluation)
    summary = {
        "model": arguments.model,
        "data": arguments.data,
        "subset": arguments.subset,
        "pairs": len(evaluation_set),
    }
    if output is not None:
        images = {key: to_json(metrics) for key, metrics in evaluation.images.items()}
        content = {**summary, "pooled": to_json(evaluation.pooled), "images": images}
        output.write("metrics.json", json.dumps(content, indent=1).encode())
        console.print(f"metrics and pictures: {output.url}")
    print(json.dumps(summary | to_json(evaluation.pooled)))


if __name__ == "__main__":
    main()
