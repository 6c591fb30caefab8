"""Each format of a prediction, beside what it is made of: which frame, which flow, which pixels of the truth."""

import cv2
import numpy as np
import pytest

from datasets_etl import formats
from gmflow import Prediction, error_to_image
from gmflow.drawing import draw_arrows
from pipelines.errors import PipelineError
from pipelines.flow_files import FLOW_FORMATS, Result, Truth, read_truth
from pipelines.frames import Pair

RANDOM = np.random.default_rng(0)
FRAME0, FRAME1 = (  # smooth, because one format is lossy
    cv2.resize(RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
    for _ in "01"
)
FLOW, BACKWARD, TRUE = RANDOM.normal(0, 6, (3, 48, 64, 2)).astype(np.float32)
OCCLUDED, VALID = RANDOM.integers(0, 2, (2, 48, 64)).astype(bool)


def result(flow: np.ndarray = FLOW) -> Result:
    return Result(Pair("a", FRAME0, FRAME1), Prediction(flow, BACKWARD, OCCLUDED, ~OCCLUDED), Truth(TRUE, VALID))


def encoded(name: str, flow: np.ndarray = FLOW) -> bytes:
    return FLOW_FORMATS[name].encode(result(flow))


def picture(data: bytes) -> np.ndarray:
    return formats.decode_frame(data, "x")


def test_arrows_are_drawn_on_the_frame_that_they_start_in():
    np.testing.assert_array_equal(picture(encoded("arrows")), draw_arrows(FRAME0, FLOW))


def test_the_second_frame_is_pulled_back_along_the_flow():
    read, animation = cv2.imdecodeanimation(np.frombuffer(encoded("warp", np.full_like(FLOW, 2.0)), np.uint8))
    assert read
    moved, still = (cv2.cvtColor(animation.frames[n][..., :3], cv2.COLOR_BGR2RGB).astype(int) for n in (0, 12))
    assert np.abs(still - FRAME1).mean() < np.abs(still - FRAME0).mean() / 2
    assert np.abs(moved[:-2, :-2] - FRAME1[2:, 2:]).mean() < np.abs(moved - FRAME0).mean() / 2


def test_errors_are_drawn_where_the_truth_is_valid():
    np.testing.assert_array_equal(picture(encoded("error")), error_to_image(FLOW, TRUE, VALID))


def test_backward_flow_and_occlusion_are_those_of_the_first_frame():
    np.testing.assert_array_equal(formats.decode_flo(encoded("backward"), "x"), BACKWARD)
    np.testing.assert_array_equal(formats.decode_mask(encoded("occlusion"), "x"), OCCLUDED)


def test_kittis_format_holds_the_nearest_it_can():
    far = np.zeros_like(FLOW)
    far[0, 0], far[0, 1] = (600, -600), (511.984375, -512)
    flow, valid = formats.decode_kitti_flow(encoded("kitti", far), "x")
    assert valid.all()
    assert flow[0, 0].tolist() == flow[0, 1].tolist() == [511.984375, -512]
    far[3, 4, 1] = np.nan
    with pytest.raises(PipelineError, match="pair a: the predicted flow is not finite"):
        encoded("kitti", far)


def test_a_pair_without_truth_has_no_error_map():
    without = Result(Pair("a", FRAME0, FRAME1), Prediction(FLOW))
    with pytest.raises(PipelineError, match="frame a has no ground truth"):
        FLOW_FORMATS["error"].encode(without)


def test_truth_that_is_unknown_does_not_count(tmp_path):
    flow = np.zeros((2, 3, 2), np.float32)
    flow[0, 0] = 1000, 0  # from there on, as everywhere else
    flow[1, 2] = 4, -2
    (tmp_path / "a.flo").write_bytes(formats.encode_flo(flow))
    (tmp_path / "b.png").write_bytes(formats.encode_kitti_flow(flow * 0 + 1, np.eye(2, 3, dtype=np.bool_)))
    truth = read_truth(tmp_path, "a")
    np.testing.assert_array_equal(truth.valid, [[False, True, True], [True, True, True]])
    assert truth.flow[0, 0].tolist() == [0, 0]
    assert truth.flow[1, 2].tolist() == [4, -2]
    np.testing.assert_array_equal(read_truth(tmp_path, "b").valid, np.eye(2, 3, dtype=bool))
    assert read_truth(tmp_path, "c") is None
