"""Metrics of a model on stored samples; a stage's validation and `evaluate.py` both use this code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from datasets_etl.ahead import read_ahead
from datasets_etl.batches import to_tensors
from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.samples import FlowSample
from gmflow import GMFlow
from gmflow.geometry import forward_backward_occlusion
from gmflow.loss import valid_pixels
from gmflow.metrics import FlowMetrics
from gmflow.predict import PaddingMode, evaluating, padded_forward

if TYPE_CHECKING:  # it needs Ray, which takes as long to load as all the rest
    from pipelines.training.group import WorkerGroup


@dataclass(frozen=True)
class Scored:
    """One sample with its prediction and its own metrics.

    Attributes:
        sample: the sample as stored.
        flow: float32 [2, H, W].
        occluded: bool [H, W], where the flows in both directions disagree; None unless both were computed.
        metrics: metrics of this sample alone.
        seconds: how long the prediction took.
    """

    sample: FlowSample
    flow: torch.Tensor
    occluded: torch.Tensor | None
    metrics: FlowMetrics
    seconds: float


def score(
    model: GMFlow | None, samples: Iterable[FlowSample], device: torch.device, *, bidirectional: bool = False
) -> Iterator[Scored]:
    """Predict and measure samples one by one; without a model the prediction is zero flow.

    Where flow is sparse (KITTI, HD1K), frames are padded as KITTI's, else as Sintel's. For FlyingThings3D, pixels whose
    true flow is 400 px or longer do not count, as in the published figures. With `bidirectional` both flows are
    computed, and `occluded` marks where they disagree; the metrics are those of the forward flow.
    """
    for sample in samples:
        batch = to_tensors(sample)
        began = time.perf_counter()
        flow, hidden = torch.zeros_like(batch.flow)[None], None
        if model is not None:
            image0, image1 = (image[None].to(device).float() for image in (batch.image0, batch.image1))  # [1, 3, H, W]
            padding: PaddingMode = "kitti" if sample.sparse else "sintel"
            with torch.inference_mode():
                out = padded_forward(model, image0, image1, padding=padding, bidirectional=bidirectional)
                flow = out.flow.float().cpu()
                if out.backward_flow is not None:
                    hidden = forward_backward_occlusion(flow, out.backward_flow.float().cpu())[0][0]
        seconds = time.perf_counter() - began
        metrics = FlowMetrics()
        occluded = None if sample.occluded is None else torch.from_numpy(sample.occluded)[None]
        target, valid = batch.flow[None], batch.valid[None]  # [1, 2, H, W], [1, H, W]
        if sample.dataset == "things":
            valid = valid_pixels(target, valid)  # as the published figures on FlyingThings3D
        metrics.update(flow, target, valid, occluded)
        yield Scored(sample, flow[0], hidden, metrics, seconds)


def validate(
    model: GMFlow,
    evaluation: EvaluationSet,
    group: WorkerGroup,
    on_scored: Callable[[int], None],
    interrupted: Callable[[], bool],
) -> tuple[dict[str, float], Scored | None] | None:
    """Pooled metrics over all ranks, the same on each, and this rank's first sample for a picture.

    Every rank of the group must call it; each takes every world_size-th sample. `on_scored` is called after each sample
    with an estimate of the number of samples that all ranks together have done. Then all ranks call `interrupted`,
    which must give the same answer on each; if it is true, validation ends and the result is None.
    """
    pooled = FlowMetrics()
    first = None
    samples = read_ahead(evaluation[number] for number in range(group.rank, len(evaluation), group.world_size))
    with evaluating(model):
        for together in range(0, len(evaluation), group.world_size):
            if (number := together + group.rank) < len(evaluation):
                (scored,) = score(model, [next(samples)], group.device)
                pooled.merge(scored.metrics)
                first = first or scored
                on_scored(number + 1)
            if interrupted():
                return None
    sums = group.all_reduce(pooled.state().to(group.device))
    return FlowMetrics.from_state(sums.cpu()).compute(), first
