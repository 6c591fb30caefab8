"""The whole pipeline, small, without any server: `make demo`.

Writes synthetic datasets in the five official layouts, shards them, trains all four stages, registers the models,
evaluates and predicts. Everything lands in `runs/demo`; a second call continues from what is there.
"""

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# First: see pipelines/__init__.py.
from pipelines.arguments import Parser

# isort: split
import cv2
import ray
import torch
from rich.console import Console
from rich.table import Table

from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.manifest import Manifest
from datasets_etl.storage import open_store
from datasets_etl.synthetic import write_dataset
from pipelines.cluster import connected
from pipelines.config_file import load_config
from pipelines.curriculum import run_curriculum
from pipelines.errors import resumable_command
from pipelines.etl import shard_dataset
from pipelines.frames import find_clips
from pipelines.predict import predict_clip
from pipelines.prediction_files import PredictionOptions
from pipelines.references import resolve_model
from pipelines.scoring import ScoringOptions, evaluate
from pipelines.training.aliases import CHAMPION
from pipelines.training.config import CurriculumConfig
from pipelines.training.plan import StageResult

ROOT = Path("runs/demo")
CONFIG = Path(__file__).with_name("configs") / "demo.yaml"
HEIGHT, WIDTH = 96, 128


@dataclass(frozen=True)
class _Synthetic:
    """A dataset to write, with `pairs` pairs to train on and `held_out` pairs to validate on."""

    dataset: str
    pairs: int
    held_out: int
    seed: int


DATASETS = {
    "chairs": _Synthetic("chairs", 240, 40, seed=1),
    "things": _Synthetic("things", 80, 0, seed=2),
    "sintel": _Synthetic("sintel", 60, 0, seed=3),
    "kitti": _Synthetic("kitti", 60, 0, seed=4),
    "hd1k": _Synthetic("hd1k", 40, 0, seed=5),
    "sintel_unseen": _Synthetic("sintel", 20, 0, seed=1003),
}


def write_raw_datasets() -> None:
    """Write each dataset in a Ray task, into a folder that gets its final name once it is complete."""
    task = ray.remote(_write_raw)
    missing = [name for name in DATASETS if not _raw(name).exists()]
    waiting = {task.remote(name): name for name in missing}
    while waiting:
        (finished,), _ = ray.wait(list(waiting), num_returns=1)
        ray.get(finished)
        name = waiting.pop(finished)
        _say(f"wrote synthetic {name}: {_raw(name)}")


def _write_raw(name: str) -> None:
    wanted, final = DATASETS[name], _raw(name)
    beside = final.with_name(f".{name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    write_dataset(
        wanted.dataset,
        beside,
        pairs=wanted.pairs,
        held_out=wanted.held_out,
        height=HEIGHT,
        width=WIDTH,
        seed=wanted.seed,
    )
    beside.rename(final)


def _raw(name: str) -> Path:
    return (ROOT / "raw" / name).absolute()


def shard_all() -> dict[str, str]:
    """Shard every dataset. Returns name → manifest URL."""
    return {
        name: shard_dataset(
            wanted.dataset, str(_raw(name)), str(ROOT / "shards" / name), workers=2, shard_bytes=16 * 2**20
        ).manifest_url
        for name, wanted in DATASETS.items()
    }


def zero_flow_epe(config: CurriculumConfig) -> dict[str, float]:
    """EPE of predicting no motion, by validation set: the value that any model has to beat."""
    return {
        chosen.name: evaluate(None, _set(config, chosen.data, chosen.subset), torch.device("cpu")).pooled["epe"]
        for chosen in config.stages[-1].validation
    }


def _set(config: CurriculumConfig, data: str, subset: str, limit: int | None = None) -> EvaluationSet:
    return EvaluationSet(Manifest.load(str(config.data[data])), subset, limit)


def use_champion(config: CurriculumConfig) -> list[Path]:
    """Pull the champion back from the registry, look at unseen pairs, predict two frames. Returns the pictures."""
    model = resolve_model(f"models:/{config.mlflow.registered_model}@{CHAMPION}", config.mlflow.tracking_uri)
    pictures = open_store(str(ROOT / "pictures"))
    written: list[Path] = []

    def keep(key: str, picture: bytes | None) -> None:
        if picture is not None:
            pictures.write(f"{key}.png", picture)
            written.append(ROOT / "pictures" / f"{key}.png")

    chairs = _set(config, "chairs", "val", limit=4)
    evaluate(model, chairs, torch.device("cpu"), ScoringOptions(pictures=True), keep)
    (clip,) = find_clips([str(path) for path in unseen_frames()])
    predict_clip(model, clip, open_store(str(ROOT / "prediction")), PredictionOptions())
    written += [ROOT / "prediction" / f"{clip.names[0]}{suffix}" for suffix in (".png", ".flo")]
    return written


def unseen_frames() -> list[Path]:
    """Two consecutive raw frames that no stage was trained on."""
    return sorted(_raw("sintel_unseen").rglob("final/*/frame_*.png"))[:2]


def show(results: list[StageResult], zero: dict[str, float], seconds: float) -> None:
    table = Table(title=f"EPE in pixels on pairs the model never saw ({seconds:.0f} s in all)")
    table.add_column("after stage")
    for name in zero:
        table.add_column(name, justify="right")
        table.add_column("of zero flow", justify="right")
    table.add_column("model")
    table.add_row("zero flow", *(cell for value in zero.values() for cell in (f"{value:.2f}", "100 %")), "")
    for result in results:
        cells = []
        for name, nothing in zero.items():
            value = result.metrics[f"val/{name}/epe"]
            cells += [f"{value:.2f}", f"{100 * value / nothing:.0f} %"]
        table.add_row(result.stage, *cells, result.model)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def show_next_commands(config: CurriculumConfig) -> None:
    model = f"models:/{config.mlflow.registered_model}@{CHAMPION}"
    frames = " ".join(os.path.relpath(path) for path in unseen_frames())
    print("\nTry next:")
    print(f"  export MLFLOW_TRACKING_URI={config.mlflow.tracking_uri}")
    print(f"  .venv/bin/python pipelines/evaluate.py --model {model} --data {config.data['sintel_unseen']}")
    print(f"  .venv/bin/python pipelines/predict.py --model {model} --output runs/demo/mine {frames}")
    print("  .venv/bin/mlflow server --backend-store-uri $MLFLOW_TRACKING_URI    # curves, pictures and models")
    print("  make demo                                                           # goes on: nothing is trained twice")


def _say(line: str) -> None:
    print(line, flush=True)


@resumable_command
def main() -> None:
    Parser(description="The whole pipeline, small, without any server.").parse_args()
    began = time.monotonic()
    cv2.setNumThreads(1)
    with connected(2):
        write_raw_datasets()
        manifests = shard_all()
        config = load_config(CurriculumConfig, str(CONFIG), [f"data.{name}={url}" for name, url in manifests.items()])
        zero = zero_flow_epe(config)
        results = run_curriculum(config)
    pictures = use_champion(config)
    show(results, zero, time.monotonic() - began)
    print("\nPictures:")
    for path in pictures:
        print(f"  {path}")
    show_next_commands(config)


if __name__ == "__main__":
    main()
