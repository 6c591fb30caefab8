"""Frames and masks: 8-bit PPM, PGM, PNG and JPEG."""

import cv2
import numpy as np

from datasets_etl.formats.checks import COPY_AGAIN, Frame, Mask, checked_size, damaged
from datasets_etl.formats.jpeg import JPEG_END, JPEG_MAGIC, jpeg_ends, jpeg_size
from datasets_etl.formats.opencv import decode_image, encode_image
from datasets_etl.formats.png import PNG_MAGIC, bit_depth, check_png
from datasets_etl.formats.pnm import PNM_MAGICS, decode_pnm


def decode_frame(data: bytes, name: str, *, allow_trailer: bool = False) -> Frame:
    """Reads an 8-bit PPM, PGM, PNG or JPEG; the format is found from the content, not from the name.

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
    if data[:2] in PNM_MAGICS:
        return decode_pnm(data, name)
    if data.startswith(PNG_MAGIC):
        check_png(data, name, allow_trailer=allow_trailer)
        if (depth := bit_depth(data)) > 8:
            raise damaged(name, f"has {depth} bits a channel; frames have 8", "convert it, or is it flow?")
    elif data.startswith(JPEG_MAGIC):
        checked_size(*jpeg_size(data, name), name)
        if allow_trailer and not jpeg_ends(data):
            raise damaged(name, "is a truncated JPEG", COPY_AGAIN)
        if not allow_trailer and not data.endswith(JPEG_END):
            raise damaged(name, "is a JPEG without an end, or with bytes after it", COPY_AGAIN)
    else:
        raise damaged(name, "is not a binary PPM, PNG or JPEG image", "check what the file is")
    bgr = decode_image(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, name)
    frame: Frame = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=bgr)
    return frame


def encode_frame_png(image: Frame) -> bytes:
    """Writes uint8 [H, W, 3] RGB as PNG."""
    return encode_image(".png", cv2.cvtColor(_frame_array(image), cv2.COLOR_RGB2BGR))


def encode_frame_ppm(image: Frame) -> bytes:
    """Writes uint8 [H, W, 3] RGB as binary PPM (FlyingChairs)."""
    height, width = _frame_array(image).shape[:2]
    return f"P6\n{width} {height}\n255\n".encode() + np.ascontiguousarray(image).tobytes()


def decode_mask(data: bytes, name: str) -> Mask:
    """Reads a mask PNG (Sintel's occlusions and invalid): bool [H, W], true where any channel is non-zero.

    Raises:
        DamagedError: the file is not a complete PNG.
    """
    check_png(data, name, allow_trailer=False)
    pixels = decode_image(data, cv2.IMREAD_UNCHANGED, name)
    if pixels.ndim == 3:
        pixels = pixels[..., :3].max(axis=2)  # an alpha channel is not part of the mask
    mask: Mask = pixels != 0
    return mask


def encode_mask(mask: Mask) -> bytes:
    """Writes bool [H, W] as an 8-bit grey PNG, 255 where true."""
    return encode_image(".png", mask.astype(np.uint8) * 255)


def _frame_array(image: Frame) -> Frame:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a frame is uint8 [H, W, 3], not {image.dtype} {image.shape}")
    return image
