"""The file formats of the raw datasets: strict readers and writers on bytes.

Nothing here opens a file, so folders and buckets are read in the same way. A reader raises DamagedError, one line with
the file's name, if the bytes are not exactly one well-formed file: guessing would silently spoil the training data.

Flow is float32 [H, W, 2], x then y, in pixels. Frames are uint8 [H, W, 3], RGB. Masks are bool [H, W].
"""

import re
import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl.errors import DamagedError

Flow = npt.NDArray[np.float32]
Frame = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

HEAD_BYTES = 512
"""How many bytes from the beginning of a file image_size() needs (except for JPEG)."""

_MAX_SIDE = 32768  # no dataset comes near this; a damaged header may claim more and would exhaust the memory
_MAX_PIXELS = 2**27

_FLO_MAGIC = b"PIEH"  # 202021.25 as a little-endian float32 (Middlebury)
_FLO_HEADER = 12
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_PNM_GAP = rb"(?:\s|#[^\n]*\n)+"
_PNM_HEADER = re.compile(rb"P([56])" + _PNM_GAP + rb"(\d+)" + _PNM_GAP + rb"(\d+)" + _PNM_GAP + rb"(\d+)\s")
_PFM_HEADER = re.compile(rb"P([Ff])\s+(\d+)\s+(\d+)\s+([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)[ \t]*\r?\n")

_DAMAGED = "copy or download the file again"


# ------------------------------------------------------------------------------------------------ .flo


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
    height, width = _flo_size(data, name)
    _expect_length(data, _FLO_HEADER + 8 * height * width, name)
    return np.frombuffer(data, "<f4", offset=_FLO_HEADER).reshape(height, width, 2).astype(np.float32)


def encode_flo(flow: Flow) -> bytes:
    """Writes float32 [H, W, 2] as .flo. Raises ValueError for another shape."""
    height, width = _flow_shape(flow)
    return _FLO_MAGIC + struct.pack("<ii", width, height) + np.ascontiguousarray(flow, "<f4").tobytes()


# ------------------------------------------------------------------------------------------------ .pfm


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
        raise _bad(name, "is a one-channel PFM (a disparity?), not flow", "point to the optical_flow files")
    height, width = _checked_size(int(header[3]), int(header[2]), name)
    scale = float(header[4])
    if scale == 0 or not np.isfinite(scale):
        raise _bad(name, f"has the PFM scale {header[4].decode()}, which tells no byte order", _DAMAGED)
    _expect_length(data, header.end() + 12 * height * width, name)
    order = "<f4" if scale < 0 else ">f4"
    rows = np.frombuffer(data, order, offset=header.end()).reshape(height, width, 3)
    return np.ascontiguousarray(rows[::-1, :, :2], np.float32)


def encode_pfm(flow: Flow) -> bytes:
    """Writes float32 [H, W, 2] as FlyingThings3D does: third channel 0, little-endian, bottom-up."""
    height, width = _flow_shape(flow)
    rows = np.zeros((height, width, 3), "<f4")
    rows[..., :2] = flow[::-1]
    return f"PF\n{width} {height}\n-1.0\n".encode() + rows.tobytes()


# ------------------------------------------------------------------------------- KITTI and HD1K flow PNG


def decode_kitti_flow(data: bytes, name: str) -> tuple[Flow, Mask]:
    """Reads KITTI's and HD1K's 16-bit flow PNG: (value - 2^15) / 64, third channel non-zero where valid.

    Returns:
        flow float32 [H, W, 2], 0 where not valid, and valid bool [H, W].

    Raises:
        DamagedError: the file is not a complete 16-bit RGB PNG.
    """
    _check_png(data, name, allow_trailer=False)
    depth, colour = data[24], data[25]
    if (depth, colour) != (16, 2):
        raise _bad(name, f"is a {depth}-bit PNG of colour type {colour}; flow is 16-bit RGB", "is it a frame?")
    encoded = _imdecode(data, cv2.IMREAD_UNCHANGED, name)  # [H, W, (valid, y, x)]: OpenCV's order is BGR
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
    return _imencode(".png", encoded)


# ---------------------------------------------------------------------------------------------- frames


