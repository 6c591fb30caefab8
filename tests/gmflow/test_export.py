"""Exported programs against the model, on sizes and batches other than the traced ones, and on a real pair."""

from __future__ import annotations

import json
import logging
import logging.handlers
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gmflow import GMFlow, GMFlowConfig, GMFlowError, load_model
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.export import ExportedModel, export_model, minimum_size

TINY: dict[str, Any] = {"backbone_channels": (4, 6, 8), "feature_channels": 8, "num_layers": 2, "ffn_expansion": 2}


def run_onnx(path: Path, image0: Tensor, image1: Tensor) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (flow,) = session.run(None, {"image0": image0.numpy(), "image1": image1.numpy()})
    result: np.ndarray = flow
    return result


def flow_of(model: GMFlow, image0: Tensor, image1: Tensor) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model(image0, image1).flow.numpy()
    return result


@pytest.fixture(scope="module")
def base() -> GMFlow:
    torch.manual_seed(0)
    return GMFlow(GMFlowConfig(**TINY)).eval()


@pytest.fixture(scope="module")
def files(base: GMFlow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `base.pt2` and `base.onnx`."""
    folder = tmp_path_factory.mktemp("exported")
    exported = export_model(base)
    exported.save_program(folder / "base.pt2")
    heard = logging.handlers.BufferingHandler(capacity=1000)
    heard.setLevel(logging.WARNING)
    logging.getLogger().addHandler(heard)
    exported.save_onnx(folder / "base.onnx")
    logging.getLogger().removeHandler(heard)
    assert heard.buffer == [], "what the converter has to say is nothing to a user"
    return folder


@pytest.fixture(scope="module")
def loaded(files: Path) -> Any:
    """`base.pt2`, as somebody without this library calls it."""
    return torch.export.load(str(files / "base.pt2")).module()


# The smallest there is; windows of 6×10 features; of 13×7, which no shift parts in halves.
@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 96, 160), (3, 208, 112)])
def test_one_file_serves_every_batch_and_size(
    base: GMFlow, files: Path, loaded: Any, shape: tuple[int, int, int]
) -> None:
    batch, height, width = shape
    generator = torch.Generator().manual_seed(batch)
    images = [torch.rand(batch, 3, height, width, generator=generator) * 255 for _ in range(2)]
    wanted = flow_of(base, *images)
    assert wanted.std() > 1  # not all alike, so that the comparison says something
    np.testing.assert_allclose(loaded(*images).detach().numpy(), wanted, atol=0.01)
    np.testing.assert_allclose(run_onnx(files / "base.onnx", *images), wanted, atol=0.01)


def test_files_tell_their_configuration_and_sizes(base: GMFlow, files: Path) -> None:
    told = {"gmflow_config": "", "size_multiple": "", "minimum_size": ""}
    torch.export.load(str(files / "base.pt2"), extra_files=told)
    assert GMFlowConfig.from_dict(json.loads(told["gmflow_config"])) == base.config
    assert (told["size_multiple"], told["minimum_size"]) == ("16", "32")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(str(files / "base.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == told


def test_a_size_below_the_minimum_is_refused_not_computed_wrongly(loaded: Any) -> None:
    with pytest.raises(Exception, match="Guard failed"):
        loaded(*torch.zeros(2, 1, 3, 16, 64))


@pytest.mark.parametrize(
    ("config", "smallest"),
    [
        (GMFlowConfig.base(), 32),
        (GMFlowConfig.refine(), 64),
        (GMFlowConfig(attn_splits=(1,)), 16),
        (GMFlowConfig(attn_splits=(3,)), 48),
    ],
)
def test_minimum_size_is_a_multiple_where_windows_have_two_features_a_side(config: GMFlowConfig, smallest: int) -> None:
    assert minimum_size(GMFlow(config)) == smallest


def test_a_model_that_was_prepared_is_refused() -> None:
    model = GMFlow(GMFlowConfig(**TINY))
    prepare_model(model, ExecutionConfig("bf16"))
    with pytest.raises(GMFlowError, match="was prepared cannot be exported"):
        export_model(model)


def test_wrong_suffixes_and_folders_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    nothing = ExportedModel(None, {})
    with pytest.raises(GMFlowError, match=r"\.onnx"):
        nothing.save_onnx(tmp_path / "model.pt2")
    with pytest.raises(GMFlowError, match="does not exist"):
        nothing.save_program(tmp_path / "no" / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_published_weights_agree_on_a_real_pair(reference: Path, reference_crop: tuple[Tensor, Tensor, Tensor]) -> None:
    """Within 0.02 px on a crop; measured on whole pairs: at most 0.0056 px, 0.00005 px on average (docs/inference.md).

    The smallest size is that of two features a window in the second scale. As ONNX too, which takes minutes to write at
    this depth, and is left to the small model above.
    """
    model = load_model(reference / "gmflow_refine_published.pth")
    image0, image1, _ = reference_crop
    program = export_model(model).program.module()
    for side in (None, minimum_size(model)):
        pair = [image[..., :side, :side].contiguous() for image in (image0, image1)]
        with torch.no_grad():
            np.testing.assert_allclose(program(*pair).numpy(), flow_of(model, *pair), atol=0.02)
