"""Videos within what MPEG-4 holds."""

import resource
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest

from gmflow import Prediction
from pipelines.errors import PipelineError
from pipelines.flow_files import Result
from pipelines.frames import Pair
from pipelines.side_by_side import SideBySideVideo


def written(path: Path, rate: float, height: int, width: int, *, with_truth: bool = False) -> cv2.VideoCapture:
    frame = np.full((height, width, 3), 90, np.uint8)
    result = Result(Pair("frame", frame, frame), Prediction(np.ones((height, width, 2), np.float32)))
    with SideBySideVideo(path, rate, with_truth=with_truth) as video:
        for _ in range(2):
            video.add(result)
    found = cv2.VideoCapture(str(path))
    assert found.get(cv2.CAP_PROP_FRAME_COUNT) == 2
    assert found.read()[0]
    return found


@pytest.mark.parametrize(
    ("rate", "nearest"),
    [
        *[(whole * 1000 / 1001, round(whole * 1000 / 1001, 3)) for whole in (24, 30, 60)],
        (120_000 / 1001, 119.88),
        (66.1234, 66.12),
        (65.5354, 65.54),
        (999.99, 1000),
        (240, 240),
        (0.5, 0.5),
    ],
)
def test_a_rate_is_the_nearest_that_the_format_holds(tmp_path: Path, rate: float, nearest: float):
    assert written(tmp_path / "v.mp4", rate, 32, 32).get(cv2.CAP_PROP_FPS) == pytest.approx(nearest, abs=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "with_truth", "size"),
    [
        (33, 47, False, (46, 94)),  # with a title of 14 rows
        (50, 4095, False, (64, 8190)),
        (50, 4096, False, (62, 8190)),
        (50, 8190, False, (32, 8190)),
        (4110, 8, True, (8190, 14)),
    ],
)
def test_pictures_have_even_sides_and_are_shrunk_where_they_are_too_large(
    tmp_path: Path, height: int, width: int, with_truth: bool, size: tuple[int, int]
):
    found = written(tmp_path / "v.mp4", 10, height, width, with_truth=with_truth)
    assert (found.get(cv2.CAP_PROP_FRAME_HEIGHT), found.get(cv2.CAP_PROP_FRAME_WIDTH)) == size


def test_a_video_that_was_not_written_whole_says_so(tmp_path: Path):
    """OpenCV tells nobody of a full disk. A limit on the size of files stands in for one."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    result = Result(Pair("frame", noise, noise), Prediction(np.ones((128, 128, 2), np.float32)))

    def write() -> None:
        with SideBySideVideo(tmp_path / "v.mp4", 10, with_truth=False) as video:
            for _ in range(40):
                video.add(result)

    write()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(PipelineError, match=r"v\.mp4: \d+ of 40 pictures were written"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
