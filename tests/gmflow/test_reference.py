"""The numbers of the published model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gmflow import GMFlow, load_model
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.geometry import forward_backward_occlusion
from gmflow.loss import sequence_loss
from gmflow.metrics import FlowMetrics
from gmflow.weights import published_name
from tests.gmflow import oracle

TOLERANCE = 1e-3  # pixels

WEIGHTS = {"refine": "gmflow_refine_published.pth", "base": "gmflow_base_random.pth"}
EVALUATED = [
    "refine_eval",
    "refine_bidir",
    "refine_crop_splits1-8_radius4",
    "refine_crop_splits2-4_radius2",
    "refine_crop_splits2-8_radius6",
    "refine_crop_splits4-8_radius4",
    "refine_crop_splits1-1_radius4",
    "base_crop_eval",
    "base_crop_bidir",
    "base_crop_splits1",
    "base_crop_local_radius3",
]

Pair = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _reference_threads() -> Iterator[None]:
    """Two: another number changes partial sums, which the weights magnify past 1e-3 px (the oracle too)."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def settings(key: str) -> dict[str, Any]:
    found = re.fullmatch(r"refine_crop_splits(\d+)-(\d+)_radius(\d+)", key)
    if found:
        first, second, radius = map(int, found.groups())
        return {"attn_splits": (first, second), "corr_radius": (-1, radius)}
    return {
        "base_crop_splits1": {"attn_splits": (1,)},
        "base_crop_local_radius3": {"corr_radius": (3,), "prop_radius": (1,)},
    }.get(key, {})


def plainly(model: GMFlow, image0: Tensor, image1: Tensor, **how: bool) -> list[Tensor]:
    with torch.no_grad():
        return oracle.predictions(dict(model.named_parameters()), model.config, image0, image1, **how)


def assert_near(found: Sequence[Tensor], expected: Sequence[np.ndarray], plain: Callable[[], Sequence[Tensor]]) -> None:
    """Within the tolerance; where the plain formulas themselves are not, as processors round differently, within their
    distance more (on Intel's with AMX it is up to 0.004 px).
    """

    def errors(flows: Sequence[Tensor]) -> np.ndarray:
        pairs = zip(flows, expected, strict=True)
        return np.array([np.abs(flow.detach().numpy() - wanted).max() for flow, wanted in pairs])

    apart, allowed = errors(found), np.full(len(expected), TOLERANCE)
    if (apart > allowed).any():
        theirs = errors(plain())
        allowed += np.where(theirs > TOLERANCE, theirs, 0.0)
    assert (apart <= allowed).all(), (apart, allowed)


@pytest.mark.parametrize("key", EVALUATED)
def test_flow_is_that_of_the_reference(
    key: str,
    reference: Path,
    reference_outputs: dict[str, np.ndarray],
    reference_pair: Pair,
    reference_crop: Pair,
) -> None:
    model = load_model(reference / WEIGHTS[key.split("_")[0]], **settings(key))
    image0, image1, _ = reference_crop if "crop" in key else reference_pair
    with torch.no_grad():
        out = model(image0, image1, bidirectional="bidir" in key)
    flow = out.flow if out.backward_flow is None else torch.cat([out.flow, out.backward_flow])
    assert_near([flow], [reference_outputs[key]], lambda: plainly(model, image0, image1, bidirectional="bidir" in key))


def test_tf32_on_a_cpu_is_the_reference_but_for_the_order_of_its_sums(
    reference: Path, reference_outputs: dict[str, np.ndarray], reference_pair: Pair
) -> None:
    """Far closer than with factors of 10 bits, as on a GPU."""
    model = prepare_model(load_model(reference / WEIGHTS["refine"]), ExecutionConfig("tf32"))
    with torch.no_grad():
        flow = model(*reference_pair[:2]).flow.numpy()
    apart = np.linalg.norm(flow - reference_outputs["refine_eval"], axis=1)  # [1, H, W]
    assert apart.mean() < 5e-4
    assert 0 < apart.max() < 0.05


def learn(model: nn.Module, crop: Pair) -> tuple[list[Tensor], Tensor]:
    """Predictions of the crop and their loss, with its gradients in the model."""
    image0, image1, target = crop
    predictions = model(image0, image1).predictions
    loss = sequence_loss(predictions, target, torch.ones_like(target[:, 0], dtype=torch.bool))
    loss.backward()
    return predictions, loss


