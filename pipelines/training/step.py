"""One step of the optimiser, on all ranks together: accumulate gradients, then apply the update or skip it."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets_etl.batches import FlowBatch
from gmflow.loss import sequence_loss
from gmflow.metrics import ErrorMetrics
from pipelines.errors import PipelineError
from pipelines.training.config import StageConfig
from pipelines.training.group import WorkerGroup
from pipelines.training.interval import StepTotals
from pipelines.training.state import TrainingState
from pipelines.training.worker_log import WorkerLog


class StepSums(NamedTuple):
    """Totals of one step over all ranks, the same on each rank.

    Attributes:
        loss: mean over the global batch.
        metrics: errors of the finest prediction.
        ask_for_notice: whether all ranks now ask for a preemption notice. It comes with the sums to save a collective.
        data_wait: how long (s) the longest-waiting rank waited for data.
    """

    loss: float
    metrics: ErrorMetrics
    ask_for_notice: bool
    data_wait: float


@dataclass
class TrainingStep:
    """The optimisation of a stage.

    Attributes:
        stage: has the recipe.
        state: what a step changes: weights, optimiser, schedule, counts of skipped steps.
        model: the model of `state` as it is run, perhaps wrapped by DDP.
        group: the ranks.
        log: gets a line for each skipped step, and knows what the worker is doing.
    """

    stage: StageConfig
    state: TrainingState
    model: nn.Module
    group: WorkerGroup
    log: WorkerLog

    def accumulate(self, batches: Iterator[FlowBatch]) -> StepSums:
        """Run forward and backward passes over the micro-batches; the last backward pass all-reduces the gradients."""
        self.model.train()
        self.state.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.group.device)
        metrics = ErrorMetrics()
        data_wait = 0.0
        asked = self.log.progress("waiting for data")
        batch = next(batches, None)
        while batch is not None:
            current = FlowBatch(*(tensor.to(self.group.device, non_blocking=True) for tensor in batch))
            following = next(batches, None)  # before the pass, which must know whether it is the last
            data_wait += self.log.progress("computing, or waiting for another worker") - asked
            with self._gradient_sync(last=following is None):
                loss, flow = self._forward_backward(current)
            loss_sum += loss / self.group.world_size
            metrics.update(flow, current.flow, current.valid)
            asked = self.log.progress("waiting for data")
            batch = following
        return self._sum_over_ranks(loss_sum, metrics, data_wait)

    def _forward_backward(self, batch: FlowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss [] and the finest flow [B, 2, H, W], both detached."""
        predictions = self.model(batch.image0.float(), batch.image1.float()).predictions  # each [B, 2, H, W]
        loss = sequence_loss(
            predictions,
            batch.flow,
            batch.valid,
            gamma=self.stage.gamma,
            max_flow=self.stage.max_flow,
            # DDP averages over ranks; with this divisor that average is the mean over the global batch.
            normalizer=self.stage.global_batch / self.group.world_size,
        )
        self.state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), predictions[-1].detach()

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Lets DDP all-reduce the gradients in the last backward pass of a step only."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _sum_over_ranks(self, loss_sum: torch.Tensor, metrics: ErrorMetrics, data_wait: float) -> StepSums:
        """All-reduce the sums of this rank, in one collective."""
        self.log.progress("waiting for the other workers")
        ask = loss_sum.new_tensor([float(self.group.notice_check_due())])
        waits = loss_sum.new_zeros(self.group.world_size)  # one place for each rank: their sum holds all of them
        waits[self.group.rank] = data_wait
        own = torch.cat([loss_sum[None], ask, metrics.state().to(self.group.device), waits])
        sums = self.group.all_reduce(own).cpu()
        loss, asking = sums[:2]
        errors, waits = sums[2:].tensor_split([-self.group.world_size])
        return StepSums(float(loss), ErrorMetrics.from_state(errors), bool(asking), float(waits.max()))

    def update(self, sums: StepSums) -> StepTotals:
        """Clip and step, unless loss or gradient norm is not finite. All ranks have the same values, so they agree.

        Raises PipelineError after `max_skipped_in_a_row` skipped steps.
        """
        state = self.state
        state.scaler.unscale_(state.optimizer)
        norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), self.stage.clip_norm))
        applied = math.isfinite(sums.loss) and math.isfinite(norm)
        if applied:
            state.scaler.step(state.optimizer)
            if state.average is not None:
                state.average.update_parameters(state.model)
            state.skipped_in_a_row = 0
        else:
            self._skip(sums.loss, norm)
        state.scaler.update()
        state.schedule.step()
        return StepTotals(sums.loss, sums.metrics, norm, applied, sums.data_wait)

    def _skip(self, loss: float, norm: float) -> None:
        state, stage = self.state, self.stage
        state.skipped += 1
        # With fp16, the scaler finds its scale by trying values that prove too large: such skips do not count.
        searching = state.scaler.is_enabled() and math.isfinite(loss) and state.scaler.get_scale() > 1
        state.skipped_in_a_row += not searching
        self.log.say(f"skipped: loss {loss}, gradient norm {norm}")
        if state.skipped_in_a_row >= stage.max_skipped_in_a_row:
            raise PipelineError(
                f"stage {stage.name}: {state.skipped_in_a_row} steps in a row with a non-finite loss or gradient, "
                f"the last at step {state.step}; lower peak_lr or look at the data"
            )
