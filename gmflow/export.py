"""The model as a program without this library: `torch.export` and ONNX, one graph for all batch and image sizes.

Both take `image0` and `image1`, float32 `[B, 3, H, W]`, RGB in 0..255, and return `flow`, float32 `[B, 2, H, W]` in
pixels. H and W are multiples of `size_multiple`, at least `minimum_size` and at most 32768; B is at most 1024. Both
`size_multiple` and `minimum_size` stand in the file. The program does not pad images: that is the caller's task.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gmflow.errors import GMFlowError
from gmflow.execution import prepared_for
from gmflow.model import GMFlow
from gmflow.predict import evaluating
from gmflow.weights import CONFIG_KEY, replace_file

ONNX_OPSET = 20

_LARGEST_BATCH = 1024
_LARGEST_SIDE = 1 << 15


class _ImagesToFlow(nn.Module):
    """The model's forward pass with a tensor as its result."""

    def __init__(self, model: GMFlow) -> None:
        super().__init__()
        self.model = model

    def forward(self, image0: Tensor, image1: Tensor) -> Tensor:
        flow: Tensor = self.model(image0, image1).flow
        return flow


def minimum_size(model: GMFlow) -> int:
    """The smallest height and width an exported program takes: its windows must have at least two features a side.

    Windows of a single feature would trace to a different graph.
    """
    config = model.config
    needed = max(2 * stride * splits for stride, splits in zip(config.strides, config.attn_splits, strict=True))
    return -(-needed // model.size_multiple) * model.size_multiple


@dataclass(frozen=True)
class ExportedModel:
    """A model's graph, for every batch and every image size from `minimum_size` on, ready to be written.

    Attributes:
        program: (image0, image1) → flow.
        facts: configuration, size multiple and minimum size, as they stand in the files.
    """

    program: torch.export.ExportedProgram
    facts: dict[str, str]

    def save_program(self, path: str | Path) -> None:
        """Write a `.pt2` for `torch.export.load`; a file of that name is replaced whole or not at all.

        Raises:
            GMFlowError: `path` does not end in `.pt2`, or its folder does not exist.
        """
        path = _checked(path, ".pt2")
        content = io.BytesIO()
        torch.export.save(self.program, content, extra_files=self.facts)
        replace_file(path, lambda beside: Path(beside).write_bytes(content.getvalue()))

    def save_onnx(self, path: str | Path) -> None:
        """Write an `.onnx`; a file of that name is replaced whole or not at all. Takes a minute or more.

        Raises:
            GMFlowError: `path` does not end in `.onnx`, its folder does not exist, or `onnxscript` is not installed.
        """
        path = _checked(path, ".onnx")
        check_onnx(path)
        with _quiet():
            try:
                converted = torch.onnx.export(
                    self.program,
                    dynamo=True,
                    input_names=["image0", "image1"],
                    output_names=["flow"],
                    opset_version=ONNX_OPSET,
                    verbose=False,
                )
            except ImportError as error:
                raise _no_onnx(path) from error
        if converted is None:
            raise RuntimeError("torch.onnx.export returned no program")
        converted.model.metadata_props.update(self.facts)
        replace_file(path, lambda beside: converted.save(beside, external_data=False))


def export_model(model: GMFlow) -> ExportedModel:
    """Trace a forward pass on the model's device.

    Args:
        model: freshly built or loaded, not prepared by `gmflow.execution.prepare_model`.

    Returns:
        The program is tied to the model's device. Attention is PyTorch's fused operation, so on a CPU its flow differs
        slightly from the model's (docs/inference.md).

    Raises:
        GMFlowError: the model was prepared.
    """
    if prepared_for(model) is not None:
        raise GMFlowError("a model that was prepared cannot be exported; build or load it afresh")
    multiple, smallest = model.size_multiple, minimum_size(model)
    device = next(model.parameters()).device
    example = torch.zeros(2, 3, smallest + multiple, smallest + 2 * multiple, device=device)
    sizes = {
        0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH),
        2: multiple * torch.export.Dim("height", min=smallest // multiple, max=_LARGEST_SIDE // multiple),
        3: multiple * torch.export.Dim("width", min=smallest // multiple, max=_LARGEST_SIDE // multiple),
    }
    with torch.no_grad(), evaluating(model):
        program = torch.export.export(
            _ImagesToFlow(model).eval(), (example, example.clone()), dynamic_shapes=(sizes, sizes), strict=False
        )
    return ExportedModel(program, _facts(model))


def _facts(model: GMFlow) -> dict[str, str]:
    return {
        CONFIG_KEY: json.dumps(model.config.to_dict()),
        "size_multiple": str(model.size_multiple),
        "minimum_size": str(minimum_size(model)),
    }


def _checked(path: str | Path, suffix: str) -> Path:
    path = Path(path)
    if path.suffix != suffix:
        raise GMFlowError(f"{path}: this format is saved as {suffix}")
    if not path.parent.is_dir():
        raise GMFlowError(f"{path}: the folder {path.parent} does not exist")
    return path


def check_onnx(path: str | Path) -> None:
    """Raise GMFlowError if `onnx` or `onnxscript` is missing, before minutes are spent on tracing."""
    if any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxscript")):
        raise _no_onnx(path)


def _no_onnx(path: str | Path) -> GMFlowError:
    return GMFlowError(f"{path}: ONNX needs onnx and onnxscript: pip install 'gmflow-ray[export]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter: it reports operators it does not know (torchvision's), its progress, and guessed types."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
