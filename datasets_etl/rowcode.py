"""The lossless encoding of frames and dense flow in a shard: fast to decode, and compact.

The row above is subtracted from each row, byte by byte for frames and as 32-bit integers for floats. In frames, green
is also subtracted from red and blue. Then the first bytes of all pixels are stored together, then all second bytes, and
so on, and zstd compresses the result. Sums and differences wrap around, so every value is restored to the bit, NaN and
infinity included. docs/data.md compares this encoding with others.
"""

import itertools

import cv2
import numpy as np
import numpy.typing as npt
import zstandard

FRAME_LEVEL = 9
FLOW_LEVEL = 6


def encode_frame(image: npt.NDArray[np.uint8], level: int = FRAME_LEVEL) -> bytes:
    """uint8 [H, W, 3], RGB → bytes."""
    rows = image.copy()
    rows[1:] -= image[:-1]
    red, green, blue = np.ascontiguousarray(rows.transpose(2, 0, 1))  # [H, W] each
    red -= green
    blue -= green
    return _compress([red, green, blue], level)


def decode_frame(data: bytes, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """bytes → uint8 [H, W, 3], RGB; `shape` is (H, W). Raises ValueError if `data` is not such a frame."""
    red, green, blue = _decompress(data, (3, *shape))
    image: npt.NDArray[np.uint8] = cv2.merge([red + green, green, blue + green])
    _sum_rows(image.reshape(shape[0], -1))
    return image


def encode_flow(flow: npt.NDArray[np.float32], level: int = FLOW_LEVEL) -> bytes:
    """float32 [H, W, 2] → bytes."""
    words = np.ascontiguousarray(flow, "<f4").view("<u4")  # [H, W, 2]
    rows = words.copy()
    rows[1:] -= words[:-1]
    return _compress([np.ascontiguousarray(rows.view(np.uint8).reshape(-1, 8).T)], level)


def decode_flow(data: bytes, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """bytes → float32 [H, W, 2]; `shape` is (H, W). Raises ValueError if `data` is not such a flow."""
    pixels = cv2.merge(list(_decompress(data, (8, *shape))))  # [H, W, 8]
    words = pixels.view("<u4").reshape(shape[0], -1)  # [H, W * 2]
    _sum_rows(words)
    return words.view("<f4").reshape(*shape, 2).astype(np.float32, copy=False)


def _sum_rows(rows: npt.NDArray[np.uint8] | npt.NDArray[np.uint32]) -> None:
    for above, row in itertools.pairwise(rows):
        np.add(row, above, out=row)


def _compress(planes: list[npt.NDArray[np.uint8]], level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(b"".join(plane.tobytes() for plane in planes))


def _decompress(data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    size = int(np.prod(shape))
    try:
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return np.frombuffer(plain, np.uint8).reshape(shape)
