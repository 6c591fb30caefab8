"""The arrays that files become, and the checks that all formats share."""

import numpy as np
import numpy.typing as npt

from datasets_etl.errors import DamagedError

Flow = npt.NDArray[np.float32]
Frame = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

HEAD_BYTES = 512
"""No header is longer, but for JPEG's: `image_size` needs so many bytes from the beginning of a file."""

COPY_AGAIN = "copy or download the file again"

_MAX_SIDE = 32768  # no dataset comes near this; a damaged header may claim more and would exhaust the memory
_MAX_PIXELS = 2**27


def damaged(name: str, problem: str, remedy: str) -> DamagedError:
    """The error to raise for a file: `name` is its path, `problem` begins with a verb."""
    return DamagedError(f"{name} {problem}: {remedy}")


def not_empty(data: bytes, name: str) -> bytes:
    """Returns `data` unchanged. Raises DamagedError if it is empty: no format allows an empty file."""
    if not data:
        raise damaged(name, "is empty", COPY_AGAIN)
    return data


def checked_size(height: int, width: int, name: str) -> tuple[int, int]:
    """(height, width) as a header claims it. Raises DamagedError for a size that no file of a dataset has."""
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE and height * width <= _MAX_PIXELS):
        raise damaged(name, f"claims to be {width}×{height} pixels, so its header is damaged", COPY_AGAIN)
    return height, width


def expect_length(data: bytes, expected: int, name: str) -> None:
    """Raises DamagedError if a file has fewer or more bytes than its header promises."""
    if len(data) < expected:
        raise damaged(name, f"is truncated: {len(data)} of {expected} bytes", COPY_AGAIN)
    if len(data) > expected:
        raise damaged(name, f"has {len(data) - expected} bytes after its end", COPY_AGAIN)
