"""PNG's container: its header and its checksums. The pixels are OpenCV's work."""

import struct
import zlib
from collections.abc import Iterator

from datasets_etl.formats.checks import COPY_AGAIN, checked_size, damaged

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def png_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) from the first 26 bytes."""
    if not data.startswith(PNG_MAGIC):
        raise damaged(name, "is not a PNG file", "check what the file is")
    if len(data) < 26 or data[12:16] != b"IHDR":
        raise damaged(name, "is a PNG with a truncated or damaged header", COPY_AGAIN)
    width, height = struct.unpack_from(">II", data, 16)
    return checked_size(height, width, name)


def bit_depth(data: bytes) -> int:
    """Bits of a channel, of a PNG whose header is checked."""
    return data[24]


def colour_type(data: bytes) -> int:
    """PNG's colour type, of a PNG whose header is checked: 2 is RGB."""
    return data[25]


def check_png(data: bytes, name: str, *, allow_trailer: bool) -> None:
    """Checks that the container is complete. OpenCV itself returns a half-empty image for half a file."""
    png_size(data, name)
    view = memoryview(data)
    for kind, start, end in _png_chunks(data, name):
        if zlib.crc32(view[start:end]) != struct.unpack_from(">I", data, end)[0]:
            raise damaged(name, "is a damaged PNG (a checksum does not match)", COPY_AGAIN)
        if kind == b"IEND":
            if end + 4 < len(data) and not allow_trailer:
                raise damaged(name, "has bytes after the PNG's end", COPY_AGAIN)
            return
    raise damaged(name, "is a truncated PNG", COPY_AGAIN)


def _png_chunks(data: bytes, name: str) -> Iterator[tuple[bytes, int, int]]:
    """Yields each chunk's type, and the start and end of its type and body."""
    position = len(PNG_MAGIC)
    while position < len(data):
        if position + 12 > len(data):
            raise damaged(name, "is a truncated PNG", COPY_AGAIN)
        end = position + 8 + struct.unpack_from(">I", data, position)[0]
        if end + 4 > len(data):
            raise damaged(name, "is a truncated PNG", COPY_AGAIN)
        yield data[position + 4 : position + 8], position + 4, end
        position = end + 4
