"""The training plane in figures: what Ray Train, tracking and checkpoints cost, how two workers scale, how fast a lost
worker is back.

    python -m benchmarks.training                      # all with the demo's small model
    python -m benchmarks.training --model base         # the same with the base model of the paper
    python -m benchmarks.training --only overhead --rounds 5

What is compared takes turns, and each figure is the median of its rounds. A machine that others use at the same time
tells the overhead all the same, but hardly the scaling: that needs two idle cores. Two processes that have nothing to
do with each other tell how far the machine itself scales.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import yaml
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets_etl.etl import run_etl
from datasets_etl.loader import MixturePart, PositionDataset, TrainingStream
from datasets_etl.manifest import Manifest
from datasets_etl.synthetic import write_dataset
from gmflow import GMFlow
from gmflow.loss import sequence_loss
from pipelines.cluster import connected, free_port
from pipelines.curriculum import run_curriculum
from pipelines.training.config import CurriculumConfig, load_config
from pipelines.training.state import TrainingState
from tests.pipelines.conftest import train_workers

ROOT = Path(__file__).parents[1]
# Steps at a run's beginning that count for nothing: caches, allocator, and the other workers' start.
WARM_UP = 10
# Ray runs a local cluster's workers at this niceness; what is compared with them has to run so too.
RAY_NICENESS = 15

console = Console(width=130)


@dataclass(frozen=True)
class Size:
    """What is trained: seconds a step or a fraction of one."""

    model: dict[str, object]
    crop: tuple[int, int]
    global_batch: int
    micro_batch: int
    steps: int


SIZES = {
    "demo": Size(
        {"backbone_channels": [24, 32, 48], "feature_channels": 64, "num_layers": 1, "attn_splits": [1]},
        crop=(64, 96),
        global_batch=8,
        micro_batch=4,
        steps=60,
    ),
    "base": Size({}, crop=(128, 192), global_batch=2, micro_batch=1, steps=40),
}


@dataclass(frozen=True)
class Row:
    what: str
    found: str
    aim: str
    reached: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ROWS), help="one of the measurements")
    parser.add_argument("--model", choices=list(SIZES), default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    size = SIZES[arguments.model]
    crop = "x".join(map(str, size.crop))
    table = Table(title=f"training plane, {arguments.model} model, crops {crop}, global batch {size.global_batch}")
    for column in ("what", "found", "aim", ""):
        table.add_column(column)
    with tempfile.TemporaryDirectory(prefix="gmflow-benchmark-") as folder:
        bench = Bench(Path(folder), size, arguments.rounds)
        for name, measure in ROWS.items():
            if arguments.only in (None, name):
                for row in measure(bench):
                    table.add_row(row.what, row.found, row.aim, "reached" if row.reached else "missed")
    console.print(table)


class Bench:
    """Shards of synthetic chairs, and a config of one stage on them."""

    def __init__(self, folder: Path, size: Size, rounds: int) -> None:
        self.folder = folder
        self.size = size
        self.rounds = rounds
        self._runs = 0
        height, width = (side + 32 for side in size.crop)
        write_dataset("chairs", folder / "raw", pairs=64, held_out=4, height=height, width=width, seed=1)
        with connected(2):
            self.manifest = run_etl("chairs", str(folder / "raw"), str(folder / "shards")).manifest_url

    def config(self, workers: int, **stage: object) -> Path:
        """A new run's config file: nothing of an earlier run is resumed."""
        self._runs += 1
        here = self.folder / f"run{self._runs}"
        here.mkdir()
        content = {
            "name": "benchmark",
            "storage": str(here / "storage"),
            "data": {"chairs": self.manifest},
            "model": self.size.model,
            "machine": {"num_workers": workers, "micro_batch": self.size.micro_batch, "loader_workers": 1},
            "mlflow": {"tracking_uri": f"sqlite:///{here}/mlflow.db"},
            "stages": [
                {
                    "name": "chairs",
                    "steps": self.size.steps,
                    "global_batch": self.size.global_batch,
                    "peak_lr": 1.0e-4,
                    "crop": list(self.size.crop),
                    "mixture": [{"data": "chairs", "subset": "train", "max_log2_scale": 0.2, "hflip": 0.5}],
                    "log_every": 5,
                    "checkpoint_every": 25,
                    **stage,
                }
            ],
        }
        path = here / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path


def trained(config_path: Path) -> dict[str, list[tuple[int, int, float]]]:
    """Run a curriculum; every tracked metric as (step, milliseconds, value)."""
    config = load_config(CurriculumConfig, str(config_path), [])
    with connected(2):
        (result,) = run_curriculum(config)
    client = MlflowClient(str(config.mlflow.tracking_uri))
    names = client.get_run(result.mlflow_run).data.metrics
    return {
        name: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(result.mlflow_run, name)]
        for name in names
    }


def whole_step_s(metrics: dict[str, list[tuple[int, int, float]]]) -> float:
    """Seconds a step from one record to the next, with all that lies between, checkpoints and reports included."""
    told = [(step, ms) for step, ms, _ in metrics["train/loss"] if step >= WARM_UP]
    (first, since), (last, until) = told[0], told[-1]
    return (until - since) / 1000 / (last - first)


