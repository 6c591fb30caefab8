"""Metrics of a model on stored samples: the same code in a stage's validation and in `evaluate.py`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from datasets_etl.loader import EvaluationSet, to_tensors
from datasets_etl.samples import FlowSample
from gmflow import GMFlow
from gmflow.metrics import FlowMetrics
from gmflow.predict import evaluating, padded_flow


@dataclass(frozen=True)
class Scored:
    """One sample with its prediction (float32 [2, H, W]) and its own metrics."""

    sample: FlowSample
    flow: torch.Tensor
    metrics: FlowMetrics


def score(model: GMFlow | None, samples: Iterable[FlowSample], device: torch.device) -> Iterator[Scored]:
    """Predict and measure samples one by one; without a model the prediction is zero flow.

    KITTI and HD1K are padded as KITTI is, the others as Sintel is.
    """
    for sample in samples:
        batch = to_tensors(sample)
        if model is None:
            flow = torch.zeros_like(batch.flow)[None]
        else:
            image0, image1 = (image[None].to(device).float() for image in (batch.image0, batch.image1))  # [1, 3, H, W]
            with torch.inference_mode():
                flow = padded_flow(model, image0, image1, padding="kitti" if sample.sparse else "sintel").float().cpu()
        metrics = FlowMetrics()
        occluded = None if sample.occluded is None else torch.from_numpy(sample.occluded)[None]
        metrics.update(flow, batch.flow[None], batch.valid[None], occluded)
        yield Scored(sample, flow[0], metrics)


def validate(
    model: GMFlow,
    evaluation: EvaluationSet,
    device: torch.device,
    rank: int,
    world_size: int,
    on_scored: Callable[[int], None],
) -> tuple[dict[str, float], Scored | None]:
    """Pooled metrics over all ranks, the same on each, and this rank's first sample for a picture.

    Every rank of the group must call it; each takes every world_size-th sample. `on_scored` is called after each with
    the number of samples done by all ranks together, as far as this one can tell.
    """
    pooled = FlowMetrics()
    first = None
    with evaluating(model):
        numbers = range(rank, len(evaluation), world_size)
        for number, scored in zip(numbers, score(model, (evaluation[i] for i in numbers), device), strict=True):
            pooled.merge(scored.metrics)
            first = first or scored
            on_scored(number + 1)
    sums = pooled.state().to(device)
    if world_size > 1:
        dist.all_reduce(sums)
    return FlowMetrics.from_state(sums.cpu()).compute(), first
