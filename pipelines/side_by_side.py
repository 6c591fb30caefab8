"""A video of frames beside their flow, and of truth and error below them if there is ground truth."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt

from gmflow import error_to_image, flow_to_image
from gmflow.visualize import known_flow
from pipelines.errors import PipelineError
from pipelines.flow_files import Result
from pipelines.training.pictures import titled

_CODEC = "mp4v"  # in every build of OpenCV
# The limits of MPEG-4: sides are even and have at most 13 bits; a rate's numerator has at most 16 bits.
_LONGEST_SIDE = 8190
_LARGEST_NUMERATOR = 65535


class SideBySideVideo:
    """Writes an MP4, picture by picture, to a local file.

    Pictures too large for MPEG-4 are shrunk. The rate, below 1000 frames per second, becomes the nearest it can hold.

    Raises:
        PipelineError: on entering, if OpenCV cannot write such videos here; on leaving, if not all pictures were
            written.
    """

    def __init__(self, path: Path, rate: float, *, with_truth: bool) -> None:
        self.path = path
        self.with_truth = with_truth
        self.rate = _nearest_rate(rate)
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._added = 0
        self._scale: float | None = None

    def __enter__(self) -> Self:
        self._opened((16, 16)).release()  # fails before anything is computed that cannot be written
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if error is None:
            self._require_whole()

    def _require_whole(self) -> None:
        """Count what was written, because OpenCV reports no error if the disk is full."""
        written = max(0, int(cv2.VideoCapture(str(self.path)).get(cv2.CAP_PROP_FRAME_COUNT)))
        if written != self._added:
            raise PipelineError(
                f"{self.path}: {written} of {self._added} pictures were written; is {tempfile.gettempdir()} "
                "full? TMPDIR names another"
            )

    def add(self, result: Result) -> None:
        """Add the next pair. The first sets the colour scale: its own, or 1.25 times its 99th percentile of speed."""
        if self._scale is None:
            flow = result.prediction.flow
            speed = np.hypot(*flow[known_flow(flow)].T)
            self._scale = result.scale or max(1.25 * float(np.percentile(speed, 99)) if speed.size else 0.0, 1.0)
        picture = _fitted(_panels(result, self._scale, with_truth=self.with_truth))
        height, width = picture.shape[:2]
        writer = self._writer = self._writer or self._opened((width, height))
        if (width, height) != self._size:
            raise PipelineError(
                f"{result.pair.name}: a picture of {width}x{height} in a video of {self._size[0]}x{self._size[1]}; "
                "the frames of a video must have one size"
            )
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        self._added += 1

    def _opened(self, size: tuple[int, int]) -> cv2.VideoWriter:
        self._size = size
        writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*_CODEC), self.rate, size)
        if not writer.isOpened():
            raise PipelineError(f"{self.path}: OpenCV here cannot write {_CODEC} video at {self.rate} frames/s")
        return writer


def _panels(result: Result, scale: float, *, with_truth: bool) -> npt.NDArray[np.uint8]:
    """Frame and flow; below them, if asked for, truth and error, which are black for a pair without truth."""
    flow = titled(flow_to_image(result.prediction.flow, scale), "flow")
    top = np.hstack([titled(result.pair.frame0, result.pair.name), flow])
    if not with_truth:
        return top
    truth = error = np.zeros_like(result.pair.frame0)
    if result.truth is not None:
        truth = flow_to_image(result.truth.flow, scale)
        truth[~result.truth.valid] = 0
        error = error_to_image(result.prediction.flow, result.truth.flow, result.truth.valid)
    return np.vstack([top, np.hstack([titled(truth, "truth"), titled(error, "error")])])


def _nearest_rate(rate: float) -> float:
    """The nearest rate that OpenCV can write: a whole number over 1, 10, 100 or 1000."""
    decimals = next(n for n in (3, 2, 1) if rate * 10**n <= _LARGEST_NUMERATOR)
    return round(rate, decimals)


def _fitted(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The picture with even sides that MPEG-4 can hold."""
    scale = min(1.0, _LONGEST_SIDE / max(picture.shape))
    height, width = (int(side * scale) // 2 * 2 for side in picture.shape[:2])
    if scale == 1:
        return picture[:height, :width]
    shrunk: npt.NDArray[np.uint8] = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return shrunk
