"""A checkpoint brings back everything, to the bit, or says why not."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from gmflow.execution import Precision
from gmflow.metrics import ErrorMetrics
from pipelines.errors import PipelineError
from pipelines.training.config import StageConfig
from pipelines.training.interval import Interval, StepTotals
from pipelines.training.state import TrainingState, from_bytes, is_complete, result_weights, to_bytes

STAGE = StageConfig(
    name="s", steps=20, global_batch=2, peak_lr=1e-2, crop=(16, 16), mixture=[{"data": "d", "subset": "train"}]
)


def fresh(width: int = 3, precision: Precision = "fp32", **recipe: float) -> TrainingState:
    model = nn.Linear(width, 2)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 7 + number)
    return TrainingState.fresh(model, STAGE.model_copy(update=recipe), precision)


def train(state: TrainingState, until: int) -> list[float]:
    losses = []
    while state.step < until:
        inputs = torch.sin(torch.arange(6.0) + state.step).reshape(2, 3)
        loss = state.model(inputs).square().mean()
        state.optimizer.zero_grad()
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update_parameters(state.model)
        state.schedule.step()
        state.step += 1
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("recipe", [{}, {"ema_decay": 0.8}], ids=["newest", "averaged"])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(precision: Precision, recipe: dict[str, float]):
    undisturbed = fresh(precision=precision, **recipe)
    expected = train(undisturbed, 20)
    first = fresh(precision=precision, **recipe)
    losses = train(first, 9)
    first.record(9, {"loss": 1.0})
    first.interval.add(StepTotals(2.0, ErrorMetrics(), 3.0, True, 0.0))
    snapshot = first.snapshot()
    train(first, 12)  # what comes after a snapshot is not in it
    second = fresh(precision=precision, **recipe)
    second.restore(from_bytes(to_bytes(snapshot)))
    assert (second.step, second.records) == (9, [(9, {"loss": 1.0})])
    assert (second.interval.steps, second.interval.loss, second.interval.grad_norm) == (1, 2.0, 3.0)
    assert losses + train(second, 20) == expected
    for name, value in result_weights(undisturbed.snapshot()).items():
        assert torch.equal(result_weights(second.snapshot())[name], value)
    assert second.scaler.state_dict() == undisturbed.scaler.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_of_an_optimiser_that_was_not_fused_goes_on(precision: Precision):
    expected = train(fresh(precision=precision), 20)
    before = fresh(precision=precision)
    train(before, 9)
    saved = before.snapshot()
    saved["optimizer"]["param_groups"] = [group | {"fused": None} for group in saved["optimizer"]["param_groups"]]
    resumed = fresh(precision=precision)
    resumed.restore(saved)
    assert [group["fused"] for group in resumed.optimizer.param_groups] == [True]
    assert train(resumed, 20) == expected[9:]


def test_averaged_weights_are_the_exponential_mean_of_the_newest():
    state = fresh(ema_decay=0.8)
    expected = None
    for step in range(1, 6):
        train(state, step)
        weight = state.model.weight.detach().clone()
        expected = weight if expected is None else 0.8 * expected + 0.2 * weight
    torch.testing.assert_close(state.result.weight, expected)
    torch.testing.assert_close(result_weights(state.snapshot())["weight"], expected)
    assert not torch.equal(state.result.weight, state.model.weight)


def rates(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("steps", [20, 90, 1000])
def test_the_schedule_is_pytorchs_one_cycle_over_steps_and_ten(steps: int):
    model = nn.Linear(3, 2)
    state = TrainingState.fresh(model, STAGE.model_copy(update={"steps": steps}))
    optimizer = torch.optim.AdamW(model.parameters())
    theirs = OneCycleLR(optimizer, STAGE.peak_lr, total_steps=steps + 10, pct_start=0.05, cycle_momentum=False)
    assert rates(state.optimizer, state.schedule, steps) == pytest.approx(rates(optimizer, theirs, steps), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_a_stage_of_few_steps_has_a_schedule_too(steps: int):
    state = TrainingState.fresh(nn.Linear(3, 2), STAGE.model_copy(update={"steps": steps}))
    found = rates(state.optimizer, state.schedule, steps)
    assert all(0 < rate <= STAGE.peak_lr for rate in found)


def test_a_checkpoint_of_another_architecture_is_refused():
    with pytest.raises(PipelineError, match="another architecture"):
        fresh(width=3).restore(fresh(width=4).snapshot())


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "touched").touch, ())

    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        from_bytes(to_bytes({"model": Evil()}))
    assert not (tmp_path / "touched").exists()


def test_a_skipped_step_counts_for_the_time_only():
    """Its loss is not finite: one would be all that is seen of an interval."""
    interval = Interval()
    for loss, applied in ((2.0, True), (math.nan, False), (4.0, True)):
        interval.add(StepTotals(loss, ErrorMetrics(), loss, applied, 0.0))
    metrics = interval.metrics(4)
    assert (metrics["train/loss"], metrics["train/grad_norm"]) == (3.0, 3.0)
    none = interval.following()
    none.add(StepTotals(math.inf, ErrorMetrics(), math.inf, False, 0.0))
    assert {name.partition("/")[0] for name in none.metrics(4)} == {"time"}


def test_only_steps_whose_beginning_is_known_are_timed(monkeypatch: pytest.MonkeyPatch):
    """Not an attempt's first, which loaders start in; not what a validation takes before a step."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    step = StepTotals(1.0, ErrorMetrics(), 1.0, True, 0.5)
    interval = Interval.from_state_dict(Interval().state_dict())
    interval.restart_clock()  # of a validation that an earlier attempt owed
    interval.add(step)
    assert not any(name.startswith("time/") for name in interval.metrics(4))
    now += 2.0
    interval.add(step)
    times = {"time/step_s": 2.0, "time/samples_per_s": 2.0, "time/data_wait": 0.25}
    assert interval.metrics(4).items() >= times.items()
    interval = interval.following()
    now += 30.0
    interval.restart_clock()
    now += 1.0
    interval.add(step)
    assert interval.metrics(4)["time/step_s"] == 1.0


