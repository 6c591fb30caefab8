"""Binary PPM and PGM with 8 bits (FlyingChairs)."""

import re

import numpy as np

from datasets_etl.formats.checks import COPY_AGAIN, HEAD_BYTES, Frame, checked_size, damaged, expect_length

PNM_MAGICS = (b"P5", b"P6")

_GAP = rb"(?:\s|#[^\n]*\n)+"
_HEADER = re.compile(rb"P([56])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)\s")


def decode_pnm(data: bytes, name: str) -> Frame:
    """uint8 [H, W, 3] RGB; grey is repeated. Raises DamagedError."""
    height, width, channels, start = pnm_header(data, name)
    expect_length(data, start + height * width * channels, name)
    pixels = np.frombuffer(data, np.uint8, offset=start).reshape(height, width, channels)
    return np.repeat(pixels, 3, axis=2) if channels == 1 else pixels.copy()


def pnm_header(data: bytes, name: str) -> tuple[int, int, int, int]:
    """Height, width, number of channels, and the offset at which the pixels begin."""
    header = _HEADER.match(data[:HEAD_BYTES])
    if header is None:
        raise damaged(name, "is not a PPM file, or its header is damaged", COPY_AGAIN)
    if int(header[4]) != 255:
        raise damaged(name, f"has {header[4].decode()} as its largest value; frames have 8 bits, 255", "convert it")
    height, width = checked_size(int(header[3]), int(header[2]), name)
    return height, width, 3 if header[1] == b"6" else 1, header.end()
