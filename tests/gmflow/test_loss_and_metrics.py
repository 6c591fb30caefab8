"""The loss that is trained on and the figures that are reported."""

from __future__ import annotations

import math

import pytest
import torch

from gmflow import GMFlowError
from gmflow.loss import sequence_loss
from gmflow.metrics import ErrorMetrics, FlowMetrics


def fields(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    flow = torch.randn(batch, 2, 6, 8, generator=generator) * 20
    target = flow + torch.randn(flow.shape, generator=generator) * 3
    return flow, target, torch.rand(batch, 6, 8, generator=generator) > 0.2


def test_loss_weighs_later_predictions_more() -> None:
    zero, valid = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    loss = sequence_loss([zero + 1, zero + 2], zero, valid, gamma=0.5)
    assert loss.item() == pytest.approx(0.5 * 1 + 2)


def test_loss_is_a_mean_over_all_entries_not_over_the_valid_ones() -> None:
    zero = torch.zeros(1, 2, 2, 2)
    valid = torch.tensor([[[True, False], [False, False]]])
    assert sequence_loss([zero + 4], zero, valid).item() == pytest.approx(1)


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf, 1e10, 1000.0, 399.99])
def test_unknown_ground_truth_neither_counts_nor_poisons(unknown: float) -> None:
    target = torch.zeros(1, 2, 2, 2)
    target[0, :, 0, 0] = unknown
    prediction = torch.ones(1, 2, 2, 2, requires_grad=True)
    loss = sequence_loss([prediction], target, torch.ones(1, 2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(0.75)
    assert prediction.grad is not None
    assert prediction.grad[0, :, 0, 0].tolist() == [0, 0]
    assert prediction.grad.isfinite().all()


def test_max_flow_bounds_the_speed_not_the_components() -> None:
    zero, valid = torch.zeros(1, 2, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
    assert sequence_loss([zero], zero + 6, valid, max_flow=8.4).item() == 0
    assert sequence_loss([zero], zero + 6, valid, max_flow=8.6).item() == pytest.approx(6)
    level = torch.tensor([[3.0, 4.0]])[..., None, None]
    assert sequence_loss([zero], level, valid, max_flow=5.0).item() == 0, "5 px are not below 5 px"
    assert sequence_loss([zero], level, valid, max_flow=5.001).item() == pytest.approx(3.5)
    dense = torch.tensor([[1000.0, 0.0]])[..., None, None]
    for unknown in (dense, -dense):
        assert sequence_loss([zero], unknown, valid, max_flow=2000.0).item() == 0, "which marks an unknown pixel"


def test_what_is_not_said_of_a_loss_is_as_published() -> None:
    """A prediction weighs 0.9 of the next, and speeds of 400 px and more do not count."""
    zero, valid = torch.zeros(1, 2, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
    assert sequence_loss([zero + 1, zero + 1, zero], zero, valid).item() == pytest.approx(0.9**2 + 0.9)
    for speed, loss in ((399.0, 199.5), (400.0, 0.0)):
        level = torch.tensor([[speed, 0.0]])[..., None, None]
        assert sequence_loss([zero], level, valid).item() == pytest.approx(loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_loss_is_in_float32_whatever_the_type_of_the_truth(dtype: torch.dtype) -> None:
    """Also of speeds beyond 255 px, whose squares 16 bits do not hold."""
    target, valid = torch.full((1, 2, 1, 2), 200.0), torch.ones(1, 1, 2, dtype=torch.bool)
    prediction = target + torch.tensor([0.5, 60000.0])
    loss = sequence_loss([prediction], target.to(dtype), valid)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sequence_loss([prediction], target, valid))
    assert loss.item() == pytest.approx(30000.25)


def test_parts_of_a_global_batch_add_up() -> None:
    flow, target, valid = fields()
    whole = sequence_loss([flow], target, valid)
    parts = [sequence_loss([flow[i : i + 1]], target[i : i + 1], valid[i : i + 1], normalizer=3) for i in range(3)]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(
    ("prediction", "flow", "valid"),
    [
        ((1, 2, 4, 6), (3, 2, 4, 6), (3, 4, 6)),
        ((3, 1, 4, 6), (3, 2, 4, 6), (3, 4, 6)),
        ((3, 2, 4, 6), (3, 2, 1, 6), (3, 4, 6)),
        ((3, 2, 4, 6), (3, 2, 4, 6), (3, 1, 6)),
        ((3, 2, 4, 6), (3, 2, 4, 6), (4, 6)),
        ((2, 2, 4, 6), (2, 2, 4, 6), (1, 4, 6)),
        ((3, 3, 4, 6), (3, 3, 4, 6), (3, 4, 6)),
        ((2, 4, 6), (2, 4, 6), (4, 6)),
    ],
)
def test_a_loss_of_shapes_that_do_not_fit_is_refused(
    prediction: tuple[int, ...], flow: tuple[int, ...], valid: tuple[int, ...]
) -> None:
    """Many of them would be broadcast, to a loss of something else."""
    fitting = torch.zeros(flow)
    with pytest.raises(GMFlowError, match=r"a loss needs predictions and flow \[B, 2, H, W\]"):
        sequence_loss([fitting, torch.zeros(prediction)], fitting, torch.ones(valid, dtype=torch.bool))


def test_a_loss_of_no_prediction_is_refused() -> None:
    """It would be 0, without gradients."""
    with pytest.raises(GMFlowError, match="a loss needs predictions"):
        sequence_loss([], torch.zeros(3, 2, 4, 6), torch.ones(3, 4, 6, dtype=torch.bool))


def test_metrics_are_pooled_over_pixels() -> None:
    flow, target, valid = fields()
    metrics = FlowMetrics()
    metrics.update(flow, target, valid)
    figures = metrics.compute()
    error, speed = (flow - target).norm(dim=1)[valid], target.norm(dim=1)[valid]
    assert figures["epe"] == pytest.approx(error.mean().item(), rel=1e-6)
    for pixels in (1, 3, 5):
        assert figures[f"px{pixels}"] == pytest.approx(100 * (error > pixels).float().mean().item())
    outlier = (error > 3) & (error > 0.05 * speed)
    assert figures["f1_all"] == pytest.approx(100 * outlier.float().mean().item())
    for name, where in (
        ("s0_10", speed < 10),
        ("s10_40", (speed >= 10) & (speed <= 40)),
        ("s40_plus", speed > 40),
    ):
        assert figures[name] == pytest.approx(error[where].mean().item(), rel=1e-6)
    per_image = [(flow - target).norm(dim=1)[i][valid[i]].mean().item() for i in range(3)]
    assert figures["epe_per_image"] == pytest.approx(sum(per_image) / 3, rel=1e-6)
    assert "matched" not in figures


def test_what_training_tracks_is_a_part_of_all_figures() -> None:
    flow, target, valid = fields()
    target[0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 1e30])
    few, every = ErrorMetrics(), FlowMetrics()
    for metrics in (few, every):
        metrics.update(flow, target, valid)
        metrics.update(flow, -target, valid)
    assert set(few.compute()) == {"epe", "px1", "px3", "px5"}
    assert few.compute().items() <= every.compute().items()
    with pytest.raises(GMFlowError, match="state"):
        ErrorMetrics.from_state(every.state())


def test_states_of_ranks_add_up() -> None:
    flow, target, valid = fields()
    whole, merged = FlowMetrics(), FlowMetrics()
    whole.update(flow, target, valid, valid)
    parts = []
    for i in range(3):
        part = FlowMetrics()
        part.update(flow[i : i + 1], target[i : i + 1], valid[i : i + 1], valid[i : i + 1])
        parts.append(part.state())
        merged.merge(part)
    total = FlowMetrics.from_state(torch.stack(parts).sum(dim=0)).compute()
    assert total == pytest.approx(whole.compute(), nan_ok=True)
    assert merged.compute() == pytest.approx(whole.compute(), nan_ok=True)


def test_pixels_that_leave_the_image_are_unmatched() -> None:
    target = torch.zeros(1, 2, 1, 4)
    target[0, 0, 0] = torch.tensor([-0.5, 0.0, 1.0, 0.5])  # the first and the last leave
    flow = target + torch.tensor([1.0, 0.0]).view(1, 2, 1, 1) * torch.tensor([1.0, 2.0, 3.0, 5.0])
    occluded = torch.tensor([[[False, False, True, False]]])
    metrics = FlowMetrics()
    metrics.update(flow, target, torch.ones(1, 1, 4, dtype=torch.bool), occluded)
    figures = metrics.compute()
    assert figures["matched"] == pytest.approx(2)
    assert figures["unmatched"] == pytest.approx(3)


def test_pixels_that_leave_the_image_above_and_below_are_unmatched() -> None:
    target = torch.zeros(1, 2, 4, 1)
    target[0, 1, :, 0] = torch.tensor([-0.5, -1.0, 1.0, 0.5])  # the first and the last leave
    flow = target + torch.tensor([0.0, 1.0]).view(1, 2, 1, 1) * torch.tensor([1.0, 2.0, 3.0, 5.0]).view(4, 1)
    metrics = FlowMetrics()
    everywhere = torch.ones(1, 4, 1, dtype=torch.bool)
    metrics.update(flow, target, everywhere, ~everywhere)
    figures = metrics.compute()
    assert (figures["matched"], figures["unmatched"]) == (pytest.approx(2.5), pytest.approx(3))


@pytest.mark.parametrize("kind", [ErrorMetrics, FlowMetrics])
def test_batches_add_up(kind: type[ErrorMetrics]) -> None:
    flow, target, valid = fields()
    whole, by_batches = kind(), kind()
    whole.update(flow, target, valid)
    for batch in (slice(0, 1), slice(1, 3)):
        by_batches.update(flow[batch], target[batch], valid[batch])
    assert by_batches.compute() == pytest.approx(whole.compute())


def test_nan_outside_the_valid_pixels_does_not_poison_metrics() -> None:
    flow, target, valid = fields()
    clean = FlowMetrics()
    clean.update(flow, target, valid)
    target = torch.where(valid.unsqueeze(1), target, torch.nan)
    dirty = FlowMetrics()
    dirty.update(flow, target, valid)
    assert dirty.compute() == pytest.approx(clean.compute(), nan_ok=True)


def test_flow_that_is_no_number_is_an_outlier_not_perfect() -> None:
    metrics = FlowMetrics()
    flow = torch.full((1, 2, 2, 2), float("nan"))
    metrics.update(flow, torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))
    figures = metrics.compute()
    assert [figures[name] for name in ("px1", "px3", "px5", "f1_all")] == [100.0] * 4
    assert math.isnan(figures["epe"])


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_lost_pixel_spoils_only_the_figures_it_belongs_to(lost: float) -> None:
    """It is one of the slow and matched pixels of the second image: no part of the other means."""
    flow, target, valid = fields()
    target[1, :, 2, 3], valid[1, 2, 3] = 1, True
    occluded = torch.rand(valid.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    occluded[1, 2, 3] = False
    valid[0, 0, 0] = False
    figures = []
    for wrong in (1e6, lost):
        flow[1, 0, 2, 3] = flow[0, 0, 0, 0] = wrong  # the latter has no ground truth and belongs to no figure
        metrics = FlowMetrics()
        metrics.update(flow, target, valid, occluded)
        figures.append(metrics.compute())
    wanted, found = figures
    spoiled = {"epe", "s0_10", "matched", "epe_per_image"}
    assert {name for name, figure in found.items() if not math.isfinite(figure)} == spoiled
    assert {name: found[name] for name in found.keys() - spoiled} == pytest.approx(
        {name: wanted[name] for name in wanted.keys() - spoiled}, rel=1e-12
    )


def test_a_figure_without_pixels_is_nan() -> None:
    assert all(math.isnan(figure) for figure in FlowMetrics().compute().values())


@pytest.mark.parametrize(
    ("flow", "target", "valid", "occluded"),
    [
        ((3, 2, 6, 8), (3, 2, 6, 8), (1, 6, 8), None),
        ((3, 2, 6, 8), (3, 2, 6, 8), (3, 6, 8), (1, 6, 8)),
        ((3, 2, 6, 8), (1, 2, 6, 8), (3, 6, 8), None),
        ((3, 3, 6, 8), (3, 3, 6, 8), (3, 6, 8), None),
        ((3, 2, 8), (3, 2, 8), (3, 8), None),
    ],
)
def test_metrics_of_shapes_that_do_not_fit_are_refused(
    flow: tuple[int, ...], target: tuple[int, ...], valid: tuple[int, ...], occluded: tuple[int, ...] | None
) -> None:
    masks = [torch.ones(shape, dtype=torch.bool) for shape in (valid, occluded) if shape is not None]
    with pytest.raises(GMFlowError, match=r"flow and target \[B, 2, H, W\] and masks \[B, H, W\]"):
        FlowMetrics().update(torch.zeros(flow), torch.zeros(target), *masks)


def test_wauc_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(1, 2, 8, 9)
    error = torch.rand(8, 9, generator=generator) * 6
    error[0, :4] = torch.tensor([0.0, 0.05, 5.0, 5.001])  # on the thresholds and beyond the last one
    flow = torch.stack([error, torch.zeros_like(error)])[None]
    metrics = FlowMetrics()
    metrics.update(flow, target, torch.ones(1, 8, 9, dtype=torch.bool))

    weighted = weights = 0.0
    for i in range(1, 101):
        weight = 1 - (i - 1) / 100
        weighted += weight * 100 * (error.double() <= i / 20).double().mean().item()
        weights += weight
    # 0.05 as float32 is a little more than the threshold 0.05: neither passes it.
    assert metrics.compute()["wauc"] == pytest.approx(weighted / weights, abs=1e-9)


def test_wauc_of_exact_flow_is_100_and_of_far_off_flow_0_and_is_pooled_over_pixels() -> None:
    target = torch.zeros(1, 2, 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    exact, far = FlowMetrics(), FlowMetrics()
    exact.update(target, target, valid)
    few = valid.clone()
    few[:, 1:] = False
    far.update(target + 10, target, few)
    assert exact.compute()["wauc"] == 100
    assert far.compute()["wauc"] == 0
    exact.merge(far)
    assert exact.compute()["wauc"] == pytest.approx(100 * 16 / 20)


def test_an_image_without_truth_counts_for_nothing() -> None:
    target, valid = torch.zeros(3, 2, 2, 2), torch.ones(3, 2, 2, dtype=torch.bool)
    valid[1] = False
    metrics = FlowMetrics()
    metrics.update(target + torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), target, valid)
    figures = metrics.compute()
    assert figures["epe_per_image"] == pytest.approx(5)
    assert figures["epe"] == pytest.approx(5)


def test_matched_and_unmatched_are_means_over_valid_pixels_alone() -> None:
    target, valid = torch.zeros(1, 2, 2, 4), torch.ones(1, 2, 4, dtype=torch.bool)
    occluded = torch.zeros(1, 2, 4, dtype=torch.bool)
    occluded[..., :2] = True
    valid[:, 0] = False
    flow = target.clone()
    flow[:, 0, :, :2], flow[:, 0, :, 2:] = 4, 2
    metrics = FlowMetrics()
    metrics.update(flow, target, valid, occluded)
    figures = metrics.compute()
    assert (figures["unmatched"], figures["matched"]) == (pytest.approx(4), pytest.approx(2))


def test_speeds_of_10_and_40_px_are_of_the_middle_bin() -> None:
    target = torch.zeros(1, 2, 1, 4)
    target[0, 0, 0] = torch.tensor([9.0, 10.0, 40.0, 41.0])
    flow = target.clone()
    flow[0, 1, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    metrics = FlowMetrics()
    metrics.update(flow, target, torch.ones(1, 1, 4, dtype=torch.bool))
    figures = metrics.compute()
    assert [figures[name] for name in ("s0_10", "s10_40", "s40_plus")] == pytest.approx([1, 3, 8])
    assert "matched" not in figures
    assert not math.isnan(figures["epe"])


def test_a_state_is_a_copy() -> None:
    """It is all-reduced in place."""
    metrics = FlowMetrics()
    before = metrics.state().tolist()
    metrics.state().fill_(7.0)
    assert metrics.state().tolist() == before
    state = metrics.state()
    copied = FlowMetrics.from_state(state)
    state.fill_(7.0)
    assert copied.state().tolist() == before


def figures_of(errors: list[float], speed: float = 0.0) -> dict[str, float]:
    """Metrics of one row of pixels that move by `speed` and whose flow is off by these errors."""
    target = torch.zeros(1, 2, 1, len(errors))
    target[0, 0] = speed
    flow = target.clone()
    flow[0, 0, 0] += torch.tensor(errors)
    metrics = FlowMetrics()
    metrics.update(flow, target, torch.ones(1, 1, len(errors), dtype=torch.bool))
    return metrics.compute()


def test_an_error_of_just_the_limit_is_no_outlier() -> None:
    figures = figures_of([1.0, 3.0, 5.0, 5.5])
    assert [figures[name] for name in ("px1", "px3", "px5")] == [75, 50, 25]


def test_f1_takes_a_twentieth_of_the_speed() -> None:
    assert figures_of([4.99, 5.01], speed=100.0)["f1_all"] == 50


def test_a_target_that_is_not_finite_in_y_alone_counts_nowhere() -> None:
    target = torch.ones(1, 2, 1, 2)
    target[0, 1, 0, 1] = math.nan
    metrics = FlowMetrics()
    metrics.update(torch.zeros(1, 2, 1, 2), target, torch.ones(1, 1, 2, dtype=torch.bool))
    assert metrics.compute()["epe"] == pytest.approx(2**0.5)
