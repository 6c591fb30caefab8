"""Measure the training plane: what Ray Train, tracking and checkpoints cost, how two workers scale, how fast a lost
worker is replaced and what that costs, and whether the losses match those of a plain loop with the same recipe.

    python -m benchmarks.training                      # all with the demo's small model
    python -m benchmarks.training --model base         # the same with the base model of the paper
    python -m benchmarks.training --only overhead --rounds 5

The programs that are compared take turns of a few seconds, so the overhead can be measured even on a shared machine.
The scaling hardly can: it needs two idle cores. Two independent loops show how far the machine itself scales.
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
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
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
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.turns import Mark, Program, take_turns, warmed_up
from datasets_etl.batches import collate
from datasets_etl.etl import run_etl
from datasets_etl.loader import PositionDataset, TrainingStream
from datasets_etl.manifest import Manifest
from datasets_etl.synthetic import write_dataset
from gmflow import GMFlow, load_model
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.loss import sequence_loss
from pipelines.arguments import positive
from pipelines.cluster import connected, free_port
from pipelines.config_file import load_config
from pipelines.training.checkpoints import INITIAL_WEIGHTS
from pipelines.training.config import CurriculumConfig
from pipelines.training.state import TrainingState
from tests.pipelines.machines import train_workers

ROOT = Path(__file__).parents[1]
TURNS = 5
"""Turns of each program per round."""
ENDLESS = 100_000
"""Number of steps: more than a program does before the benchmark ends it."""
# Ray runs a local cluster's workers at this niceness; the loops compared with them must run at it, too.
RAY_NICENESS = 15

console = Console(width=130)


@dataclass(frozen=True)
class Size:
    """What is trained, and for how many seconds at a time.

    The first `warm_up` steps do not count: caches and allocator fill, and the other workers start. Turns are long
    enough for two records of a stage on Ray, and short enough that the machine is as fast in one turn as in the next.
    """

    model: dict[str, object]
    crop: tuple[int, int]
    global_batch: int
    micro_batch: int
    log_every: int
    warm_up: int
    turn_s: float


SIZES = {
    "demo": Size(
        {"backbone_channels": [24, 32, 48], "feature_channels": 64, "num_layers": 1, "attn_splits": [1]},
        crop=(64, 96),
        global_batch=8,
        micro_batch=4,
        log_every=5,
        warm_up=10,
        turn_s=4.0,
    ),
    # The batch of the paper's stages (chairs: 16), one sample per pass; ranks exchange gradients once per step.
    "base": Size({}, crop=(128, 192), global_batch=8, micro_batch=1, log_every=1, warm_up=3, turn_s=12.0),
}


@dataclass(frozen=True)
class Row:
    what: str
    found: str
    aim: str
    reached: bool | None  # None if there is no aim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ROWS), help="one of the measurements")
    parser.add_argument("--model", choices=list(SIZES), default="demo", help="what is trained (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help=f"of {TURNS} turns each (default: %(default)s)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    size = SIZES[arguments.model]
    crop = "x".join(map(str, size.crop))
    table = Table(title=f"training plane, {arguments.model} model, crops {crop}, global batch {size.global_batch}")
    for column in ("what", "found", "aim", ""):
        table.add_column(column)
    with tempfile.TemporaryDirectory(prefix="gmflow-benchmark-") as folder:
        bench = Bench(Path(folder), size, arguments.rounds)
        # From now on SIGTERM raises SystemExit (Ray has set its own handler before), so that the programs are ended.
        # They are stopped most of the time, and would otherwise stay stopped.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        for name, measure in ROWS.items():
            if arguments.only in (None, name):
                for row in measure(bench):
                    verdict = {True: "reached", False: "missed", None: ""}[row.reached]
                    table.add_row(row.what, row.found, row.aim, verdict)
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
        """Write the config file of a new run, which resumes no earlier run."""
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
                    "steps": ENDLESS,
                    "global_batch": self.size.global_batch,
                    "peak_lr": 1.0e-4,
                    "crop": list(self.size.crop),
                    "mixture": [{"data": "chairs", "subset": "train", "max_log2_scale": 0.2, "hflip": 0.5}],
                    "log_every": self.size.log_every,
                    "checkpoint_every": 25,
                    **stage,
                }
            ],
        }
        path = here / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path


def overhead(bench: Bench) -> Iterator[Row]:
    """Compare a stage on Ray with a bare DDP loop, for one and two workers, and measure the gain of the second worker.

    All of them take turns: Ray's own processes, loaders and tracking run in the turn of their stage and are stopped in
    the turns of others.
    """
    ray: dict[int, StageOnRay] = {}
    programs: dict[str, Program] = {}
    try:
        for workers in (1, 2):
            ray[workers] = stage_on_ray(bench, workers)
            programs[f"ray {workers}"] = ray[workers].program
        for groups in ([1], [2], [1, 1]):
            programs[f"bare {'+'.join(map(str, groups))}"] = bare_loop(bench, groups)
        programs["bare 2, meeting"] = bare_loop(bench, [2], exchange=False)
        warmed_up(list(programs.values()), bench.size.warm_up)
        for done in take_turns(list(programs.values()), TURNS * bench.rounds, bench.size.turn_s):
            console.print(f"turn {done} of {TURNS * bench.rounds}")
    finally:
        for program in programs.values():
            program.end()

    def ratio(one: str, other: str, times: float = 1.0) -> tuple[float, str]:
        """Ratio of the seconds per step over all turns, and a text that adds the ratio of each round."""
        parts = [slice(TURNS * number, TURNS * (number + 1)) for number in range(bench.rounds)]
        whole, *each = (times * programs[one].step_s(p) / programs[other].step_s(p) for p in [slice(None), *parts])
        return whole, f"{whole:.3f} ({', '.join(f'{part:.3f}' for part in each)})"

    for workers, who in ((1, "one worker"), (2, "two workers")):
        value, text = ratio(f"ray {workers}", f"bare {workers}")
        text += f"; {1000 * programs[f'ray {workers}'].step_s():.0f} ms a step"
        yield Row(f"{who}: step on Ray with tracking and checkpoints / bare DDP loop", text, "<= 1.02", value <= 1.02)
        waited = ray[workers].data_wait()
        yield Row(f"{who}: share of a step spent waiting for data", f"{waited:.1%}", "<= 3%", waited <= 0.03)
    value, text = ratio("ray 1", "ray 2")
    yield Row("samples a second, two workers / one", text, ">= 1.9", value >= 1.9)
    value, text = ratio("bare 1", "bare 2")
    yield Row("the same of the bare DDP loop", text, "", None)
    _, text = ratio("bare 1", "bare 2, meeting")
    yield Row("the same of two that wait for each other and exchange no gradients", text, "what waiting allows", None)
    _, text = ratio("bare 1", "bare 1+1", times=2)
    yield Row("the same of two bare loops without any communication", text, "the machine's limit", None)


@dataclass(frozen=True)
class StageOnRay:
    """A curriculum of one stage that runs as a separate program."""

    program: Program
    metrics: Callable[[str], list[tuple[int, int, float]]]

    def data_wait(self) -> float:
        """Median share of a step spent waiting for data, over the records that no pause interrupted."""
        records = self.metrics("time/data_wait")
        whole = [
            value
            for (_, since, _), (_, until, value) in pairwise(records)
            if self.program.within_a_turn(since / 1000, until / 1000)
        ]
        if not whole:
            raise RuntimeError("no two records within a turn; make turns longer")
        return statistics.median(whole)


def stage_on_ray(bench: Bench, workers: int) -> StageOnRay:
    path = bench.config(workers)
    command = [sys.executable, str(ROOT / "pipelines" / "curriculum.py"), "--config", str(path)]
    log = path.parent / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=path.parent, stdout=output, stderr=output)

    def metrics(name: str) -> list[tuple[int, int, float]]:
        """Every tracked value as (step, time in milliseconds, value)."""
        if " loss=" not in log.read_text():
            return []  # two processes that create the database's tables at the same time conflict
        client = MlflowClient(f"sqlite:///{path.parent}/mlflow.db")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = [run for run in client.search_runs(experiments) if name in run.data.metrics]
        history = client.get_metric_history(runs[0].info.run_id, name) if runs else []
        return [(metric.step, metric.timestamp, metric.value) for metric in history]

    def marks() -> list[Mark]:
        return [Mark(step, ms / 1000) for step, ms, _ in metrics("train/loss")]

    return StageOnRay(Program([process.pid], marks), metrics)


def bare_loop(bench: Bench, groups: list[int], *, exchange: bool = True) -> Program:
    """Start the plainest loop over the same model, stream, loss and optimiser.

    Args:
        bench: provides model and data.
        groups: sizes of independent DDP groups that run at the same time; only the first one reports its steps.
        exchange: whether a group averages its gradients; otherwise its ranks only wait for each other in every step.
    """
    context = multiprocessing.get_context("spawn")
    config = bench.config(1)
    steps_file = config.parent / "steps.txt"
    steps_file.touch()
    processes = [
        context.Process(
            target=_bare_worker, args=(rank, workers, port, config, steps_file if number == 0 else None, exchange)
        )
        for number, (workers, port) in enumerate((workers, free_port()) for workers in groups)
        for rank in range(workers)
    ]
    for process in processes:
        process.start()

    def marks() -> list[Mark]:
        lines = [line.split() for line in steps_file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [Mark(int(step), float(at)) for step, at in lines]

    return Program([process.pid for process in processes if process.pid is not None], marks)


def _bare_worker(
    rank: int, world_size: int, port: int, config_path: Path, steps_file: Path | None, exchange: bool
) -> None:
    os.nice(max(0, RAY_NICENESS - os.nice(0)))
    torch.set_num_threads(1)
    config = load_config(CurriculumConfig, str(config_path), [])
    (stage,) = config.stages
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.manual_seed(config.seed)
    model = GMFlow(config.model.build())
    prepare_model(model, ExecutionConfig())  # the same process-wide settings as on Ray
    prepared = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    state = TrainingState.fresh(model, stage)
    parts = [part.build(Manifest.load(str(config.data[part.data])), stage.crop) for part in stage.mixture]
    stream = TrainingStream(
        PositionDataset(parts, seed=config.seed),
        range(stage.steps),
        global_batch=stage.global_batch,
        micro_batch=config.machine.micro_batch,
        rank=rank,
        world_size=world_size,
        workers=config.machine.loader_workers,
    )
    passes = stage.global_batch // world_size // config.machine.micro_batch
    for step, batches in stream:
        for number, batch in enumerate(batches, 1):
            with nullcontext() if number == passes and exchange else prepared.no_sync():
                loss = sequence_loss(
                    prepared(batch.image0.float(), batch.image1.float()).predictions,
                    batch.flow,
                    batch.valid,
                    gamma=stage.gamma,
                    max_flow=stage.max_flow,
                    normalizer=stage.global_batch / world_size,
                )
                loss.backward()  # type: ignore[no-untyped-call]
        if not exchange:
            dist.barrier()
        nn.utils.clip_grad_norm_(model.parameters(), stage.clip_norm)
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad(set_to_none=True)
        if rank == 0 and steps_file is not None:
            with steps_file.open("a") as file:
                file.write(f"{step + 1} {time.time()}\n")


def recovery(bench: Bench) -> Iterator[Row]:
    """Measure the time from SIGKILL of a worker to the next new step, and how many steps are done again."""
    seconds, repeated = zip(*(_recovery(bench) for _ in range(bench.rounds)), strict=True)
    value = statistics.median(seconds)
    text = f"{value:.1f} s ({', '.join(f'{s:.1f}' for s in seconds)})"
    yield Row("SIGKILL of a worker until the next new step", text, "<= 30 s", value <= 30)
    what = f"steps done again, of {_CHECKPOINT_EVERY} from one checkpoint to the next"
    text = f"{max(repeated)} ({', '.join(map(str, repeated))})"
    yield Row(what, text, f"<= {_CHECKPOINT_EVERY}", max(repeated) <= _CHECKPOINT_EVERY)


_CHECKPOINT_EVERY = 10


def _recovery(bench: Bench) -> tuple[float, int]:
    """(seconds, number of steps that were done twice)"""
    path = bench.config(workers=2, steps=400, log_every=1, checkpoint_every=_CHECKPOINT_EVERY)
    command = [sys.executable, str(ROOT / "pipelines" / "curriculum.py"), "--config", str(path)]
    process = subprocess.Popen(command, cwd=bench.folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    killed_at, resumed_at, newest = 0.0, None, 0
    try:
        for line in process.stdout:
            match = re.search(r"step=(\d+)/.* loss=", line)
            step = int(match[1]) if match else 0
            if not killed_at and step >= 25:
                os.kill(train_workers(process.pid)[0], signal.SIGKILL)
                killed_at = time.monotonic()
            if killed_at and (match := re.search(r"step=(\d+)/.* resumes", line)):
                resumed_at = int(match[1])
            if resumed_at is not None and step > newest:
                return time.monotonic() - killed_at, newest - resumed_at
            if resumed_at is None:
                newest = max(newest, step)  # also steps done before the kill but printed after it
        raise RuntimeError("the run ended before its worker was killed and back")
    finally:
        process.terminate()
        process.wait()


def losses(bench: Bench) -> Iterator[Row]:
    """Compare the losses of the recipe's first steps: two workers on Ray against a plain loop in one process.

    Training magnifies rounding errors, so the row also shows the effect of another thread count on the plain loop.
    """
    path = bench.config(workers=2, log_every=1, peak_lr=4.0e-4)
    command = [sys.executable, str(ROOT / "pipelines" / "curriculum.py"), "--config", str(path)]
    process = subprocess.Popen(command, cwd=path.parent, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not any(f"step={_COMPARED}/" in line for line in process.stdout):
            raise RuntimeError(f"the run ended before step {_COMPARED}")
    finally:
        process.terminate()  # the tracked values stay
        process.communicate()
    client = MlflowClient(f"sqlite:///{path.parent}/mlflow.db")
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    (run,) = [run for run in runs if "train/loss" in run.data.metrics]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    found = [metric.value for metric in sorted(history, key=lambda metric: metric.step)[:_COMPARED]]
    plain, other = (_plain_losses(path, threads) for threads in (1, 2))
    off, apart = (max(abs(a - b) / b for a, b in zip(some, plain, strict=True)) for some in (found, other))
    what = f"{_COMPARED} losses of two workers, at most off those of a plain loop, relative"
    yield Row(what, f"{off:.1e}; the plain loop on two threads {apart:.1e}", "<= 1e-3", off <= 1e-3)


_COMPARED = 20


def _plain_losses(config_path: Path, threads: int) -> list[float]:
    torch.set_num_threads(threads)
    config = load_config(CurriculumConfig, str(config_path), [])
    (stage,) = config.stages
    (initial,) = (config_path.parent / "storage").glob(f"*/{INITIAL_WEIGHTS}")
    model = load_model(initial).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.peak_lr, weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, stage.peak_lr, stage.steps + 10, pct_start=0.05, cycle_momentum=False)
    (part,) = stage.mixture
    manifest = Manifest.load(str(config.data[part.data]))
    samples = PositionDataset([part.build(manifest, stage.crop)], seed=config.seed)
    found = []
    for step in range(_COMPARED):
        first = step * stage.global_batch
        image0, image1, flow, valid = collate([samples[first + number] for number in range(stage.global_batch)])
        predictions = model(image0.float(), image1.float()).predictions
        errors = [(valid[:, None] * (predicted - flow).abs()).mean() for predicted in predictions]
        loss = torch.stack([stage.gamma ** (len(errors) - 1 - i) * error for i, error in enumerate(errors)]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), stage.clip_norm)
        optimizer.step()
        schedule.step()
        found.append(loss.item())
    return found


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {"overhead": overhead, "recovery": recovery, "losses": losses}


if __name__ == "__main__":
    main()
