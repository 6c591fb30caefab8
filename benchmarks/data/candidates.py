"""Lossless encodings of frames and dense flow: what shards hold, and what it is compared with."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import zstandard
from PIL import Image

from datasets_etl import rowcode

Array = npt.NDArray[Any]  # uint8 frames, float32 flow


@dataclass(frozen=True)
class Code:
    """A candidate encoding: array → bytes, and (bytes, shape) → array."""

    encode: Callable[[Array], bytes]
    decode: Callable[[bytes, tuple[int, int]], Array]


def _png(level: int) -> Code:
    def encode(image: Array) -> bytes:
        return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, level])[
            1
        ].tobytes()

    return Code(encode, _decode_image)


def _webp(method: int, quality: int) -> Code:
    def encode(image: Array) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "WEBP", lossless=True, method=method, quality=quality, exact=True)
        return buffer.getvalue()

    return Code(encode, _decode_image)


def _decode_image(data: bytes, shape: tuple[int, int]) -> Array:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=rowcode.FLOW_LEVEL).compress(data)


def _unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def _byte_shuffled(flow: Array) -> bytes:
    return _zstd(np.ascontiguousarray(flow.view(np.uint8).reshape(-1, 4).T).tobytes())


def _byte_unshuffled(data: bytes, shape: tuple[int, int]) -> Array:
    planes = np.frombuffer(_unzstd(data), np.uint8).reshape(4, 1, -1)
    return cv2.merge(list(planes)).view(np.float32).reshape(*shape, 2)


def _bit_shuffled(flow: Array) -> bytes:
    bits = np.unpackbits(flow.view(np.uint8).reshape(-1, 4), axis=1)  # [values, 32]
    return _zstd(np.packbits(np.ascontiguousarray(bits.T)).tobytes())


def _bit_unshuffled(data: bytes, shape: tuple[int, int]) -> Array:
    bits = np.unpackbits(np.frombuffer(_unzstd(data), np.uint8)).reshape(32, -1)
    return np.packbits(np.ascontiguousarray(bits.T), axis=1).view(np.float32).reshape(*shape, 2)


def _plane_zigzag(flow: Array) -> bytes:
    """Subtracts the pixel above, then the one to the left, and folds the sign into the lowest bit."""
    words = flow.view(np.uint32)
    down = words.copy()
    down[1:] -= words[:-1]
    across = down.copy()
    across[:, 1:] -= down[:, :-1]
    signed = across.view(np.int32)
    folded = ((signed << 1) ^ (signed >> 31)).view(np.uint8)
    return _zstd(np.ascontiguousarray(folded.reshape(-1, 8).T).tobytes())


def _plane_unzigzag(data: bytes, shape: tuple[int, int]) -> Array:
    planes = np.frombuffer(_unzstd(data), np.uint8).reshape(8, *shape)
    folded = cv2.merge(list(planes)).view(np.uint32)  # [H, W, 2]
    across = (folded >> 1) ^ (np.uint32(0) - (folded & 1))
    np.add.accumulate(across, axis=1, dtype=np.uint32, out=across)
    for y in range(1, shape[0]):
        np.add(across[y], across[y - 1], out=across[y])
    return across.view(np.float32)


FRAME_CODES = {
    "raw": Code(lambda image: image.tobytes(), lambda data, shape: np.frombuffer(data, np.uint8).reshape(*shape, 3)),
    "PNG, level 1": _png(1),
    "PNG, level 6": _png(6),
    "lossless WebP, method 0": _webp(0, 0),
    "lossless WebP, method 2": _webp(2, 50),
    "lossless WebP, method 4": _webp(4, 75),
    "rows, zstd 3": Code(partial(rowcode.encode_frame, level=3), rowcode.decode_frame),
    f"rows, zstd {rowcode.FRAME_LEVEL} (stored)": Code(rowcode.encode_frame, rowcode.decode_frame),
    "rows, zstd 15": Code(partial(rowcode.encode_frame, level=15), rowcode.decode_frame),
}
FLOW_CODES = {
    "raw": Code(lambda flow: flow.tobytes(), lambda data, shape: np.frombuffer(data, np.float32).reshape(*shape, 2)),
    "zstd": Code(
        lambda flow: _zstd(flow.tobytes()),
        lambda data, shape: np.frombuffer(_unzstd(data), np.float32).reshape(*shape, 2),
    ),
    "bytes shuffled, zstd": Code(_byte_shuffled, _byte_unshuffled),
    "bits shuffled, zstd": Code(_bit_shuffled, _bit_unshuffled),
    f"rows, zstd {rowcode.FLOW_LEVEL} (stored)": Code(rowcode.encode_flow, rowcode.decode_flow),
    "rows and columns, zigzag, zstd": Code(_plane_zigzag, _plane_unzigzag),
}
