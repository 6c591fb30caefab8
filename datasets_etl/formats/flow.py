"""Flow files: Middlebury's .flo, FlyingThings3D's .pfm, the 16-bit PNG of KITTI and HD1K."""

import re
import struct

import cv2
import numpy as np

from datasets_etl.formats.checks import COPY_AGAIN, HEAD_BYTES, Flow, Mask, checked_size, damaged, expect_length
from datasets_etl.formats.opencv import decode_image, encode_image
from datasets_etl.formats.png import bit_depth, check_png, colour_type

FLO_MAGIC = b"PIEH"  # 202021.25 as a little-endian float32 (Middlebury)
PFM_MAGICS = (b"PF", b"Pf")

_FLO_HEADER_BYTES = 12
_PFM_HEADER = re.compile(rb"P([Ff])\s+(\d+)\s+(\d+)\s+([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)[ \t]*\r?\n")


def decode_flo(data: bytes, name: str) -> Flow:
    """Reads Middlebury's .flo (FlyingChairs, Sintel).

    Args:
        data: the whole file.
        name: the file's name for error messages.

    Returns:
        float32 [H, W, 2], exactly as stored: unknown flow stays as the file marks it (huge or not finite).

    Raises:
        DamagedError: the file is not a .flo, is truncated or too long, or claims an absurd size.
    """
    height, width = flo_size(data, name)
    expect_length(data, _FLO_HEADER_BYTES + 8 * height * width, name)
    return np.frombuffer(data, "<f4", offset=_FLO_HEADER_BYTES).reshape(height, width, 2).astype(np.float32)


def flo_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) from a .flo's header, the first 12 bytes."""
    if not data.startswith(FLO_MAGIC):
        raise damaged(name, "is not a .flo file: it does not begin with PIEH", "check what the file is")
    if len(data) < _FLO_HEADER_BYTES:
        raise damaged(name, f"is truncated: {len(data)} bytes, not even a header", COPY_AGAIN)
    width, height = struct.unpack_from("<ii", data, 4)
    return checked_size(height, width, name)


def encode_flo(flow: Flow) -> bytes:
    """Writes float32 [H, W, 2] as .flo. Raises ValueError for another shape."""
    height, width = _flow_shape(flow)
    return FLO_MAGIC + struct.pack("<ii", width, height) + np.ascontiguousarray(flow, "<f4").tobytes()


def decode_pfm(data: bytes, name: str) -> Flow:
    """Reads a flow field from FlyingThings3D's .pfm: three channels, rows from the bottom up.

    The sign of the scale gives the byte order. Its magnitude, a unit that no flow dataset uses, is ignored.

    Returns:
        float32 [H, W, 2], the first two channels as stored (FlyingThings3D holds NaN and inf in places).

    Raises:
        DamagedError: the file is not a colour PFM, is truncated or too long, or claims an absurd size.
    """
    header = _pfm_header(data, name)
    if header[1] == b"f":
        raise damaged(name, "is a one-channel PFM (a disparity?), not flow", "point to the optical_flow files")
    height, width = checked_size(int(header[3]), int(header[2]), name)
    scale = float(header[4])
    if scale == 0 or not np.isfinite(scale):
        raise damaged(name, f"has the PFM scale {header[4].decode()}, which gives no byte order", COPY_AGAIN)
    expect_length(data, header.end() + 12 * height * width, name)
    order = "<f4" if scale < 0 else ">f4"
    rows = np.frombuffer(data, order, offset=header.end()).reshape(height, width, 3)
    return np.ascontiguousarray(rows[::-1, :, :2], np.float32)


def pfm_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) from a .pfm's header."""
    header = _pfm_header(data, name)
    return checked_size(int(header[3]), int(header[2]), name)


def _pfm_header(data: bytes, name: str) -> re.Match[bytes]:
    """Its groups: F (colour) or f (grey), width, height, scale."""
    header = _PFM_HEADER.match(data[:HEAD_BYTES])
    if header is None:
        raise damaged(name, "is not a .pfm file, or its header is damaged", COPY_AGAIN)
    return header


def encode_pfm(flow: Flow) -> bytes:
    """Writes float32 [H, W, 2] as FlyingThings3D does: third channel 0, little-endian, bottom-up."""
    height, width = _flow_shape(flow)
    rows = np.zeros((height, width, 3), "<f4")
    rows[..., :2] = flow[::-1]
    return f"PF\n{width} {height}\n-1.0\n".encode() + rows.tobytes()


def decode_kitti_flow(data: bytes, name: str) -> tuple[Flow, Mask]:
    """Reads KITTI's and HD1K's 16-bit flow PNG: (value - 2^15) / 64, third channel non-zero where valid.

    Returns:
        flow float32 [H, W, 2], 0 where not valid, and valid bool [H, W].

    Raises:
        DamagedError: the file is not a complete 16-bit RGB PNG.
    """
    check_png(data, name, allow_trailer=False)
    depth, colour = bit_depth(data), colour_type(data)
    if (depth, colour) != (16, 2):
        raise damaged(name, f"is a {depth}-bit PNG of colour type {colour}; flow is 16-bit RGB", "is it a frame?")
    encoded = decode_image(data, cv2.IMREAD_UNCHANGED, name)  # [H, W, (valid, y, x)]: OpenCV's order is BGR
    valid = encoded[..., 0] != 0
    packed = np.empty((*valid.shape, 2), np.uint16)  # [H, W, (x, y)]
    cv2.mixChannels([encoded], [packed], [2, 0, 1, 1])
    flow = packed.astype(np.float32)
    flow -= 32768
    flow *= 1 / 64
    return cv2.copyTo(flow, valid.view(np.uint8)), valid  # 0 where not valid


def encode_kitti_flow(flow: Flow, valid: Mask) -> bytes:
    """Writes flow float32 [H, W, 2] and valid bool [H, W] as KITTI's 16-bit PNG, to 1/64 px.

    Raises:
        ValueError: other shapes, or a valid component outside the format's -512 .. 511.98 px.
    """
    height, width = _flow_shape(flow)
    if valid.shape != (height, width):
        raise ValueError(f"valid is {valid.shape}, flow is {flow.shape}")
    scaled = np.rint(np.where(valid[..., None], flow, 0) * 64.0) + 32768
    if not ((scaled >= 0) & (scaled <= 65535)).all():
        raise ValueError("a valid flow component is outside -512 .. 511.98 px, which KITTI's PNG cannot hold")
    encoded = np.zeros((height, width, 3), np.uint16)
    encoded[..., 2], encoded[..., 1] = scaled[..., 0], scaled[..., 1]
    encoded[~valid] = 0
    encoded[..., 0] = valid
    return encode_image(".png", encoded)


def _flow_shape(flow: Flow) -> tuple[int, int]:
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow is [H, W, 2], not {flow.shape}")
    return flow.shape[0], flow.shape[1]
