"""Flow for images of any size: they are padded as the benchmarks do it, and the flow is cropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow.errors import GMFlowError
from gmflow.execution import Precision, autocast, runs_in
from gmflow.geometry import forward_backward_occlusion
from gmflow.model import FlowOutput, GMFlow
from gmflow.tiling import Tiling, tiled_flow

PaddingMode = Literal["sintel", "kitti"]


class Padding:
    """How many pixels to repeat at each border so that an image divides evenly.

    Args:
        height: height of the images, pixels.
        width: width of the images, pixels.
        multiple: number that the padded height and width must be divisible by.
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
    _check_images(image0, image1)
    frame = Padding(image0.shape[2], image0.shape[3], model.size_multiple, padding)
    out: FlowOutput = model(frame.pad(image0), frame.pad(image1), bidirectional=bidirectional)
    backward = None if out.backward_flow is None else frame.crop(out.backward_flow)
    return FlowOutput(frame.crop(out.flow), backward, tuple(frame.crop(flow) for flow in out.predictions))


def padded_flow(model: GMFlow, image0: Tensor, image1: Tensor, *, padding: PaddingMode = "sintel") -> Tensor:
    """Flow `[B, 2, H, W]` in pixels for images `[B, 3, H, W]` (0..255) of any size; raises as `padded_forward`."""
    return padded_forward(model, image0, image1, padding=padding).flow


@dataclass(frozen=True)
class Prediction:
    """Flow of one pair, in arrays.

    Attributes:
        flow: float32 `[H, W, 2]`, pixels: pixel (x, y) of frame 0 is at (x, y) + flow[y, x] in frame 1.
        backward_flow: the same from frame 1 to frame 0; None unless asked for, as are the masks.
        occluded: bool `[H, W]`, pixels of frame 0 whose flow the backward flow does not undo: hidden in frame 1.
        backward_occluded: the same for frame 1.
    """

    flow: npt.NDArray[np.float32]
    backward_flow: npt.NDArray[np.float32] | None = None
    occluded: npt.NDArray[np.bool_] | None = None
    backward_occluded: npt.NDArray[np.bool_] | None = None


def predict_flow(
    model: GMFlow,
    frame0: npt.NDArray[np.uint8],
    frame1: npt.NDArray[np.uint8],
    *,
    padding: PaddingMode = "sintel",
    precision: Precision | None = None,
    tiling: Tiling | None = None,
) -> npt.NDArray[np.float32]:
    """Flow between two frames, on the model's device.

    Args:
        model: in training or evaluation mode; it runs in evaluation mode and is then set back. Set it to evaluation
            mode beforehand where several threads use it: one might set it back while another computes.
        frame0: RGB, uint8 `[H, W, 3]`, of any size.
        frame1: RGB, uint8 `[H, W, 3]`, the same size.
        padding: "sintel" or "kitti", see `Padding`.
        precision: of a model that `gmflow.execution.prepare_model` has not prepared, "fp32" (also if left out), "bf16"
            or "fp16". A prepared model runs as it was prepared, and another precision is refused. On an NVIDIA GPU, the
            "fp32" of an unprepared model rounds as PyTorch is set: by default it rounds the factors of convolutions to
            10 bits.
        tiling: cut frames that are larger than a tile, see `gmflow.tiling`.

    Returns:
        float32 `[H, W, 2]`, pixels: pixel (x, y) of frame 0 is at (x, y) + flow[y, x] in frame 1.

    Raises:
        GMFlowError: frames that are no RGB images or differ in size, an unknown padding or precision, or a precision
            that this model does not run in.
    """
    (prediction,) = predict_batch(model, [(frame0, frame1)], padding=padding, precision=precision, tiling=tiling)
    return prediction.flow


def predict_batch(
    model: GMFlow,
    pairs: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]],
    *,
    padding: PaddingMode = "sintel",
    precision: Precision | None = None,
    bidirectional: bool = False,
    tiling: Tiling | None = None,
) -> list[Prediction]:
    """Flow of several pairs of one size at once; other arguments and errors as of `predict_flow`.

    Args:
        pairs: (frame 0, frame 1), all of one size; may be empty.
        bidirectional: also compute the flow from frame 1 to frame 0, and the occlusion masks of both frames.
    """
    precision = runs_in(model, precision)
    if not pairs:
        return []
    device = next(model.parameters()).device
    firsts = [_image("frame0", frame) for frame, _ in pairs]
    seconds = [_image("frame1", frame) for _, frame in pairs]
    if len({image.shape for image in (*firsts, *seconds)}) > 1:
        sizes = ", ".join(dict.fromkeys("x".join(map(str, image.shape[2:])) for image in (*firsts, *seconds)))
        raise GMFlowError(f"frames of a batch must have one size, not {sizes} (height x width)")
    image0, image1 = torch.cat(firsts), torch.cat(seconds)  # [B, 3, H, W]
    _check_images(image0, image1)
    with torch.inference_mode(), evaluating(model), autocast(device, precision):
        if tiling is not None and not tiling.covers(*image0.shape[2:]):
            flow = _in_tiles(model, image0, image1, padding, tiling)
            backward = _in_tiles(model, image1, image0, padding, tiling) if bidirectional else None
        else:
            images = (image0.to(device), image1.to(device))
            out = padded_forward(model, *images, padding=padding, bidirectional=bidirectional)
            flow, backward = out.flow.float(), None if out.backward_flow is None else out.backward_flow.float()
        if backward is None:
            return [Prediction(array) for array in _flow_arrays(flow)]
        masks = forward_backward_occlusion(flow, backward)
    columns = (_flow_arrays(flow), _flow_arrays(backward), *(list(mask.cpu().numpy()) for mask in masks))
    return [Prediction(*row) for row in zip(*columns, strict=True)]


def _in_tiles(model: GMFlow, image0: Tensor, image1: Tensor, padding: PaddingMode, tiling: Tiling) -> Tensor:
    """Flow `[B, 2, H, W]`, float32 on the CPU. One pair after the other: who needs tiles has no memory for batches."""
    device = next(model.parameters()).device

    def compute(one: Tensor, other: Tensor) -> Tensor:
        return padded_flow(model, one.to(device), other.to(device), padding=padding).float().cpu()

    pairs = zip(image0.unsqueeze(1), image1.unsqueeze(1), strict=True)
    return torch.cat([tiled_flow(compute, one, other, tiling) for one, other in pairs])


def _flow_arrays(flow: Tensor) -> list[npt.NDArray[np.float32]]:
    """`[B, 2, H, W]` → B arrays `[H, W, 2]`."""
    return list(flow.permute(0, 2, 3, 1).contiguous().cpu().numpy())


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it, every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_images(image0: Tensor, image1: Tensor) -> None:
    if image0.dim() != 4 or 0 in image0.shape or image0.shape != image1.shape:
        raise GMFlowError(
            f"images must be two non-empty batches [B, 3, H, W], not {list(image0.shape)} and {list(image1.shape)}"
        )


def _image(name: str, frame: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 `[H, W, 3]` → float `[1, 3, H, W]`."""
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        what = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise GMFlowError(f"{name} must be an RGB image, uint8 [H, W, 3], not {what}")
    # A copy, because PyTorch warns of arrays that are read-only.
    return torch.from_numpy(np.array(frame, np.float32, order="C")).permute(2, 0, 1).unsqueeze(0)
