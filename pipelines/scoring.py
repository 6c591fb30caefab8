"""Score a model on whole sets, in this process or by Ray tasks, with the same figures.

The sums of every pair are kept and added up in the set's order, whatever process computed them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import ray
import torch

from datasets_etl.ahead import read_ahead
from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.manifest import Manifest
from datasets_etl.reading import read_sample
from datasets_etl.samples import FlowSample
from gmflow import GMFlow
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from gmflow.metrics import FlowMetrics
from gmflow.weights import decode_weights, encode_weights
from pipelines.behind import Behind
from pipelines.gallery import Card, Gallery
from pipelines.task_results import fetched
from pipelines.training.memory import explaining_out_of_memory, peak_bytes
from pipelines.training.pictures import comparison_png
from pipelines.training.validation import Scored, score

_TASK_PAIRS = 16
"""Pairs per Ray task: enough to be worth loading a model, and few enough that tasks share a set evenly."""

OnScored = Callable[[str, bytes | None], None]
"""Called for every pair, in no fixed order and perhaps by threads, with its key and, if asked for, its picture."""


@dataclass(frozen=True)
class PairScore:
    """One pair's key and scene, its `FlowMetrics.state`, and how long its prediction took."""

    key: str
    scene: str
    state: tuple[float, ...]
    seconds: float

    @property
    def metrics(self) -> FlowMetrics:
        return FlowMetrics.from_state(torch.tensor(self.state, dtype=torch.float64))


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a set, see `FlowMetrics.compute`.

    Attributes:
        sums: sums over every valid pixel of the set.
        pooled: figures from these sums.
        scenes: pooled figures of every scene of the set.
        images: figures of every pair by its key.
        cards: pairs to look at, largest error first.
        seconds: median time of a prediction, without the first pair of this process or of a Ray task, if it has others.
        peak_bytes: memory of the process that used most: of its tensors on a GPU, otherwise resident memory.
        device: the device that computed the predictions.
    """

    sums: FlowMetrics
    pooled: dict[str, float]
    scenes: dict[str, dict[str, float]]
    images: dict[str, dict[str, float]]
    cards: list[Card]
    seconds: float
    peak_bytes: int
    device: str


@dataclass(frozen=True)
class ScoringOptions:
    """What to keep beside the figures.

    Attributes:
        name: name of the set on its cards.
        gallery: how many cards to keep.
        pictures: hand a comparison picture of every pair to `on_scored`.
        bidirectional: compute both flows, for the occlusion on the cards.
        precision: precision of Ray tasks, which prepare the model themselves.
        remedy: what the person who gave the command can do where a GPU's memory does not suffice.
    """

    name: str = ""
    gallery: int = 0
    pictures: bool = False
    bidirectional: bool = False
    precision: Precision = "fp32"
    remedy: str = "the CPU"


@dataclass
class _Part:
    """Scores of some samples of a set."""

    gallery: Gallery
    pairs: dict[int, PairScore] = field(default_factory=dict)
    pictures: dict[str, bytes | None] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    device: str = ""


def evaluate(
    model: GMFlow | None,
    evaluation_set: EvaluationSet,
    device: torch.device,
    options: ScoringOptions = ScoringOptions(),
    on_scored: OnScored = lambda key, picture: None,
) -> Evaluation:
    """Score every sample of a set, one at a time, in this process; without a model, zero flow is scored.

    Meanwhile, threads read the next sample, and draw and hand over the pictures of the last ones.
    """
    part = _Part(Gallery.of(options.name, len(evaluation_set), options.gallery))
    samples = (evaluation_set[number] for number in range(len(evaluation_set)))
    _score(part, model, samples, range(len(evaluation_set)), device, options, on_scored)
    return _evaluation(part)


def evaluate_on_ray(
    model: GMFlow,
    evaluation_set: EvaluationSet,
    options: ScoringOptions,
    *,
    use_gpu: bool,
    on_scored: OnScored = lambda key, picture: None,
) -> Evaluation:
    """`evaluate` by Ray tasks of up to `_TASK_PAIRS` pairs, each with one CPU and, with `use_gpu`, one GPU.

    The figures are those of `evaluate`. They are equal to the bit if that computes with one thread, as tasks do. Needs
    a connected Ray.

    Raises:
        DataError: a sample is damaged, or storage is down.
    """
    weights = ray.put(encode_weights(model))
    manifest = ray.put(evaluation_set.manifest)
    total = Gallery.of(options.name, len(evaluation_set), options.gallery)
    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(_score_part)
    waiting = {
        task.remote(weights, manifest, evaluation_set.indices[numbers], numbers, total, options, use_gpu)
        for numbers in _tasks(len(evaluation_set))
    }
    whole = _Part(total)
    while waiting:
        (finished,), _ = ray.wait(list(waiting), num_returns=1)
        waiting.remove(finished)
        part: _Part = fetched(finished)
        for number, pair in part.pairs.items():
            whole.pairs[number] = pair
            on_scored(pair.key, part.pictures.get(pair.key))
        whole.gallery.join(part.gallery)
        whole.seconds += part.seconds
        whole.peak_bytes, whole.device = max(whole.peak_bytes, part.peak_bytes), part.device
    return _evaluation(whole)


def _tasks(pairs: int) -> Iterator[list[int]]:
    """The numbers of the samples that each task scores."""
    for first in range(0, pairs, _TASK_PAIRS):
        yield list(range(first, min(first + _TASK_PAIRS, pairs)))


def _score_part(
    weights: bytes,
    manifest: Manifest,
    indices: npt.NDArray[np.int64],
    numbers: list[int],
    gallery: Gallery,
    options: ScoringOptions,
    use_gpu: bool,
) -> _Part:
    """A Ray task: score the samples with these `indices` in the manifest and these `numbers` in the set."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if use_gpu else "cpu")
    model = _model_of(weights, options.precision, device)
    part = _Part(gallery)
    samples = (read_sample(manifest, int(index)) for index in indices)
    _score(part, model, samples, numbers, device, options, part.pictures.__setitem__)
    return part


