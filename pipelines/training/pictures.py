"""Pictures of a prediction beside the ground truth."""

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl.formats import encode_frame_png
from gmflow import error_to_image, flow_to_image
from gmflow.visualize import KITTI_BANDS
from pipelines.training.validation import Scored


def comparison_png(scored: Scored) -> bytes:
    """A picture of three rows: both frames; true and predicted flow on the truth's scale; the error with a key to it.

    Returns a PNG.
    """
    sample = scored.sample
    if sample.flow is None or sample.valid is None:
        raise ValueError(f"{sample.key} has no ground truth to compare with")
    truth, fastest = coloured_truth(sample.flow, sample.valid)
    flow = scored.flow.numpy().transpose(1, 2, 0)  # [H, W, 2]
    rows = [
        [titled(sample.image0, "frame 0"), titled(sample.image1, "frame 1")],
        [titled(truth, "true flow"), titled(flow_to_image(flow, max_flow=fastest), "predicted flow")],
        [titled(error_to_image(flow, sample.flow, sample.valid), "error"), titled(_key(scored), "")],
    ]
    return encode_frame_png(np.vstack([np.hstack(row) for row in rows]))


def _key(scored: Scored) -> npt.NDArray[np.uint8]:
    """A panel with the error's metrics and the scale of its colours, uint8 [H, W, 3]."""
    figures = scored.metrics.compute()
    height, width = scored.sample.image0.shape[:2]
    panel = np.zeros((height, width, 3), np.uint8)
    _write(panel, f"EPE {figures['epe']:.2f} px", 12)
    _write(panel, f"F1 {figures['f1_all']:.1f} %", 26)
    band = width // len(KITTI_BANDS)
    for number, (_, colour) in enumerate(KITTI_BANDS):
        panel[34:44, number * band : (number + 1) * band] = colour
    _write(panel, "0", 55)
    outlier = next(number for number, (limit, _) in enumerate(KITTI_BANDS, start=1) if limit == 1)
    _write(panel, "3 px", 55, left=outlier * band - 12)
    return panel


def coloured_truth(flow: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.uint8], float]:
    """Flow [H, W, 2] coloured on the scale of its fastest valid pixel, and black where `valid` [H, W] is false.

    Returns uint8 [H, W, 3], RGB, and the scale in pixels, never zero.
    """
    fastest = float(np.hypot(flow[..., 0], flow[..., 1])[valid].max(initial=1e-6))
    picture = flow_to_image(flow, max_flow=fastest)
    picture[~valid] = 0
    return picture, fastest


def titled(image: npt.NDArray[np.uint8], title: str) -> npt.NDArray[np.uint8]:
    """The picture [H, W, 3] below a bar of 14 pixels with its title."""
    bar = np.zeros((14, image.shape[1], 3), np.uint8)
    _write(bar, title, 11)
    return np.vstack([bar, image])


def _write(image: npt.NDArray[np.uint8], text: str, baseline: int, left: int = 3) -> None:
    cv2.putText(image, text, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
