"""Flow for images of any size: padded as the benchmarks do it, computed, cropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow.errors import GMFlowError
from gmflow.execution import Precision, autocast
from gmflow.model import FlowOutput, GMFlow

PaddingMode = Literal["sintel", "kitti"]


class Padding:
    """How many pixels to repeat at each border so that an image divides evenly.

    Args:
        height: of the images, pixels.
        width: of the images, pixels.
        multiple: what the padded height and width are divisible by.
        mode: "sintel" splits the rows and columns to add evenly (the extra one at the bottom and right); "kitti" adds
            all rows at the bottom.

    Raises:
        GMFlowError: an unknown mode.
    """

    def __init__(self, height: int, width: int, multiple: int, mode: PaddingMode = "sintel") -> None:
        if mode not in get_args(PaddingMode):
            raise GMFlowError(f"padding must be one of {', '.join(get_args(PaddingMode))}, not {mode!r}")
        rows, columns = -height % multiple, -width % multiple
        self.top = rows // 2 if mode == "sintel" else 0
        self.bottom = rows - self.top
        self.left = columns // 2
        self.right = columns - self.left
        self.height, self.width = height, width

    def pad(self, images: Tensor) -> Tensor:
        """`[B, C, height, width]` → `[B, C, padded height, padded width]`, borders repeated."""
        borders = (self.left, self.right, self.top, self.bottom)
        return F.pad(images, borders, mode="replicate") if any(borders) else images

    def crop(self, images: Tensor) -> Tensor:
        """The inverse of `pad`, on anything of the padded size."""
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]


def padded_forward(
    model: GMFlow, image0: Tensor, image1: Tensor, *, padding: PaddingMode = "sintel", bidirectional: bool = False
) -> FlowOutput:
    """`model(image0, image1)` for images `[B, 3, H, W]` (0..255) of any size: padded, computed, cropped.

    Raises:
        GMFlowError: images of no or different extent, or an unknown padding.
    """
    if image0.dim() != 4 or 0 in image0.shape or image0.shape != image1.shape:
        raise GMFlowError(
            f"images must be two non-empty batches [B, 3, H, W], not {list(image0.shape)} and {list(image1.shape)}"
        )
    frame = Padding(image0.shape[2], image0.shape[3], model.size_multiple, padding)
    out: FlowOutput = model(frame.pad(image0), frame.pad(image1), bidirectional=bidirectional)
    backward = None if out.backward_flow is None else frame.crop(out.backward_flow)
    return FlowOutput(frame.crop(out.flow), backward, tuple(frame.crop(flow) for flow in out.predictions))


def padded_flow(model: GMFlow, image0: Tensor, image1: Tensor, *, padding: PaddingMode = "sintel") -> Tensor:
    """Flow `[B, 2, H, W]` in pixels for images `[B, 3, H, W]` (0..255) of any size; raises as `padded_forward`."""
    return padded_forward(model, image0, image1, padding=padding).flow


def predict_flow(
    model: GMFlow,
    frame0: npt.NDArray[np.uint8],
    frame1: npt.NDArray[np.uint8],
    *,
    padding: PaddingMode = "sintel",
    precision: Precision = "fp32",
) -> npt.NDArray[np.float32]:
    """Flow between two frames, on the model's device.

    Args:
        model: in whatever mode; it is evaluated and left as it was.
        frame0: RGB, uint8 `[H, W, 3]`, of any size.
        frame1: RGB, uint8 `[H, W, 3]`, the same size.
        padding: "sintel" or "kitti", see `Padding`.
        precision: "fp32", "bf16" or "fp16", see `gmflow.execution`.

    Returns:
        float32 `[H, W, 2]`, pixels: pixel (x, y) of frame 0 is at (x, y) + flow[y, x] in frame 1.

    Raises:
        GMFlowError: frames that are no RGB images or differ in size, an unknown padding or precision.
    """
    device = next(model.parameters()).device
    image0, image1 = (_image(name, frame).to(device) for name, frame in (("frame0", frame0), ("frame1", frame1)))
    with torch.inference_mode(), evaluating(model), autocast(device, precision):
        flow = padded_flow(model, image0, image1, padding=padding)
    result: npt.NDArray[np.float32] = flow[0].permute(1, 2, 0).contiguous().cpu().numpy()
    return result


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the mode it was in after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _image(name: str, frame: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 `[H, W, 3]` → float `[1, 3, H, W]`."""
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        what = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise GMFlowError(f"{name} must be an RGB image, uint8 [H, W, 3], not {what}")
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).unsqueeze(0).float()