def assert_gradients_near(model: nn.Module, expected: dict[str, Any], rounding: float) -> None:
    """Every parameter's norm, but for `rounding` of the total."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        norm, nothing = expected["grad_norm"][published_name(name)], rounding * expected["total_grad_norm"]
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=nothing), name


@pytest.mark.parametrize("variant", ["refine", "base"])
def test_training_predictions_loss_metrics_and_gradients_are_those_of_the_reference(
    variant: str,
    reference: Path,
    reference_outputs: dict[str, np.ndarray],
    reference_gradients: dict[str, Any],
    reference_crop: Pair,
) -> None:
    image0, image1, target = reference_crop
    expected = reference_gradients[variant]
    model = load_model(reference / WEIGHTS[variant]).train()
    predictions, loss = learn(model, reference_crop)
    assert len(predictions) == expected["num_preds"]
    theirs = [reference_outputs[f"{variant}_train_pred{index}"] for index in range(len(predictions))]
    assert_near(predictions, theirs, lambda: plainly(model, image0, image1, training=True))

    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4)

    # A bias in front of an instance norm, and the key's bias where the key is of the whole map, change nothing:
    # their gradients are zero but for rounding, which is all that the reference holds of them.
    assert_gradients_near(model, expected, rounding=1e-8)

    metrics = FlowMetrics()
    metrics.update(predictions[-1], target, torch.ones_like(target[:, 0], dtype=torch.bool))
    figures = metrics.compute()
    assert figures["epe"] == pytest.approx(expected["metrics"]["epe"], abs=1e-3)
    for pixels in ("1", "3", "5"):
        assert figures[f"px{pixels}"] / 100 == pytest.approx(expected["metrics"][f"{pixels}px"], abs=1e-3)


@pytest.mark.parametrize("variant", ["refine", "base"])
def test_what_learns_in_any_order_learns_what_the_reference_does(
    variant: str,
    reference: Path,
    reference_outputs: dict[str, np.ndarray],
    reference_gradients: dict[str, Any],
    reference_crop: Pair,
) -> None:
    """Random weights magnify rounding more: pixels of "base" are up to 0.01 px off, which is nothing to its loss."""
    expected = reference_gradients[variant]
    model = prepare_model(load_model(reference / WEIGHTS[variant]).train(), ExecutionConfig("fp32"))
    predictions, loss = learn(model, reference_crop)
    for index, flow in enumerate(predictions):
        theirs = reference_outputs[f"{variant}_train_pred{index}"]
        assert np.abs(flow.detach().numpy() - theirs).mean() < {"refine": 5e-5, "base": 2e-3}[variant]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert_gradients_near(model, expected, rounding=1e-6)


@pytest.mark.slow
def test_bf16_training_goes_the_way_of_fp32(
    reference: Path, samples: Path, read_image: Callable, read_flo: Callable
) -> None:
    """On a batch: on a single pair rounding alone moves the norm by up to 4 % (docs/performance.md)."""
    data = samples / "FlyingChairs_release" / "data"
    names = ["00001", "00002", "00003", "00004"]
    crop = (..., slice(64, 256), slice(128, 384))
    image0, image1 = (
        torch.stack([torch.from_numpy(read_image(data / f"{name}_img{index}.ppm")).permute(2, 0, 1) for name in names])
        for index in (1, 2)
    )  # [4, 3, 384, 512]
    target = torch.stack([torch.from_numpy(read_flo(data / f"{name}_flow.flo")).permute(2, 0, 1) for name in names])
    valid = torch.ones_like(target[:, 0], dtype=torch.bool)
    gradients = []
    for precision in ("fp32", "bf16"):
        model = prepare_model(load_model(reference / WEIGHTS["refine"]).train(), ExecutionConfig(precision=precision))
        predictions = model(image0[crop].float(), image1[crop].float()).predictions
        sequence_loss(predictions, target[crop], valid[crop]).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double())
    exact, rounded = gradients
    assert (rounded.norm() / exact.norm()).item() == pytest.approx(1, abs=0.02)
    assert torch.cosine_similarity(rounded, exact, dim=0).item() > 0.99


def test_occlusion_is_that_of_the_reference(reference_outputs: dict[str, np.ndarray]) -> None:
    flows = torch.from_numpy(reference_outputs["refine_bidir"])
    forward, backward = forward_backward_occlusion(flows[:1], flows[1:])
    np.testing.assert_array_equal(forward.numpy(), reference_outputs["occ_fwd"])
    np.testing.assert_array_equal(backward.numpy(), reference_outputs["occ_bwd"])
