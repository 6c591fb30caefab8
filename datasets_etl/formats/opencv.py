"""Pixels by OpenCV, which reports errors in ways of its own."""

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl.formats.checks import COPY_AGAIN, damaged


def decode_image(data: bytes, flags: int, name: str) -> npt.NDArray[np.uint8]:
    """cv2.imdecode, raising DamagedError where it raises its own error or returns None."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise damaged(name, "is an image that cannot be decoded", COPY_AGAIN)
    decoded: npt.NDArray[np.uint8] = pixels
    return decoded


def encode_image(extension: str, pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    """Pixels as OpenCV orders them (BGR) → a file of the kind that `extension` names, such as ".png"."""
    ok, encoded = cv2.imencode(extension, pixels)
    if not ok:
        raise RuntimeError(f"OpenCV could not write a {extension} image of {pixels.shape}")
    return bytes(encoded)