def decode_frame(data: bytes, name: str, *, allow_trailer: bool = False) -> Frame:
    """Reads an 8-bit PPM, PGM, PNG or JPEG; the content, not the name, tells the format.

    Grey becomes RGB, an alpha channel is dropped, and a JPEG's orientation tag is not applied (the flow
    belongs to the stored pixels).

    Args:
        data: the whole file.
        name: the file's name for error messages.
        allow_trailer: also accept a JPEG or PNG with bytes after its end, as some phones and programs write.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        DamagedError: the file has another format or depth, is truncated, has trailing bytes, or claims an absurd size.
    """
    if data[:2] in (b"P5", b"P6"):
        return _decode_pnm(data, name)
    if data.startswith(_PNG_MAGIC):
        _check_png(data, name, allow_trailer=allow_trailer)
        if data[24] > 8:
            raise _bad(name, f"has {data[24]} bits a channel; frames have 8", "convert it, or is it flow?")
    elif data.startswith(_JPEG_MAGIC):
        _checked_size(*_jpeg_size(data, name), name)
        if allow_trailer and not _jpeg_ends(data):
            raise _bad(name, "is a truncated JPEG", _DAMAGED)
        if not allow_trailer and not data.endswith(_JPEG_END):
            raise _bad(name, "is a JPEG without an end, or with bytes after it", _DAMAGED)
    else:
        raise _bad(name, "is not a binary PPM, PNG or JPEG image", "check what the file is")
    bgr = _imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, name)
    frame: Frame = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=bgr)
    return frame


def encode_frame_png(image: Frame) -> bytes:
    """Writes uint8 [H, W, 3] RGB as PNG."""
    return _imencode(".png", cv2.cvtColor(_frame_array(image), cv2.COLOR_RGB2BGR))


def encode_frame_ppm(image: Frame) -> bytes:
    """Writes uint8 [H, W, 3] RGB as binary PPM (FlyingChairs)."""
    height, width = _frame_array(image).shape[:2]
    return f"P6\n{width} {height}\n255\n".encode() + np.ascontiguousarray(image).tobytes()


def decode_mask(data: bytes, name: str) -> Mask:
    """Reads a mask PNG (Sintel's occlusions and invalid): bool [H, W], true where any channel is non-zero.

    Raises:
        DamagedError: the file is not a complete PNG.
    """
    _check_png(data, name, allow_trailer=False)
    pixels = _imdecode(data, cv2.IMREAD_UNCHANGED, name)
    if pixels.ndim == 3:
        pixels = pixels[..., :3].max(axis=2)  # an alpha channel is not part of the mask
    mask: Mask = pixels != 0
    return mask


def encode_mask(mask: Mask) -> bytes:
    """Writes bool [H, W] as an 8-bit grey PNG, 255 where true."""
    return _imencode(".png", mask.astype(np.uint8) * 255)


# ------------------------------------------------------------------------------------------------ sizes


def image_size(head: bytes, name: str) -> tuple[int, int]:
    """(height, width) of a frame, mask or flow file from its first bytes: cheap enough for a whole dataset.

    Args:
        head: the first HEAD_BYTES of the file or more. A JPEG's size may come later, so pass the whole file.
        name: the file's name for error messages.

    Raises:
        DamagedError: the file has none of this module's formats, claims an absurd size, or `head` is too short to tell.
    """
    if not_empty(head, name).startswith(_FLO_MAGIC):
        return _flo_size(head, name)
    if head.startswith(_PNG_MAGIC):
        return _png_size(head, name)
    if head[:2] in (b"P5", b"P6"):
        return _pnm_header(head, name)[:2]
    if head[:2] in (b"PF", b"Pf"):
        header = _pfm_header(head, name)
        return _checked_size(int(header[3]), int(header[2]), name)
    if head.startswith(_JPEG_MAGIC):
        return _checked_size(*_jpeg_size(head, name), name)
    raise _bad(name, "is none of .flo, .pfm, .png, .ppm, .jpg", "check what the file is")


def not_empty(data: bytes, name: str) -> bytes:
    """Returns `data` unchanged. Raises DamagedError if it is empty: no format allows an empty file."""
    if not data:
        raise _bad(name, "is empty", _DAMAGED)
    return data


# ------------------------------------------------------------------------------------------------ inside


def _bad(name: str, what: str, way_out: str) -> DamagedError:
    return DamagedError(f"{name} {what}: {way_out}")


def _checked_size(height: int, width: int, name: str) -> tuple[int, int]:
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE and height * width <= _MAX_PIXELS):
        raise _bad(name, f"claims to be {width}×{height} pixels, so its header is damaged", _DAMAGED)
    return height, width


def _expect_length(data: bytes, expected: int, name: str) -> None:
    if len(data) < expected:
        raise _bad(name, f"is truncated: {len(data)} of {expected} bytes", _DAMAGED)
    if len(data) > expected:
        raise _bad(name, f"has {len(data) - expected} bytes after its end", _DAMAGED)


def _flow_shape(flow: Flow) -> tuple[int, int]:
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow is [H, W, 2], not {flow.shape}")
    return flow.shape[0], flow.shape[1]


def _frame_array(image: Frame) -> Frame:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a frame is uint8 [H, W, 3], not {image.dtype} {image.shape}")
    return image


