"""Configuration, weight files, prediction on any size, pictures, and how a model is run."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import platform
import re
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmflow import (
    GMFlow,
    GMFlowConfig,
    GMFlowError,
    flow_to_image,
    load_model,
    load_weights,
    predict_batch,
    predict_flow,
    save_weights,
)
from gmflow.backbone import Backbone
from gmflow.execution import ExecutionConfig, _require_compiler, prepare_model
from gmflow.geometry import _OrderedSample, _OrderedUpsample, backward_warp, forward_backward_occlusion
from gmflow.matching import match
from gmflow.model import FlowOutput
from gmflow.predict import Padding, evaluating, padded_flow
from gmflow.summation import SummationOrder
from gmflow.tiling import Tiling
from gmflow.visualize import color_wheel
from gmflow.weights import encode_weights, replace_file, save_published, weights_digest

TINY: dict[str, Any] = {"backbone_channels": (4, 6, 8), "feature_channels": 8, "num_layers": 2, "ffn_expansion": 2}
BASE = GMFlowConfig(**TINY)
REFINE = GMFlowConfig(num_scales=2, **TINY, attn_splits=(2, 8), corr_radius=(-1, 4), prop_radius=(-1, 1))


def tiny(config: GMFlowConfig = REFINE) -> GMFlow:
    torch.manual_seed(0)
    return GMFlow(config)


def frames(height: int, width: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(2)]


# Configuration


def test_variants_have_the_published_parameter_counts() -> None:
    for config, parameters in ((GMFlowConfig.base(), 4_680_288), (GMFlowConfig.refine(), 4_716_720)):
        assert sum(p.numel() for p in GMFlow(config).parameters()) == parameters


def test_config_survives_json() -> None:
    for config in (GMFlowConfig.base(), GMFlowConfig.refine(), REFINE):
        assert GMFlowConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_scales", 3),
        ("num_scales", True),
        ("backbone_channels", (64, 96)),
        ("backbone_channels", (64, 96, 0)),
        ("feature_channels", 126),
        ("num_layers", 0),
        ("ffn_expansion", 1.5),
        ("attn_splits", (2, 8)),
        ("attn_splits", (0,)),
        ("attn_splits", 2),
        ("corr_radius", (0,)),
        ("corr_radius", (-2,)),
        ("prop_radius", ("1",)),
    ],
)
def test_impossible_settings_name_the_field_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(GMFlowError, match=field) as error:
        GMFlowConfig(**{field: value})
    assert str(value).strip("(),'") in str(error.value)


def test_unknown_setting_names_the_known_ones() -> None:
    with pytest.raises(GMFlowError, match=r"atn_splits; known: .*attn_splits"):
        GMFlowConfig.from_dict({"atn_splits": [2]})


@pytest.mark.parametrize(
    ("config", "multiple"),
    [
        (GMFlowConfig.base(), 16),
        (GMFlowConfig.refine(), 32),
        (GMFlowConfig(attn_splits=(3,)), 24),
        (GMFlowConfig(2, attn_splits=(1, 1), corr_radius=(-1, 4), prop_radius=(-1, 1)), 8),
    ],
)
def test_size_multiple(config: GMFlowConfig, multiple: int) -> None:
    assert config.size_multiple == multiple


# Weight files


@pytest.mark.parametrize("config", [BASE, REFINE], ids=["base", "refine"])
def test_our_weights_rebuild_the_model(config: GMFlowConfig, tmp_path: Path) -> None:
    model = tiny(config)
    path = tmp_path / "model.safetensors"
    save_weights(model, path)
    loaded = load_model(path)
    assert loaded.config == config
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["gmflow_config"]) == config.to_dict()


def test_equal_models_are_equal_files() -> None:
    model = tiny(REFINE)
    assert len({encode_weights(model) for _ in range(20)}) == 1


@pytest.mark.parametrize("bare", [False, True], ids=["in a dict", "bare"])
@pytest.mark.parametrize("config", [BASE, REFINE], ids=["base", "refine"])
def test_published_layout_both_ways(config: GMFlowConfig, bare: bool, tmp_path: Path) -> None:
    model = tiny(config)
    path = tmp_path / "model.pth"
    save_published(model, path)
    if bare:
        torch.save(torch.load(path, weights_only=True)["model"], path)
    loaded = load_model(path)
    assert loaded.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_windows_and_radii_can_be_overridden_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(tiny(), path)
    assert load_model(path, corr_radius=(-1, 2), attn_splits=(1, 4)).size_multiple == 16
    with pytest.raises(GMFlowError, match="num_layers cannot be changed"):
        load_model(path, num_layers=3)
    with pytest.raises(GMFlowError, match="corr_radius"):
        load_model(path, corr_radius=(4,))


def test_published_files_hold_124_and_123_tensors(reference: Path) -> None:
    for name, config in (
        ("gmflow_refine_published", GMFlowConfig.refine()),
        ("gmflow_base_random", GMFlowConfig.base()),
    ):
        model = GMFlow(config)
        load_weights(model, reference / f"{name}.pth")
        assert load_model(reference / f"{name}.pth").config == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 3}, "num_layers is 2, the model's is 3"),
        ({"feature_channels": 16}, "feature_channels is 8"),
        ({"backbone_channels": (4, 6, 10)}, "backbone_channels"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_another_architecture_is_named_in_one_line(
    change: dict[str, Any], named: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    (save_weights if suffix == ".safetensors" else save_published)(tiny(BASE), path)
    other = GMFlow(GMFlowConfig(**{**TINY, **change}))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(GMFlowError, match=named) as error:
        load_weights(other, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_missing_and_damaged_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    with pytest.raises(GMFlowError, match="no such weight file"):
        load_model(path)
    (save_weights if suffix == ".safetensors" else save_published)(tiny(), path)
    content = path.read_bytes()
    foreign = (b"", b"not weights at all", b"and more text", b"\x80", b"\x80\x02X\x10")
    for damaged in (content[: len(content) // 2], *foreign):
        path.write_bytes(damaged)
        with pytest.raises(GMFlowError, match="damaged") as error:
            load_model(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{0: torch.zeros(1)}, {"model": {0: torch.zeros(1)}}, {"a": 1}, [torch.zeros(1)]])
def test_a_checkpoint_that_is_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(GMFlowError, match="neither a state dict nor"):
        load_model(path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_published(tiny(), path)
    state = torch.load(path, weights_only=True)["model"]
    del state["upsampler.0.bias"]
    torch.save(state, path)
    with pytest.raises(GMFlowError, match=r"lacks 1 tensor.*upsampler\.0\.bias"):
        load_model(path)


class _Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code from a weight file ran",)


def test_no_code_from_a_weight_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": _Dangerous()}, path)
    with pytest.raises(GMFlowError, match="more than tensors"):
        load_model(path)
    assert "ran" not in capsys.readouterr().out


def test_save_refuses_other_suffixes_missing_folders_and_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(GMFlowError, match=r"\.safetensors"):
        save_weights(tiny(), tmp_path / "model.pth")
    with pytest.raises(GMFlowError, match="does not exist"):
        save_weights(tiny(), tmp_path / "missing" / "model.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (Path("/proc/model.safetensors"), tmp_path / "folder.safetensors"):
        with pytest.raises(GMFlowError, match=f"{path}: cannot be written"):
            save_weights(tiny(), path)
    with pytest.raises(GMFlowError, match=r"saved as \.pth \(save_weights"):
        save_published(tiny(), tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


@pytest.mark.parametrize(("save", "suffix"), [(save_weights, ".safetensors"), (save_published, ".pth")])
def test_where_weights_do_not_fit_the_old_file_stays(save: Any, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(GMFlowError, match=f"{path}: cannot be written"):
            save(tiny(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# Prediction


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
        predict_flow(tiny(), one, one, padding="reflect")  # type: ignore[arg-type]
    with pytest.raises(GMFlowError, match="precision must be one of fp32, tf32, bf16, fp16"):
        predict_flow(tiny(), one, one, precision="int8")  # type: ignore[arg-type]


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
            predict_flow(model, *pair, precision=other)  # type: ignore[arg-type]


def test_of_no_pairs_there_are_no_predictions() -> None:
    assert predict_batch(tiny(), []) == []


def test_prediction_leaves_every_part_in_the_mode_it_was_in() -> None:
    model = tiny().train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_of_any_floating_type_are_their_values_in_float32(dtype: torch.dtype) -> None:
    model = tiny().eval()
    images = (torch.rand(2, 1, 3, 64, 96) * 255).to(dtype)
    with torch.no_grad():
        assert torch.equal(model(*images).flow, model(*images.float()).flow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_whose_parameters_are_not_float32_says_what_to_do(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    with pytest.raises(GMFlowError, match=rf"parameters are {dtype}.*gmflow\.execution\.prepare_model\(model, Exec"):
        model(*torch.zeros(2, 1, 3, 32, 32, dtype=dtype))
    assert torch.isfinite(model.float()(*torch.zeros(2, 1, 3, 32, 32, dtype=dtype)).flow).all()


def test_model_refuses_sizes_that_do_not_divide() -> None:
    with pytest.raises(GMFlowError, match="divisible by 32"):
        tiny()(torch.zeros(1, 3, 48, 64), torch.zeros(1, 3, 48, 64))
    with pytest.raises(GMFlowError, match="floating point"):
        tiny()(*torch.zeros(2, 1, 3, 32, 32, dtype=torch.uint8))


def test_one_feature_pixel_is_refused() -> None:
    model = GMFlow(GMFlowConfig(**TINY, attn_splits=(1,)))
    with pytest.raises(GMFlowError, match="8×8"):
        model(*torch.zeros(2, 1, 3, 8, 8))


# Geometry and pictures


def test_warp_reads_where_the_flow_points() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[:, 0] = 1
    warped = backward_warp(image, flow)
    torch.testing.assert_close(warped[..., :3], image[..., 1:])
    assert warped[..., 3].abs().max() == 0


def random64(*shape: int, seed: int, requires_grad: bool = False) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_(requires_grad)


def test_the_gradient_of_a_warp_that_adds_up_in_order_is_pytorchs() -> None:
    """It is taken on GPUs; positions inside, at the border and far outside."""
    image = random64(2, 5, 7, 9, seed=0, requires_grad=True)
    grid, upper = random64(2, 6, 8, 2, seed=1), random64(2, 5, 6, 8, seed=2)
    grid[0, 0, :3] = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 1.0]])
    warped = _OrderedSample.apply(image, grid)
    (found,) = torch.autograd.grad(warped, image, upper)
    plain = torch.nn.functional.grid_sample(image, grid, align_corners=True)
    (wanted,) = torch.autograd.grad(plain, image, upper)
    assert torch.equal(warped, plain)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    grid[1, 2, 3], grid[1, 2, 4] = math.nan, math.inf  # of a flow that is lost: its step is skipped, not crashed
    (lost,) = torch.autograd.grad(_OrderedSample.apply(image, grid), image, upper)
    assert lost.isfinite().all()


@pytest.mark.parametrize(("height", "width", "factor"), [(5, 7, 2), (6, 4, 8), (1, 3, 4), (1, 1, 8)])
def test_the_gradient_of_upsampling_that_adds_up_in_order_is_pytorchs(height: int, width: int, factor: int) -> None:
    flow = random64(2, 2, height, width, seed=0, requires_grad=True)
    upper = random64(2, 2, factor * height, factor * width, seed=1)
    upsampled = _OrderedUpsample.apply(flow, factor)
    plain = torch.nn.functional.interpolate(flow, scale_factor=factor, mode="bilinear", align_corners=True)
    assert torch.equal(upsampled, plain)
    (found,), (wanted,) = (torch.autograd.grad(one, flow, upper) for one in (upsampled, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_consistent_flow_has_no_occlusion() -> None:
    flow = torch.zeros(1, 2, 4, 6)
    flow[:, 0] = 2
    forward, backward = forward_backward_occlusion(flow, -flow)
    assert forward[0, 0].tolist() == [False] * 4 + [True] * 2
    assert backward[0, 0].tolist() == [True] * 2 + [False] * 4


def middlebury_color(u: float, v: float) -> list[int]:
    """The benchmark's own computeColor, for one vector of at most length 1."""
    wheel = []
    for length, start, step in (
        (15, (255, 0, 0), (0, 1, 0)),
        (6, (255, 255, 0), (-1, 0, 0)),
        (4, (0, 255, 0), (0, 0, 1)),
        (11, (0, 255, 255), (0, -1, 0)),
        (13, (0, 0, 255), (1, 0, 0)),
        (6, (255, 0, 255), (0, 0, -1)),
    ):
        wheel += [[s + d * (255 * i // length) for s, d in zip(start, step, strict=True)] for i in range(length)]
    position = (math.atan2(-v, -u) / math.pi + 1) / 2 * (len(wheel) - 1)
    lower = int(position)
    fraction = position - lower
    color = []
    for low, high in zip(wheel[lower], wheel[(lower + 1) % len(wheel)], strict=True):
        value = (1 - fraction) * low / 255 + fraction * high / 255
        color.append(int(255 * (1 - math.hypot(u, v) * (1 - value))))
    return color


def test_colors_are_those_of_middlebury() -> None:
    assert color_wheel().shape == (55, 3)
    generator = np.random.default_rng(0)
    flow = generator.uniform(-0.7, 0.7, (20, 30, 2))
    image = flow_to_image(flow, max_flow=1.0)
    expected = np.array([[middlebury_color(*vector) for vector in row] for row in flow])
    assert np.abs(image.astype(int) - expected).max() <= 1  # one ulp before the floor
    assert (image == expected).mean() > 0.99


def test_unknown_flow_is_black_and_no_flow_white() -> None:
    flow = np.zeros((1, 4, 2), np.float32)
    flow[0, 0, 0], flow[0, 1, 1], flow[0, 2] = np.nan, np.inf, 1e10
    assert flow_to_image(flow).tolist() == [[[0, 0, 0]] * 3 + [[255, 255, 255]]]


def test_what_is_no_flow_is_refused() -> None:
    with pytest.raises(GMFlowError, match=r"\[H, W, 2\]"):
        flow_to_image(np.zeros((4, 4, 3)))
    with pytest.raises(GMFlowError, match="max_flow"):
        flow_to_image(np.zeros((4, 4, 2)), max_flow=0)


# Execution


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_low_precision_keeps_float32_results_and_gradients(precision: Any) -> None:
    model = tiny().train()
    prepare_model(model, ExecutionConfig(precision=precision))
    out = model(*torch.rand(2, 1, 3, 64, 64) * 255)
    out.flow.abs().mean().backward()
    assert out.flow.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("radius", [-1, 4])
def test_matching_is_float32_whatever_surrounds_it(radius: int) -> None:
    """Rounded to 16 bits, the position of the best match is off by parts of a pixel, times the upsampling."""
    feature0, feature1 = torch.randn(2, 1, 16, 12, 14, generator=torch.Generator().manual_seed(0))
    usual = match(feature0, feature1, radius)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(feature0, feature1, radius), usual)


@pytest.mark.parametrize(
    ("precision", "order"),
    [
        (None, SummationOrder.REFERENCE),
        ("fp32", SummationOrder.FREE_TO_LEARN),
        ("tf32", SummationOrder.FREE),
        ("bf16", SummationOrder.FREE),
        ("fp16", SummationOrder.FREE),
    ],
)
def test_every_part_has_the_order_of_sums_of_its_precision(precision: Any, order: SummationOrder) -> None:
    model = tiny()
    if precision is not None:
        prepare_model(model, ExecutionConfig(precision))
    told = [module.summation for module in model.modules() if hasattr(module, "summation")]
    assert isinstance(next(module for module in model.modules() if hasattr(module, "summation")), Backbone)
    # Backbone, transformer, and of each layer two kinds of attention and the feed-forward.
    in_backbone = SummationOrder.REFERENCE if order is SummationOrder.FREE_TO_LEARN else order
    assert told == [in_backbone] + [order] * (1 + 3 * model.config.num_layers)


def test_only_what_learns_on_a_cpu_is_free_of_the_references_order() -> None:
    cpu, elsewhere = torch.device("cpu"), torch.device("cuda")
    with torch.enable_grad():
        assert [order.is_free(cpu) for order in SummationOrder] == [False, True, True]
        assert [order.is_free(elsewhere) for order in SummationOrder] == [False, False, True]
    with torch.no_grad():
        assert [order.is_free(cpu) for order in SummationOrder] == [False, False, True]


@pytest.mark.parametrize("field", ["precision", "checkpointing"])
def test_unknown_execution_settings_name_the_known_ones(field: str) -> None:
    with pytest.raises(GMFlowError, match=f"{field} must be one of"):
        ExecutionConfig(**{field: "fast"})


@pytest.mark.parametrize(
    "config", [ExecutionConfig(), ExecutionConfig(checkpointing="full"), ExecutionConfig("bf16", "full")]
)
def test_a_model_is_prepared_once_and_keeps_its_parameter_names(config: ExecutionConfig) -> None:
    model = tiny()
    names = list(model.state_dict())
    prepare_model(model, config)
    assert list(model.state_dict()) == names
    for prepared in (model, copy.deepcopy(model)):
        with pytest.raises(GMFlowError, match="prepared already"):
            prepare_model(prepared, ExecutionConfig())


def test_ddp_without_a_process_group_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = tiny()
    with pytest.raises(GMFlowError, match="process group"):
        prepare_model(model, ExecutionConfig("bf16", "full", ddp=True))
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    prepare_model(model, ExecutionConfig())


COMPILERS = [  # device, what the environment names, what is installed, what is missed
    ("cpu", {}, (), "g++"),
    ("cpu", {}, ("gcc", "clang", "clang++"), "g++"),
    ("cpu", {}, ("g++",), None),
    ("cpu", {"CXX": "clang++"}, ("g++",), "CXX='clang++'"),
    ("cpu", {"CXX": "clang++"}, ("clang++",), None),
    ("cpu", {"CXX": ""}, ("g++",), "CXX=''"),
    ("cpu", {"TORCH_INDUCTOR_INSTALL_GXX": "1"}, (), None),
    ("cuda", {}, (), "gcc or clang"),
    ("cuda", {}, ("g++",), "gcc or clang"),
    ("cuda", {}, ("gcc",), None),
    ("cuda", {}, ("clang",), None),
    ("cuda", {"CC": "icx"}, ("gcc",), "CC='icx'"),
]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which programs are looked for."""
    for name in ("CC", "CXX", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="compilers have other names there")
@pytest.mark.parametrize(("device", "named", "installed", "missed"), COMPILERS)
def test_compile_is_refused_where_its_compiler_would_not_be_found(
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    named: dict[str, str],
    installed: tuple[str, ...],
    missed: str | None,
) -> None:
    for variable, value in named.items():
        monkeypatch.setenv(variable, value)
    for name in installed:
        (programs / name).touch(mode=0o755)
    if missed is None:
        _require_compiler(torch.device(device))
        return
    variable = "CXX" if device == "cpu" else "CC"
    told = f"this machine has no {missed}; install it, name one that is there in {variable}, or leave compile out"
    with pytest.raises(GMFlowError, match=f"^compile needs a compiler, and {re.escape(told)}$"):
        _require_compiler(torch.device(device))


@pytest.mark.usefixtures("programs")
@pytest.mark.skipif(sys.platform != "linux", reason="compilers have other names there")
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_compile_without_a_compiler_leaves_the_model_as_it_was(device: str | None) -> None:
    model = tiny()
    with pytest.raises(GMFlowError, match="compile needs a compiler"):
        prepare_model(model, ExecutionConfig("bf16", "full", compile=True), device)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    prepare_model(model, ExecutionConfig())


@pytest.mark.parametrize("how", ["copied", "pickled"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_prepared_models_copy_computes_with_its_own_weights(precision: Any, checkpointing: Any, how: str) -> None:
    model = tiny().train()
    prepare_model(model, ExecutionConfig(precision, checkpointing))
    copied = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))  # noqa: S301
    images = torch.rand(2, 1, 3, 64, 64) * 255
    flow = model(*images).flow
    assert torch.equal(copied(*images).flow, flow)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    zeroed = copied(*images).flow
    assert not torch.equal(zeroed, flow)
    assert torch.equal(model(*images).flow, flow)
    zeroed.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in copied.parameters())


@pytest.fixture
def tf32_settings() -> Iterator[tuple[Any, Any]]:
    """Of the process, and afterwards as they were before."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flags.allow_tf32 for flags in settings]
    yield settings
    for flags, allowed in zip(settings, before, strict=True):
        flags.allow_tf32 = allowed


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_products_that_stay_in_float32_round_their_factors_on_a_gpu_unless_fp32_is_asked_for(
    precision: Any, tf32_settings: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training they are a quarter of the operations, of which plain float32 would make most of the time."""
    for flags in tf32_settings:
        flags.allow_tf32 = precision == "fp32"  # the other way round
    model = tiny()
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(model, "parameters", lambda: iter([on_a_gpu]))
    prepare_model(model, ExecutionConfig(precision))
    assert [flags.allow_tf32 for flags in tf32_settings] == [precision != "fp32"] * 2


def _train_as_a_rank(rank: int, folder: str, precision: Any, checkpointing: Any) -> None:
    """Saves the gradients of the same step three times: this rank's own, and all ranks' by a fresh DDP and by the same
    DDP later.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    warnings.filterwarnings("error", "Grad strides do not match")  # which DDP would say to every user
    model = prepare_model(tiny().train(), ExecutionConfig(precision, checkpointing, ddp=True))
    assert isinstance(model, DistributedDataParallel)
    images = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(rank)) * 255

    def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        sum(prediction.abs().mean() for prediction in module(*images).predictions).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    fresh, later = gradients(model), gradients(model)
    with model.no_sync():
        torch.save((gradients(model), fresh, later), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    # One of gloo's threads may still hold a Python object with the last sum; should it let go of that while the
    # interpreter is ending, the process aborts. Nothing is left to do here, so the interpreter is not ended.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", "none"), ("fp32", "full"), ("bf16", "full")])
def test_ranks_under_ddp_get_the_same_gradients_in_their_first_step_and_later(
    precision: str, checkpointing: str, tmp_path: Path
) -> None:
    """To the bit, as a resumed run's first step needs: from three ranks on, the order of a sum may show."""
    mp.spawn(_train_as_a_rank, (str(tmp_path), precision, checkpointing), nprocs=3)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert len(ranks[0][0]) == len(list(tiny().parameters()))
    for number, own in enumerate(zip(*(rank[0] for rank in ranks), strict=True)):
        synced = [of_all[number] for rank in ranks for of_all in rank[1:]]
        assert all(torch.equal(synced[0], other) for other in synced)
        torch.testing.assert_close(synced[0], torch.stack(own).mean(dim=0))


def test_the_library_works_where_nothing_but_its_own_requirements_is_installed() -> None:
    """`pip install .` brings torch, numpy, OpenCV and safetensors: everything else is blocked here."""
    code = """
import importlib.abc, sys, time

class Blocked(importlib.abc.MetaPathFinder):
    names = {"ray", "mlflow", "boto3", "botocore", "webdataset", "pydantic", "yaml", "rich", "matplotlib", "pandas",
             "datasets_etl", "pipelines", "onnxscript", "onnxruntime", "zstandard", "tenacity"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is none of the library's requirements")

sys.meta_path.insert(0, Blocked())
import numpy, gmflow
assert "cv2" not in sys.modules  # loaded by gmflow.drawing alone: it takes a while
import gmflow.drawing, gmflow.export, gmflow.execution
small = gmflow.GMFlowConfig(backbone_channels=(4, 6, 8), feature_channels=8, num_layers=1)
flow = gmflow.predict_flow(gmflow.GMFlow(small), *numpy.zeros((2, 20, 30, 3), numpy.uint8))
print(flow.shape, gmflow.flow_to_image(flow).shape)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "(20, 30, 2) (20, 30, 3)", out.stderr


def test_importing_the_library_loads_hardly_more_than_torch() -> None:
    """Not the compiler, which takes as long as PyTorch itself, nor OpenCV."""
    heavy = ("torch._dynamo", "sympy", "cv2")
    code = f"import sys, gmflow; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_what_loops_over_chunks_stays_out_of_compiled_graphs() -> None:
    graphs: list[set[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append({str(node.target) for node in module.graph.nodes})
        return module.forward

    model = tiny().eval()
    images = torch.rand(2, 1, 3, 64, 64) * 255
    with torch.no_grad():
        wanted = model(*images).flow
        compiled = torch.compile(model, backend=backend)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # not compiled anew for every window either
            torch.testing.assert_close(compiled(*images).flow, wanted, rtol=0, atol=1e-4)
    assert graphs
    assert not [graph for graph in graphs if any("new_empty" in name or "gelu" in name for name in graph)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is set up, no other")
@pytest.mark.parametrize("keep", [True, False])
def test_a_prepared_model_gets_memory_that_was_freed_not_fresh_pages_unless_told_otherwise(keep: bool) -> None:
    script = f"""
        import resource
        import torch
        from gmflow import GMFlow, GMFlowConfig
        from gmflow.execution import ExecutionConfig, prepare_model

        prepare_model(GMFlow(GMFlowConfig(num_layers=1)), ExecutionConfig(), keep_freed_memory={keep})
        faults = []
        for _ in range(12):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.zeros(2**24)  # 64 MiB, 16,384 pages
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(*faults)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    faults = list(map(int, run.stdout.split()))
    assert max(faults) > 1000
    assert (sum(faults) < 4 * max(faults)) == keep  # some other tensor may have taken a corner of what was freed


def test_a_prepared_model_flushes_denormals_on_every_thread_that_computes_for_it() -> None:
    """Also on those that PyTorch had started before."""
    script = """
        import torch
        from gmflow import GMFlow, GMFlowConfig
        from gmflow.execution import ExecutionConfig, prepare_model

        torch.set_num_threads(2)

        def flushed():
            return (torch.full((2**20,), 1.2e-38) * 0.5 == 0).float().mean().item()

        before = flushed()
        prepare_model(GMFlow(GMFlowConfig(num_layers=1)), ExecutionConfig())
        print(before, flushed(), torch.get_num_threads())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0.0", "1.0", "2"]


def test_a_digest_names_the_weights_and_the_configuration_whatever_the_file(tmp_path: Path) -> None:
    model = tiny()
    save_weights(model, tmp_path / "model.safetensors")
    save_published(model, tmp_path / "model.pth")
    digest = weights_digest(model)
    assert {weights_digest(load_model(path)) for path in tmp_path.iterdir()} == {digest}
    other = weights_digest(load_model(tmp_path / "model.safetensors", corr_radius=(-1, 2)))
    with torch.no_grad():
        model.upsampler.hidden.bias[0] += 1e-6
    assert len({digest, other, weights_digest(model)}) == 3


def test_a_file_that_could_not_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def breaks_off(beside: str) -> None:
        Path(beside).write_bytes(b"ne")
        raise OSError("No space left on device")

    with pytest.raises(GMFlowError, match=r"cannot be written \(No space"):
        replace_file(path, breaks_off)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_are_for_all_whom_other_new_files_are_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights(tiny(), tmp_path / "model.safetensors")
        assert os.umask(0o027) == 0o027, "the process's own setting stays"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640


def test_weights_that_were_saved_from_a_parallel_model_load(tmp_path: Path) -> None:
    """As the published training scripts save them."""
    path, model = tmp_path / "model.pth", tiny()
    save_published(model, path)
    state = torch.load(path, weights_only=True)["model"]
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    loaded = load_model(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_fresh_model_is_initialised_as_the_published_one() -> None:
    """Kaiming for convolutions, Xavier for matrices; PyTorch's own defaults train to other weights."""
    torch.manual_seed(0)
    model = GMFlow(GMFlowConfig.refine())
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or name.startswith("upsampler"):
            continue
        outgoing, incoming, *kernel = module.weight.shape
        area = int(np.prod(kernel))
        if name == "backbone.shared":
            variance = 2 / (incoming * area)
        elif isinstance(module, nn.Conv2d):
            variance = 2 / (outgoing * area)
        else:
            variance = 2 / (incoming + outgoing)
        assert module.weight.var().item() == pytest.approx(variance, rel=0.1), name
        largest = module.weight.abs().max().item() / variance**0.5
        assert (largest > 3) == (isinstance(module, nn.Conv2d) and name != "backbone.shared"), name  # normal or uniform


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


def test_a_picture_in_strips_is_that_of_each_pixel_and_16_bits_know_what_is_unknown() -> None:
    flow = np.random.default_rng(0).normal(0, 30, (300, 200, 2)).astype(np.float16)
    flow[7, 9] = np.inf
    picture = flow_to_image(flow, max_flow=50.0)
    assert (picture[7, 9] == 0).all()
    for y, x in ((0, 0), (7, 8), (40, 199), (41, 0), (299, 199)):
        np.testing.assert_array_equal(picture[y, x], flow_to_image(flow[y : y + 1, x : x + 1], max_flow=50.0)[0, 0])


def test_speeds_beyond_the_fullest_colour_are_darkened_and_the_fullest_is_the_largest() -> None:
    flow = np.array([[[3.0, 0.0], [0.0, -4.0], [1.0, 1.0]]])
    np.testing.assert_array_equal(flow_to_image(flow), flow_to_image(flow, max_flow=4.0))
    full = np.array(middlebury_color(1.0, 0.0))
    fast = flow_to_image(np.array([[[9.0, 0.0]]]), max_flow=3.0)[0, 0]
    assert np.abs(fast - 0.75 * full).max() <= 1


def saved_bytes(checkpointing: Any) -> int:
    """What a training pass keeps for its backward pass; each piece of memory counts once."""
    model = tiny(REFINE).train()
    prepare_model(model, ExecutionConfig(checkpointing=checkpointing))
    pieces: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(*torch.rand(2, 1, 3, 64, 96) * 255)
    assert out.flow.requires_grad
    return sum(pieces.values())


def test_checkpointing_keeps_less_the_more_is_recomputed() -> None:
    nothing, selective, full = (saved_bytes(how) for how in ("none", "selective", "full"))
    assert full < 0.9 * selective < 0.9**2 * nothing, (nothing, selective, full)


def test_a_model_is_compiled_and_moved_where_that_is_asked_for() -> None:
    model = tiny(BASE)
    prepare_model(model, ExecutionConfig(compile=True), "meta")
    assert model._compiled_call_impl is not None
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
