"""Flow of frames of any size."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from gmflow import (
    GMFlowConfig,
    GMFlowError,
    predict_batch,
    predict_flow,
)
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.model import FlowOutput
from gmflow.predict import Padding, evaluating, padded_flow
from gmflow.tiling import Tiling
from tests.gmflow.models import BASE, REFINE, frames, tiny


@pytest.mark.parametrize("padding", ["sintel", "kitti"])
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (5, 200), (33, 31), (64, 96), (97, 130)])
@pytest.mark.parametrize("config", [BASE, REFINE], ids=["base", "refine"])
def test_flow_for_frames_of_any_size(config: GMFlowConfig, size: tuple[int, int], padding: Any) -> None:
    model = tiny(config).train()
    flow = predict_flow(model, *frames(*size), padding=padding)
    assert flow.shape == (*size, 2)
    assert flow.dtype == np.float32
    assert np.isfinite(flow).all()
    assert model.training


def test_padding_is_split_for_sintel_and_at_the_bottom_for_kitti() -> None:
    sintel, kitti = Padding(437, 1021, 32, "sintel"), Padding(375, 1242, 32, "kitti")
    assert (sintel.top, sintel.bottom, sintel.left, sintel.right) == (5, 6, 1, 2)
    assert (kitti.top, kitti.bottom, kitti.left, kitti.right) == (0, 9, 3, 3)
    images = torch.rand(2, 3, 437, 1021)
    padded = sintel.pad(images)
    assert padded.shape == (2, 3, 448, 1024)
    assert torch.equal(sintel.crop(padded), images)
    assert torch.equal(padded[:, :, 0], padded[:, :, 5])


def test_a_batch_is_its_images() -> None:
    model = tiny().eval()
    image0, image1 = torch.rand(2, 2, 3, 50, 70) * 255
    with torch.no_grad():
        batch = padded_flow(model, image0, image1)
        single = torch.cat([padded_flow(model, image0[i : i + 1], image1[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(batch, single, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((0, 8, 3), np.uint8), "non-empty"),
        (np.zeros((32, 32), np.uint8), "RGB image"),
        (np.zeros((32, 32, 3), np.float32), "float32"),
        (np.zeros((32, 32, 4), np.uint8), "RGB image"),
        ("frame.png", "str"),
    ],
)
def test_what_is_no_frame_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(GMFlowError, match=message):
        predict_flow(tiny(), wrong, wrong)


def test_frames_of_different_size_unknown_padding_and_precision_are_refused() -> None:
    one, other = frames(32, 32)[0], frames(32, 40)[0]
    with pytest.raises(GMFlowError, match="40"):
        predict_flow(tiny(), one, other)
    with pytest.raises(GMFlowError, match="one size, not 32x32, 32x40 "):
        predict_batch(tiny(), [(one, one), (one, other), (other, other)])
    with pytest.raises(GMFlowError, match="padding must be one of sintel, kitti"):
        predict_flow(tiny(), one, one, padding="reflect")
    with pytest.raises(GMFlowError, match="precision must be one of fp32, tf32, bf16, fp16"):
        predict_flow(tiny(), one, one, precision="int8")


def test_frames_may_be_read_only_and_of_any_memory_layout() -> None:
    model, pair = tiny(), frames(32, 48)
    wanted = predict_flow(model, *pair)
    read_only = [frame.copy() for frame in pair]
    for frame in read_only:
        frame.flags.writeable = False
    flipped = [frame[:, ::-1].copy()[:, ::-1] for frame in pair]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for others in (read_only, flipped, [np.asfortranarray(frame) for frame in pair]):
            np.testing.assert_array_equal(predict_flow(model, *others), wanted)


def test_an_unprepared_model_runs_in_the_precision_asked_for() -> None:
    model, pair = tiny(), frames(64, 96)
    flow = predict_flow(model, *pair)
    np.testing.assert_array_equal(predict_flow(model, *pair, precision="fp32"), flow)
    assert not np.array_equal(predict_flow(model, *pair, precision="bf16"), flow)
    with pytest.raises(GMFlowError, match=r"tf32 takes a prepared model: gmflow\.execution\.prepare_model\("):
        predict_flow(model, *pair, precision="tf32")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_prepared_model_runs_as_it_was_prepared_or_not_at_all(precision: Any) -> None:
    pair, model = frames(64, 96), tiny()
    prepare_model(model, ExecutionConfig(precision))
    wanted = predict_flow(copy.deepcopy(model) if precision == "tf32" else tiny(), *pair, precision=precision)
    np.testing.assert_array_equal(predict_flow(model, *pair), wanted)
    np.testing.assert_array_equal(predict_flow(model, *pair, precision=precision), wanted)
    for other in {"fp32", "tf32", "bf16", "fp16"} - {precision}:
        with pytest.raises(GMFlowError, match=f"prepared for {precision} and does not run in {other}"):
            predict_flow(model, *pair, precision=other)


def test_of_no_pairs_there_are_no_predictions() -> None:
    assert predict_batch(tiny(), []) == []


def test_prediction_leaves_every_part_in_the_mode_it_was_in() -> None:
    model = tiny().train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("tiling", [None, Tiling(40, 60, 8)])
def test_the_padding_asked_for_is_taken(tiling: Tiling | None) -> None:
    model, pair = tiny(), frames(50, 70)
    sintel, kitti = (predict_flow(model, *pair, padding=padding, tiling=tiling) for padding in ("sintel", "kitti"))
    assert np.abs(sintel - kitti).mean() > 1e-3
    if tiling is None:
        images = [torch.from_numpy(frame).permute(2, 0, 1)[None].float() for frame in pair]
        with torch.no_grad():
            wanted = padded_flow(model.eval(), *images, padding="kitti")[0].permute(1, 2, 0)
        np.testing.assert_array_equal(kitti, wanted)


def test_each_frame_has_its_own_occlusion_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = torch.zeros(1, 2, 50, 70)
    flow[:, 0] = 2
    monkeypatch.setattr("gmflow.predict.padded_forward", lambda *_, **__: FlowOutput(flow, -flow, (flow,)))
    (found,) = predict_batch(tiny(), [tuple(frames(50, 70))], bidirectional=True)
    assert found.occluded is not None
    assert found.backward_occluded is not None
    assert found.occluded.nonzero()[1].tolist() == [68, 69] * 50  # what leaves frame 0 to the right
    assert found.backward_occluded.nonzero()[1].tolist() == [0, 1] * 50
