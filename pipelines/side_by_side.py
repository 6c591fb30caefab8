"""A video of frames beside their flow, and beside truth and error where there is truth."""

from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt

from gmflow import error_to_image, flow_to_image
from pipelines.errors import PipelineError
from pipelines.flow_files import Result
from pipelines.training.pictures import titled

_CODEC = "mp4v"  # in every build of OpenCV


class SideBySideVideo:
    """Writes an MP4, picture by picture, to a local file."""

    def __init__(self, path: Path, rate: float, *, with_truth: bool) -> None:
        self.path = path
        self.with_truth = with_truth
        self.rate = rate
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._scale: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.release()

    def add(self, result: Result) -> None:
        """The next pair. Without a scale of its own, the first pair's 99th percentile of speed sets the colours."""
        if self._scale is None:
            speed = np.hypot(*np.moveaxis(result.prediction.flow, 2, 0))
            self._scale = result.scale or max(1.25 * float(np.percentile(speed, 99)), 1.0)
        picture = _panels(result, self._scale, with_truth=self.with_truth)
        picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]  # codecs want even sides
        height, width = picture.shape[:2]
        writer = self._writer = self._writer or self._opened((width, height))
        if (width, height) != self._size:
            raise PipelineError(
                f"{result.pair.name}: a picture of {width}x{height} in a video of {self._size[0]}x{self._size[1]}; "
                "the frames of a video must have one size"
            )
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def _opened(self, size: tuple[int, int]) -> cv2.VideoWriter:
        self._size = size
        writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*_CODEC), self.rate, size)
        if not writer.isOpened():
            raise PipelineError(f"{self.path}: OpenCV here cannot write {_CODEC} video of {size[0]}x{size[1]}")
        return writer


def _panels(result: Result, scale: float, *, with_truth: bool) -> npt.NDArray[np.uint8]:
    """Frame and flow; below them, black where this pair has none, truth and error."""
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