def _flo_size(data: bytes, name: str) -> tuple[int, int]:
    if not data.startswith(_FLO_MAGIC):
        raise _bad(name, "is not a .flo file: it does not begin with PIEH", "check what the file is")
    if len(data) < _FLO_HEADER:
        raise _bad(name, f"is truncated: {len(data)} bytes, not even a header", _DAMAGED)
    width, height = struct.unpack_from("<ii", data, 4)
    return _checked_size(height, width, name)


def _pfm_header(data: bytes, name: str) -> re.Match[bytes]:
    header = _PFM_HEADER.match(data[:HEAD_BYTES])
    if header is None:
        raise _bad(name, "is not a .pfm file, or its header is damaged", _DAMAGED)
    return header


def _pnm_header(data: bytes, name: str) -> tuple[int, int, int, int]:
    """Height, width, number of channels, and the offset at which the pixels begin."""
    header = _PNM_HEADER.match(data[:HEAD_BYTES])
    if header is None:
        raise _bad(name, "is not a PPM file, or its header is damaged", _DAMAGED)
    if int(header[4]) != 255:
        raise _bad(name, f"has {header[4].decode()} as its largest value; frames have 8 bits, 255", "convert it")
    height, width = _checked_size(int(header[3]), int(header[2]), name)
    return height, width, 3 if header[1] == b"6" else 1, header.end()


def _decode_pnm(data: bytes, name: str) -> Frame:
    height, width, channels, start = _pnm_header(data, name)
    _expect_length(data, start + height * width * channels, name)
    pixels = np.frombuffer(data, np.uint8, offset=start).reshape(height, width, channels)
    return np.repeat(pixels, 3, axis=2) if channels == 1 else pixels.copy()


def _png_size(data: bytes, name: str) -> tuple[int, int]:
    if not data.startswith(_PNG_MAGIC):
        raise _bad(name, "is not a PNG file", "check what the file is")
    if len(data) < 26 or data[12:16] != b"IHDR":
        raise _bad(name, "is a PNG with a truncated or damaged header", _DAMAGED)
    width, height = struct.unpack_from(">II", data, 16)
    return _checked_size(height, width, name)


def _png_chunks(data: bytes, name: str) -> Iterator[tuple[bytes, int, int]]:
    """Yields each chunk's type, and the start and end of its type and body."""
    position = len(_PNG_MAGIC)
    while position < len(data):
        if position + 12 > len(data):
            raise _bad(name, "is a truncated PNG", _DAMAGED)
        end = position + 8 + struct.unpack_from(">I", data, position)[0]
        if end + 4 > len(data):
            raise _bad(name, "is a truncated PNG", _DAMAGED)
        yield data[position + 4 : position + 8], position + 4, end
        position = end + 4


def _check_png(data: bytes, name: str, *, allow_trailer: bool) -> None:
    """Checks that the container is complete. OpenCV itself returns a half-empty image for half a file."""
    _png_size(data, name)
    view = memoryview(data)
    for kind, start, end in _png_chunks(data, name):
        if zlib.crc32(view[start:end]) != struct.unpack_from(">I", data, end)[0]:
            raise _bad(name, "is a damaged PNG (a checksum does not match)", _DAMAGED)
        if kind == b"IEND":
            if end + 4 < len(data) and not allow_trailer:
                raise _bad(name, "has bytes after the PNG's end", _DAMAGED)
            return
    raise _bad(name, "is a truncated PNG", _DAMAGED)


_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn; C4 and CC are tables, C8 is reserved
_JPEG_FILL = 0xFF  # any number of these bytes may come before a marker
_JPEG_SCAN = 0xDA


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields each segment's marker and the offset of its body. The one before the pixels is `_JPEG_SCAN`."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _JPEG_FILL:
            position += 1
            continue
        yield marker, position + 2
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]


def _jpeg_size(data: bytes, name: str) -> tuple[int, int]:
    for marker, body in _jpeg_segments(data):
        if marker in _JPEG_FRAMES and body + 7 <= len(data):
            height, width = struct.unpack_from(">HH", data, body + 3)
            return height, width
    raise _bad(name, f"is a JPEG that does not tell its size in its first {len(data)} bytes", _DAMAGED)


def _jpeg_ends(data: bytes) -> bool:
    """Whether an end marker follows the start of the pixels. (A thumbnail before them has its own end marker.)"""
    scan = next((body for marker, body in _jpeg_segments(data) if marker == _JPEG_SCAN), None)
    return scan is not None and data.find(_JPEG_END, scan) >= 0


def _imdecode(data: bytes, flags: int, name: str) -> npt.NDArray[np.uint8]:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise _bad(name, "is an image that cannot be decoded", _DAMAGED)
    decoded: npt.NDArray[np.uint8] = pixels
    return decoded


def _imencode(extension: str, pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    ok, encoded = cv2.imencode(extension, pixels)
    if not ok:
        raise RuntimeError(f"OpenCV could not write a {extension} image of {pixels.shape}")
    return bytes(encoded)
