"""Pictures of a prediction beside the truth."""

import cv2
import numpy as np
import numpy.typing as npt

from gmflow import flow_to_image
from pipelines.training.validation import Scored


def comparison_png(scored: Scored) -> bytes:
    """Two rows: both frames; true and predicted flow, coloured on the truth's scale. Returns a PNG."""
    sample = scored.sample
    if sample.flow is None or sample.valid is None:
        raise ValueError(f"{sample.key} has no ground truth to compare with")
    truth, fastest = coloured_truth(sample.flow, sample.valid)
    predicted = flow_to_image(scored.flow.numpy().transpose(1, 2, 0), max_flow=fastest)
    top = np.hstack([titled(sample.image0, "frame 0"), titled(sample.image1, "frame 1")])
    bottom = np.hstack([titled(truth, "true flow"), titled(predicted, "predicted flow")])
    return to_png(np.vstack([top, bottom]))


def coloured_truth(flow: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.uint8], float]:
    """Flow [H, W, 2] on the scale of its fastest valid pixel, black where not valid [H, W].

    Returns uint8 [H, W, 3], RGB, and the scale in pixels, never zero.
    """
    fastest = float(np.hypot(flow[..., 0], flow[..., 1])[valid].max(initial=1e-6))
    picture = flow_to_image(flow, max_flow=fastest)
    picture[~valid] = 0
    return picture, fastest


def to_png(image: npt.NDArray[np.uint8]) -> bytes:
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"no PNG of shape {image.shape}")
    return data.tobytes()


def titled(image: npt.NDArray[np.uint8], title: str) -> npt.NDArray[np.uint8]:
    bar = np.zeros((14, image.shape[1], 3), np.uint8)
    cv2.putText(bar, title, (3, 11), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
    return np.vstack([bar, image])
