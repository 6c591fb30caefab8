"""The file formats of the raw datasets: strict readers and writers on bytes.

Nothing here opens a file, so folders and buckets are read in the same way. A reader raises DamagedError, one line with
the file's name, if the bytes are not exactly one well-formed file: guessing would silently spoil the training data.

Flow is float32 [H, W, 2], x then y, in pixels. Frames are uint8 [H, W, 3], RGB. Masks are bool [H, W].
"""

from datasets_etl.formats.checks import HEAD_BYTES, Flow, Frame, Mask, not_empty
from datasets_etl.formats.flow import (
    decode_flo,
    decode_kitti_flow,
    decode_pfm,
    encode_flo,
    encode_kitti_flow,
    encode_pfm,
)
from datasets_etl.formats.images import decode_frame, decode_mask, encode_frame_png, encode_frame_ppm, encode_mask
from datasets_etl.formats.size import image_size

__all__ = [
    "HEAD_BYTES",
    "Flow",
    "Frame",
    "Mask",
    "decode_flo",
    "decode_frame",
    "decode_kitti_flow",
    "decode_mask",
    "decode_pfm",
    "encode_flo",
    "encode_frame_png",
    "encode_frame_ppm",
    "encode_kitti_flow",
    "encode_mask",
    "encode_pfm",
    "image_size",
    "not_empty",
]
