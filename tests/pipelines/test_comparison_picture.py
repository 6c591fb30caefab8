"""The picture of a validation: frames, truth, prediction and error in their places."""

import cv2
import numpy as np
import torch

from datasets_etl.synthetic import synthetic_pair
from gmflow import error_to_image
from gmflow.metrics import FlowMetrics
from pipelines.training.pictures import comparison_png
from pipelines.training.validation import Scored

BAR = 14  # rows of a title


def test_frames_flows_and_the_error_stand_in_their_places():
    sample = synthetic_pair(5, 64, 96)
    flow = torch.from_numpy(sample.flow.transpose(2, 0, 1).copy())  # [2, H, W]
    flow[0, :, 48:] += 10.0  # right on the left half, an outlier on the right half
    metrics = FlowMetrics()
    metrics.update(flow[None], torch.from_numpy(sample.flow.transpose(2, 0, 1))[None], torch.ones(1, 64, 96).bool())
    data = comparison_png(Scored(sample, flow, None, metrics, 0.1))
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]

    def panel(row: int, column: int) -> np.ndarray:
        top = row * (64 + BAR) + BAR
        return picture[top : top + 64, column * 96 : (column + 1) * 96]

    assert picture.shape == (3 * (64 + BAR), 2 * 96, 3)
    np.testing.assert_array_equal(panel(0, 0), sample.image0)
    np.testing.assert_array_equal(panel(0, 1), sample.image1)
    truth, predicted, error = panel(1, 0), panel(1, 1), panel(2, 0)
    np.testing.assert_array_equal(predicted[:, :48], truth[:, :48])
    assert (predicted[:, 48:] != truth[:, 48:]).any(axis=-1).mean() > 0.9
    np.testing.assert_array_equal(error, error_to_image(flow.numpy().transpose(1, 2, 0), sample.flow, sample.valid))
    blue, red = error[:, :48].reshape(-1, 3), error[:, 48:].reshape(-1, 3)
    assert (blue[:, 2] > blue[:, 0]).mean() > 0.9
    assert (red[:, 0] > red[:, 2]).mean() > 0.9