def overhead(bench: Bench) -> Iterator[Row]:
    """A stage on Ray against a bare DDP loop: with a core left for Ray's own processes, and with none on two cores."""
    for workers in (1, 2):
        ratios, steps, waits = [], [], []
        for _ in range(bench.rounds):
            bare = max(bare_step_s(bench, [workers]))
            metrics = trained(bench.config(workers))
            steps.append(whole_step_s(metrics))
            ratios.append(steps[-1] / bare)
            waits.append(statistics.median(value for step, _, value in metrics["time/data_wait"] if step >= WARM_UP))
        ratio, waited = statistics.median(ratios), statistics.median(waits)
        found = (
            f"{ratio:.3f} ({', '.join(f'{r:.3f}' for r in ratios)}); {1000 * statistics.median(steps):.0f} ms a step"
        )
        who = "one worker" if workers == 1 else "two workers"
        yield Row(f"{who}: step on Ray with tracking and checkpoints / bare DDP loop", found, "<= 1.02", ratio <= 1.02)
        yield Row(f"{who}: share of a step spent waiting for data", f"{waited:.1%}", "<= 3%", waited <= 0.03)


def bare_step_s(bench: Bench, groups: list[int]) -> list[float]:
    """Seconds a step of the plainest loop over the same model, stream, loss and optimiser.

    Args:
        bench: gives model and data.
        groups: sizes of DDP groups that run at the same time and know nothing of each other.

    Returns one figure a group.
    """
    context = multiprocessing.get_context("spawn")
    processes, found = [], []
    for number, workers in enumerate(groups):
        port, config = free_port(), bench.config(1)
        found.append(bench.folder / f"bare{number}.txt")
        processes += [
            context.Process(target=_bare_worker, args=(rank, workers, port, config, str(found[-1])))
            for rank in range(workers)
        ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [float(path.read_text()) for path in found]


def _bare_worker(rank: int, world_size: int, port: int, config_path: Path, found: str) -> None:
    os.nice(max(0, RAY_NICENESS - os.nice(0)))
    torch.set_num_threads(1)
    config = load_config(CurriculumConfig, str(config_path), [])
    (stage,) = config.stages
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.manual_seed(config.seed)
    model = GMFlow(config.model.build())
    prepared: nn.Module = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    state = TrainingState.fresh(model, stage)
    parts = [
        MixturePart(Manifest.load(str(config.data[part.data])), part.subset, 1, part.augmentation(stage.crop))
        for part in stage.mixture
    ]
    stream = TrainingStream(
        PositionDataset(parts, seed=config.seed),
        range(stage.steps),
        global_batch=stage.global_batch,
        micro_batch=config.machine.micro_batch,
        rank=rank,
        world_size=world_size,
        workers=config.machine.loader_workers,
    )
    since = 0.0
    for step, batches in stream:
        if step == WARM_UP:
            since = time.perf_counter()
        for batch in batches:  # one a step with two ranks; alone, what accumulates needs no synchronisation
            loss = sequence_loss(
                prepared(batch.image0.float(), batch.image1.float()).predictions,
                batch.flow,
                batch.valid,
                gamma=stage.gamma,
                max_flow=stage.max_flow,
                normalizer=stage.global_batch / world_size,
            )
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), stage.clip_norm)
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad(set_to_none=True)
    if rank == 0:
        Path(found).write_text(str((time.perf_counter() - since) / (stage.steps - WARM_UP)))
    dist.destroy_process_group()


def scaling(bench: Bench) -> Iterator[Row]:
    """One worker against two, one thread each, and what the machine gives two loops that do not know of each other."""
    ratios, limits = [], []
    for _ in range(bench.rounds):
        (alone,) = bare_step_s(bench, [1])
        limits.append(2 * alone / max(bare_step_s(bench, [1, 1])))
        one = whole_step_s(trained(bench.config(workers=1)))
        ratios.append(one / whole_step_s(trained(bench.config(workers=2))))
    ratio, limit = statistics.median(ratios), statistics.median(limits)
    found = f"{ratio:.2f} ({', '.join(f'{r:.2f}' for r in ratios)})"
    yield Row("samples a second, two workers / one", found, ">= 1.9", ratio >= 1.9)
    found = f"{limit:.2f} ({', '.join(f'{r:.2f}' for r in limits)})"
    yield Row("the same of two bare loops without any communication", found, "the machine's limit", True)
    yield Row("two workers / one as a fraction of that limit", f"{ratio / limit:.2f}", ">= 0.95", ratio >= 0.95 * limit)


def recovery(bench: Bench) -> Iterator[Row]:
    """SIGKILL of a worker until a step is done that was not done before."""
    found = [_recovery_s(bench) for _ in range(bench.rounds)]
    value = statistics.median(found)
    told = f"{value:.1f} s ({', '.join(f'{s:.1f}' for s in found)})"
    yield Row("SIGKILL of a worker until the next new step", told, "<= 30 s", value <= 30)


def _recovery_s(bench: Bench) -> float:
    path = bench.config(workers=2, steps=400, log_every=1, checkpoint_every=10)
    command = [sys.executable, str(ROOT / "pipelines" / "curriculum.py"), "--config", str(path)]
    process = subprocess.Popen(command, cwd=bench.folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    killed_at, resumed, newest = 0.0, False, 0
    try:
        for line in process.stdout:
            match = re.search(r"step=(\d+)/.* loss=", line)
            step = int(match[1]) if match else 0
            if not killed_at and step >= 25:
                os.kill(train_workers(process.pid)[0], signal.SIGKILL)
                killed_at = time.monotonic()
            resumed = resumed or (killed_at > 0 and "resumes" in line)
            if resumed and step > newest:
                return time.monotonic() - killed_at
            if not resumed:
                newest = max(newest, step)  # also what was under way to be told when the worker was killed
        raise RuntimeError("the run ended before its worker was killed and back")
    finally:
        process.terminate()
        process.wait()


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {"overhead": overhead, "scaling": scaling, "recovery": recovery}


if __name__ == "__main__":
    main()