def errors(pixels: int, error: float) -> ErrorMetrics:
    found = ErrorMetrics()
    target = torch.zeros(1, 2, 1, pixels)
    found.update(target + torch.tensor([error, 0.0]).reshape(1, 2, 1, 1), target, torch.ones(1, 1, pixels).bool())
    return found


def test_a_record_tells_which_percentage_of_the_pixels_is_over_1_3_and_5_px_off():
    interval = Interval()
    for error in (0.5, 2.0, 4.0, 6.0):
        interval.add(StepTotals(1.0, errors(1, error), 1.0, True, 0.0))
    expected = {"train/epe": 3.125, "train/px1": 75.0, "train/px3": 50.0, "train/px5": 25.0}
    assert interval.metrics(4).items() >= expected.items()


def test_skipped_steps_and_errors_since_the_last_record_are_resumed_too():
    first, second = fresh(), fresh()
    first.skipped, first.skipped_in_a_row, first.validated = 5, 2, 4
    first.interval.add(StepTotals(2.0, errors(3, 1.0), 3.0, True, 0.0))
    second.restore(from_bytes(to_bytes(first.snapshot())))
    assert (second.skipped, second.skipped_in_a_row, second.validated) == (5, 2, 4)
    second.interval.add(StepTotals(4.0, errors(1, 5.0), 7.0, True, 0.0))
    means = {"train/loss": 3.0, "train/grad_norm": 5.0, "train/epe": 2.0}
    assert second.interval.metrics(4).items() >= means.items()


def test_a_stage_is_complete_once_its_last_step_is_validated():
    """Killed in between it would be registered without the figures that gates and the champion depend on."""
    for step, validated in ((40, 40), (40, 0), (39, 39)):
        assert is_complete({"step": step, "validated": validated}, 40) == (validated == 40)


def test_as_many_records_as_a_driver_may_lose_are_kept():
    state = fresh()
    for step in range(1, 202):
        state.record(step, {"train/loss": float(step)})
    assert [step for step, _ in state.records] == list(range(2, 202))
