"""What the tests of the commands share."""

from pathlib import Path

import cv2
import numpy as np

from gmflow import GMFlowConfig

TINY = GMFlowConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)


def write_video(path: Path, frames: int = 3, codec: str = "MJPG", rate: float = 10) -> None:
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, (64, 48))
    for frame in np.random.default_rng(0).integers(0, 256, (frames, 48, 64, 3), np.uint8):
        video.write(frame)
    video.release()


def assert_one_line(result: tuple[int, str, str], *fragments: str, code: int = 2) -> None:
    ended_with, out, err = result
    assert ended_with == code, err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert out == ""
    for fragment in fragments:
        assert fragment in lines[0]
