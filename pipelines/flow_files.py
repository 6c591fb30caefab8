"""The formats in which a prediction is written: files for programs, and pictures for people."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datasets_etl import formats
from datasets_etl.formats import encode_frame_png
from datasets_etl.samples import dense_valid
from gmflow import Prediction, error_to_image, flow_to_image
from gmflow.drawing import draw_arrows, encode_animation, warp_animation
from pipelines.errors import PipelineError
from pipelines.frames import Pair

TRUTH_SUFFIXES = (".flo", ".pfm", ".png")

_KITTI_LARGEST = 511.98  # pixels: the largest flow that KITTI's 16 bits hold


@dataclass(frozen=True)
class Truth:
    """Ground truth of a pair: flow [H, W, 2], pixels, and where it is valid, bool [H, W]."""

    flow: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Result:
    """A predicted pair, with its ground truth if there is one.

    `scale` is the speed in pixels that is drawn with full saturation; None for that of the fastest pixel.
    """

    pair: Pair
    prediction: Prediction
    truth: Truth | None = None
    scale: float | None = None


@dataclass(frozen=True)
class FlowFormat:
    """The suffix after the pair's name, how a result is encoded, and whether that needs both flows or the truth."""

    suffix: str
    encode: Callable[[Result], bytes]
    both_ways: bool = False
    truth: bool = False


def require_finite(name: str, flow: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The flow of the pair of that name. Raises PipelineError if it is not finite somewhere."""
    if not np.isfinite(flow).all():
        raise PipelineError(
            f"pair {name}: the predicted flow is not finite, which no benchmark takes; try --precision fp32, or "
            "another model"
        )
    return flow


def encode_kitti(flow: npt.NDArray[np.float32]) -> bytes:
    """Finite flow at every pixel as KITTI's 16-bit PNG. Values that it cannot hold become the nearest it can."""
    return formats.encode_kitti_flow(np.clip(flow, -512, _KITTI_LARGEST), np.ones(flow.shape[:2], np.bool_))


def _npz(result: Result) -> bytes:
    arrays = {name: array for name, array in vars(result.prediction).items() if array is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _warp(result: Result) -> bytes:
    return encode_animation(warp_animation(result.pair.frame1, result.prediction.flow))


def no_truth(name: str) -> PipelineError:
    """The error to raise if an error map is wanted of a pair without ground truth."""
    return PipelineError(f"frame {name} has no ground truth in --truth: no error map of it")


def _error(result: Result) -> bytes:
    if result.truth is None:
        raise no_truth(result.pair.name)
    return encode_frame_png(error_to_image(result.prediction.flow, result.truth.flow, result.truth.valid))


def _backward(result: Result) -> npt.NDArray[np.float32]:
    if result.prediction.backward_flow is None:
        raise ValueError(f"{result.pair.name} was not predicted both ways")
    return result.prediction.backward_flow


def _occluded(result: Result) -> npt.NDArray[np.bool_]:
    if result.prediction.occluded is None:
        raise ValueError(f"{result.pair.name} was not predicted both ways")
    return result.prediction.occluded


FLOW_FORMATS: dict[str, FlowFormat] = {
    "flo": FlowFormat(".flo", lambda result: formats.encode_flo(result.prediction.flow)),
    "color": FlowFormat(".png", lambda result: encode_frame_png(flow_to_image(result.prediction.flow, result.scale))),
    "kitti": FlowFormat("_kitti.png", lambda r: encode_kitti(require_finite(r.pair.name, r.prediction.flow))),
    "npz": FlowFormat(".npz", _npz),
    "arrows": FlowFormat("_arrows.png", lambda r: encode_frame_png(draw_arrows(r.pair.frame0, r.prediction.flow))),
    "warp": FlowFormat("_warp.webp", _warp),
    "error": FlowFormat("_error.png", _error, truth=True),
    "backward": FlowFormat("_backward.flo", lambda result: formats.encode_flo(_backward(result)), both_ways=True),
    "occlusion": FlowFormat("_occlusion.png", lambda r: formats.encode_mask(_occluded(r)), both_ways=True),
}
"""Name on the command line → format."""


def truth_file(folder: Path, name: str) -> Path | None:
    """`NAME.flo`, `NAME.pfm` or KITTI's `NAME.png` in a folder, the first that exists; None if none does."""
    paths = (folder / f"{name}{suffix}" for suffix in TRUTH_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def read_truth(folder: Path, name: str) -> Truth | None:
    """The content of the file that `truth_file` finds; None if it finds none.

    Raises DamagedError if the file is not what its suffix says.
    """
    path = truth_file(folder, name)
    if path is None:
        return None
    data = path.read_bytes()
    if path.suffix == ".png":
        return Truth(*formats.decode_kitti_flow(data, str(path)))
    decode = formats.decode_flo if path.suffix == ".flo" else formats.decode_pfm
    flow = decode(data, str(path))
    valid = dense_valid(flow)
    return Truth(np.where(valid[..., None], flow, 0).astype(np.float32), valid)
