"""Speed and memory of the model, as a table: seconds, work, fraction of the machine's peak, bytes kept for backward.

    python -m benchmarks.model                # base and refine, inference, training, growth up to 4K
    python -m benchmarks.model --quick        # small images, one repetition
    python -m benchmarks.model --device cuda

On a GPU, passes are recorded and replayed, and training sums in a fixed order, as in the pipelines.

The work of a row is computed from formulas that count the operations of the tests' oracle: every window of a shifted
grid is complete, and nothing is recomputed. The peak is the speed of square matrix products, measured before and after
every repetition; each row is the median of its repetitions. On a shared machine, add `--threads 1 --clock cpu`: the CPU
time of one thread does not include the time that other processes took.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gmflow import GMFlow, GMFlowConfig
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.loss import sequence_loss
from gmflow.replay import WARM_UPS
from pipelines.arguments import device, positive
from pipelines.wording import counted

VARIANTS = {"base": GMFlowConfig.base(), "refine": GMFlowConfig.refine()}
# Types of the matrix products that give the peak. On a GPU, tf32 differs from fp32 by a setting of the process, which
# `prepare_model` makes; on a CPU they are the same.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One row to be measured, in a separate process so that the peak memory is that of this row alone."""

    variant: str
    mode: str
    height: int
    width: int
    precision: str = "fp32"
    checkpointing: str = "none"
    compile: bool = False
    batch: int = 1
    replay: bool = True
    repetitions: int = 3
    warm_up: bool = True

    @property
    def name(self) -> str:
        name = f"{self.variant} {self.mode} {self.height}x{self.width} {self.precision}"
        name += f" batch {self.batch}" * (self.batch > 1)
        name += f" ckpt={self.checkpointing}" * (self.checkpointing != "none")
        return name + " compiled" * self.compile + " not replayed" * (not self.replay)

    def prepared(self, device: str, *, replay: bool) -> GMFlow:
        """The model with the settings of this row."""
        training = self.mode == "train"
        execution = ExecutionConfig(
            self.precision,  # type: ignore[arg-type]
            self.checkpointing,  # type: ignore[arg-type]
            self.compile,
            replay=replay,
            same_bits=training,
        )
        model = GMFlow(VARIANTS[self.variant])
        prepare_model(model.train(training), execution, device)
        return model


def matrix_gflop(config: GMFlowConfig, height: int, width: int, training: bool) -> float:
    """Work of the matrix products and convolutions for one pair of images, in 10⁹ operations (a multiply-add is 2).

    The backward pass counts as twice the forward pass.
    """
    c, pixels = config.feature_channels, height * width
    stem, middle, last = config.backbone_channels
    stage3 = 64 if config.num_scales == 1 else 16  # image pixels per pixel of the last stage
    convolutions = (
        pixels / 4 * (147 * stem + 36 * stem * stem)
        + pixels / 16 * (10 * stem * middle + 27 * middle * middle)
        + pixels / stage3 * (10 * middle * last + 27 * last * last + last * c)
    )
    if config.num_scales == 2:
        convolutions += 9 * c * c * (pixels / 16 + pixels / 64)
    work = 2 * convolutions  # both images
    for scale, stride in enumerate(config.strides):
        tokens = pixels / stride**2
        per_token = (8 + 6 * config.ffn_expansion) * c * c
        attended = tokens / config.attn_splits[scale] ** 2
        work += 2 * tokens * config.num_layers * (per_token + 4 * c * attended)
        for radius in (config.corr_radius[scale], config.prop_radius[scale]):
            work += tokens * (tokens if radius == -1 else (2 * radius + 1) ** 2) * (c + 2)
        work += 2 * tokens * c * c
    fine = pixels / config.strides[-1] ** 2
    work += fine * 256 * (9 * (c + 2) + 9 * config.strides[-1] ** 2)
    return 2 * work * (3 if training else 1) / 1e9