@functools.lru_cache(maxsize=1)
def _model_of(weights: bytes, precision: Precision, device: torch.device) -> GMFlow:
    model = decode_weights(weights)
    prepare_model(model, ExecutionConfig(precision, replay=True), device)
    return model


def _score(
    part: _Part,
    model: GMFlow | None,
    samples: Iterator[FlowSample],
    numbers: Sequence[int],
    device: torch.device,
    options: ScoringOptions,
    on_scored: OnScored,
) -> None:
    """Fill a part with the scores of samples, which have these `numbers` in the set."""

    def hand_over(scored: Scored) -> None:
        on_scored(scored.sample.key, comparison_png(scored) if options.pictures else None)

    found = score(model, read_ahead(samples), device, bidirectional=options.bidirectional)
    lack = explaining_out_of_memory(f"set {options.name}", options.remedy)
    with lack, Behind() as behind:
        for number, scored in zip(numbers, found, strict=True):
            sample, state = scored.sample, tuple(scored.metrics.state().tolist())
            part.pairs[number] = PairScore(sample.key, sample.scene, state, scored.seconds)
            part.gallery.offer(number, scored)
            behind.do(hand_over, scored)
    _finish(part, device)


def _finish(part: _Part, device: torch.device) -> None:
    """Record time and memory. The first pair's time includes one-time work, so it is left out if there are others."""
    seconds = [pair.seconds for pair in part.pairs.values()]
    part.seconds = seconds[1:] or seconds
    part.peak_bytes = peak_bytes(device)
    on_gpu = device.type == "cuda"
    part.device = torch.cuda.get_device_name(device) if on_gpu else f"CPU, threads: {torch.get_num_threads()}"


def _evaluation(part: _Part) -> Evaluation:
    pairs = [part.pairs[number] for number in sorted(part.pairs)]
    scenes: dict[str, list[PairScore]] = {}
    for pair in pairs:
        scenes.setdefault(pair.scene, []).append(pair)
    sums = _pooled(pairs)
    return Evaluation(
        sums=sums,
        pooled=sums.compute(),
        scenes={scene: _pooled(those).compute() for scene, those in sorted(scenes.items())},
        images={pair.key: pair.metrics.compute() for pair in pairs},
        cards=part.gallery.cards(),
        seconds=float(np.median(part.seconds)),
        peak_bytes=part.peak_bytes,
        device=part.device,
    )


def _pooled(pairs: list[PairScore]) -> FlowMetrics:
    """Add the pairs up in order, so that the sums are equal to the bit, whatever process computed the parts."""
    pooled = FlowMetrics()
    for pair in pairs:
        pooled.merge(pair.metrics)
    return pooled


def pool(evaluations: Iterable[Evaluation]) -> dict[str, float]:
    """Metrics over every valid pixel of several sets."""
    pooled = FlowMetrics()
    for evaluation in evaluations:
        pooled.merge(evaluation.sums)
    return pooled.compute()
