"""The registered model as MLflow loads it: code and safetensors, no pickle (MLflow's "models from code").

Of this project it may import only `gmflow`, which is all that `code_paths` ships with the model.
"""

import base64
import binascii
import struct
from typing import Any

import cv2
import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext  # type: ignore[attr-defined]  # public, though not listed

from gmflow import load_model, predict_flow

_PNG_MAGIC, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_JPEG_MAGIC, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"


class GMFlowPyfunc(PythonModel):
    """Computes flow from image pairs."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights, onto an NVIDIA GPU if there is one, or to where `model_config={"device": …}` says."""
        device = context.model_config["device"]
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(context.artifacts["weights"]).to(device)

    # Of this type hint MLflow makes no schema, which could not express arrays: the signature states the input. Without
    # any hint MLflow warns whoever loads the model.
    def predict(
        self, context: PythonModelContext | None, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[Any]:
        """One flow for each pair.

        Args:
            context: given by MLflow; not used.
            model_input: rows with `image0` and `image1`: a list of dicts, or a DataFrame. An image is RGB, uint8
                [H, W, 3] as array or nested lists, or a PNG or JPEG file as bytes or in base64.
                Pairs may differ in size.
            params: {"encoding": "array"} for float32 [H, W, 2], pixels; {"encoding": "flo"} for a Middlebury .flo file
                in base64, which is much smaller than an array over HTTP.

        Raises:
            MlflowException: unknown encoding, or a row is not a pair of images of the same size.
        """
        encoding = (params or {}).get("encoding", "array")
        if encoding not in ("array", "flo"):
            raise MlflowException.invalid_parameter_value(f"encoding must be array or flo, not {encoding!r}")
        rows = model_input if isinstance(model_input, list) else model_input.to_dict("records")
        flows = [self._flow(number, row) for number, row in enumerate(rows)]
        return [_flo(flow) for flow in flows] if encoding == "flo" else flows

    def _flow(self, number: int, row: dict[str, Any]) -> npt.NDArray[np.float32]:
        try:
            return predict_flow(self.model, _image(row["image0"]), _image(row["image1"]))
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(f"pair {number}: {error}") from error


def _image(value: Any) -> npt.NDArray[np.uint8]:
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=False)
        except binascii.Error as error:
            raise ValueError(f"a text that is no base64 ({error})") from error
    if not isinstance(value, bytes | bytearray):
        array = np.asarray(value)
        if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
            array = array.astype(np.uint8)  # nested lists of JSON are int64
        return array  # predict_flow refuses anything that is not an RGB image
    _check_file(value)
    try:
        picture = cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        picture = None
    if picture is None:
        raise ValueError(f"{len(value)} bytes that are no PNG or JPEG image")
    image: npt.NDArray[np.uint8] = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    return image


def _check_file(data: bytes | bytearray) -> None:
    """Raises ValueError unless it is a complete JPEG, or PNG of at most 8 bits a channel.

    OpenCV would also read other formats, round 16 bits to 8, and fill in the missing part of a truncated file.
    """
    is_png = data.startswith(_PNG_MAGIC)
    if not is_png and not data.startswith(_JPEG_MAGIC):
        raise ValueError(f"{len(data)} bytes that are no PNG or JPEG image")
    if is_png and data[24:25] == b"\x10":
        raise ValueError("a PNG of 16 bits a channel; images have 8")
    if not (data.endswith(_PNG_END) if is_png else _JPEG_END in data):
        raise ValueError("a PNG or JPEG image without its end")


def _flo(flow: npt.NDArray[np.float32]) -> str:
    height, width = flow.shape[:2]
    return base64.b64encode(b"PIEH" + struct.pack("<ii", width, height) + flow.astype("<f4").tobytes()).decode()


mlflow.models.set_model(GMFlowPyfunc())