def measure(case: Case, device: str, threads: int, clock: str) -> dict[str, Any]:
    """Median seconds, work, peak speed and fraction of it, GiB kept for the backward pass, and peak GiB of one case."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, training = case.prepared(device, replay=case.replay and not case.compile), case.mode == "train"
    image0, image1 = torch.rand(2, case.batch, 3, case.height, case.width, device=device) * 255
    step = _training_step(model, image0, image1) if training else _inference(model, image0, image1)
    now = _clock(clock, device)
    for _ in range(case.warm_up * (1 if device == "cpu" else WARM_UPS)):
        step()
    memory = _peak_memory(device) if case.warm_up else 0  # measured now, as a replayed pass allocates none
    seconds, peaks = [], [_peak(DTYPES[case.precision], device, now)]
    for _ in range(case.repetitions):
        start = now()
        step()
        seconds.append(now() - start)
        peaks.append(_peak(DTYPES[case.precision], device, now))
    gflop = case.batch * matrix_gflop(model.config, case.height, case.width, training)
    rates = [gflop / s / ((a + b) / 2) for s, a, b in zip(seconds, peaks[:-1], peaks[1:], strict=True)]
    return {
        "seconds": statistics.median(seconds),
        "gflop": gflop,
        "peak_gflops": statistics.median(peaks),
        "fraction": statistics.median(rates),
        "saved_gib": _saved_bytes(case.prepared(device, replay=False), image0, image1) / 2**30 if training else None,
        "peak_gib": (memory or _peak_memory(device)) / 2**30,
    }


def _inference(model: GMFlow, image0: Tensor, image1: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode():
            model(image0, image1)

    return step


def _training_step(model: GMFlow, image0: Tensor, image1: Tensor) -> Callable[[], None]:
    target = torch.zeros_like(image0[:, :2])
    valid = torch.ones_like(image0[:, 0], dtype=torch.bool)

    def step() -> None:
        model.zero_grad()
        loss = sequence_loss(model(image0, image1).predictions, target, valid)
        torch.autograd.backward(loss)

    return step


def _clock(name: str, device: str) -> Callable[[], float]:
    if name == "cpu":
        return time.process_time
    if device == "cpu":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def _peak(dtype: torch.dtype, device: str, now: Callable[[], float]) -> float:
    """The speed of the fastest of a few square matrix products, in GFLOP/s."""
    size = 2048 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(matrix)
    best = float("inf")
    for _ in range(4):
        start = now()
        torch.mm(matrix, matrix, out=out)
        best = min(best, now() - start)
    return 2 * size**3 / best / 1e9


def _saved_bytes(model: GMFlow, image0: Tensor, image1: Tensor) -> int:
    """Bytes of all storages that autograd keeps between forward and backward pass, except the parameters."""
    storages: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(image0, image1)  # kept alive, so that no address is used twice
    del out
    return sum(storages.values())


def _peak_memory(device: str) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)


def cases(quick: bool, compiled: bool, device: str) -> list[Case]:
    """The rows of the table."""
    if compiled:
        return [Case("refine", "inference", 128, 256, compile=on) for on in (False, True)]
    if quick:
        size = (128, 256)
        return [Case(v, m, *size, repetitions=1) for v in VARIANTS for m in ("inference", "train")]
    on_gpu = device.startswith("cuda")
    precisions = ("fp32", "tf32", "bf16")
    rows = [Case(v, "inference", 448, 1024, p) for v in VARIANTS for p in precisions]
    rows += [Case(v, "train", 384, 512, p) for v in VARIANTS for p in precisions]
    rows += [Case("refine", "train", 384, 512, checkpointing=c) for c in ("selective", "full")]
    if on_gpu:  # a single pair does not fill a GPU
        rows += [Case("refine", "inference", 448, 1024, p, batch=8) for p in precisions]
        rows += [Case("refine", "train", 384, 512, p, batch=8) for p in precisions]
        rows += [
            Case("refine", m, *s, "bf16", replay=False) for m, s in (("inference", (448, 1024)), ("train", (384, 512)))
        ]
    growth = [(1088, 1920), (1440, 2560), (2176, 3840)]
    # On a CPU each of these takes minutes: it runs once, without warm-up.
    return rows + [Case("refine", "inference", *size, repetitions=1, warm_up=on_gpu) for size in growth]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, one repetition")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside eager, on small images")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, on a machine that others use too"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a row instead of the table")
    arguments = parser.parse_args()
    arguments.device = str(arguments.device)  # the measuring processes take it as text
    if arguments.clock == "cpu" and arguments.device != "cpu":
        parser.error("--clock cpu is processor time, in which a GPU's work does not show; use wall")
    every = cases(arguments.quick, arguments.compile, arguments.device)
    chosen = [case for case in every if arguments.only in case.name]
    if not chosen:
        parser.error(f"no row's name holds {arguments.only!r}: {'; '.join(case.name for case in every)}")
    print(
        f"torch {torch.__version__}, {arguments.device}, {counted(arguments.threads, 'thread')}, {arguments.clock} time"
    )
    print(f"{'case':52} {'s':>8} {'GFLOP':>8} {'peak':>8} {'of peak':>8} {'saved':>9} {'memory':>9}")
    context = multiprocessing.get_context("spawn")
    for case in chosen:
        with context.Pool(1) as pool:
            row = pool.apply(measure, (case, arguments.device, arguments.threads, arguments.clock))
        if arguments.json:
            print(json.dumps(asdict(case) | row), flush=True)
            continue
        saved = "–" if row["saved_gib"] is None else f"{row['saved_gib']:.2f} GiB"
        print(
            f"{case.name:52} {row['seconds']:8.4g} {row['gflop']:8.0f} {row['peak_gflops']:8.0f} "
            f"{row['fraction']:8.0%} {saved:>9} {row['peak_gib']:5.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
