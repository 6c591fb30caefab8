"""JPEG's container: its size and its end. The pixels are OpenCV's work."""

import struct
from collections.abc import Iterator

from datasets_etl.formats.checks import COPY_AGAIN, damaged

JPEG_MAGIC = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn; C4 and CC are tables, C8 is reserved
_FILL = 0xFF  # any number of these bytes may come before a marker
_SCAN = 0xDA


def jpeg_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) as the header claims it; it may come after a thumbnail, thousands of bytes later."""
    for marker, body in _segments(data):
        if marker in _FRAMES and body + 7 <= len(data):
            height, width = struct.unpack_from(">HH", data, body + 3)
            return height, width
    raise damaged(name, f"is a JPEG without a size in its first {len(data)} bytes", COPY_AGAIN)


def jpeg_ends(data: bytes) -> bool:
    """Whether an end marker follows the start of the pixels. (A thumbnail before them has its own end marker.)"""
    scan = next((body for marker, body in _segments(data) if marker == _SCAN), None)
    return scan is not None and data.find(JPEG_END, scan) >= 0


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields each segment's marker and the offset of its body. The one before the pixels is `_SCAN`."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _FILL:
            position += 1
            continue
        yield marker, position + 2
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
