"""The raw datasets' file formats: exact on whole files, one clear line on anything else."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from datasets_etl import formats
from tests.datasets_etl.refusals import refusal

unhurried = settings(max_examples=60, deadline=None)  # a shared machine is no reason to fail
sides = st.integers(1, 9)
float_bits = st.integers(0, 2**32 - 1)  # every float32 there is, NaNs and infinities among them


def flows() -> st.SearchStrategy[Any]:
    return st.tuples(sides, sides).flatmap(
        lambda size: arrays(np.uint32, (*size, 2), elements=float_bits).map(lambda bits: bits.view(np.float32))
    )


def frames() -> st.SearchStrategy[Any]:
    return st.tuples(sides, sides).flatmap(lambda size: arrays(np.uint8, (*size, 3)))


def masks() -> st.SearchStrategy[Any]:
    return st.tuples(sides, sides).flatmap(lambda size: arrays(np.bool_, size))


FLOW = np.random.default_rng(0).normal(0, 20, (5, 7, 2)).astype(np.float32)
FRAME = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
VALID = np.random.default_rng(2).random((5, 7)) < 0.5
JPEG = cv2.imencode(".jpg", FRAME)[1].tobytes()

WHOLE_FILES: dict[str, tuple[bytes, Callable[[bytes, str], Any]]] = {
    "a.flo": (formats.encode_flo(FLOW), formats.decode_flo),
    "a.pfm": (formats.encode_pfm(FLOW), formats.decode_pfm),
    "flow.png": (formats.encode_kitti_flow(FLOW, VALID), formats.decode_kitti_flow),
    "a.png": (formats.encode_frame_png(FRAME), formats.decode_frame),
    "a.ppm": (formats.encode_frame_ppm(FRAME), formats.decode_frame),
    "a.jpg": (JPEG, formats.decode_frame),
    "mask.png": (formats.encode_mask(VALID), formats.decode_mask),
}
every_format = pytest.mark.parametrize("name", WHOLE_FILES)


@unhurried
@given(flows())
def test_flo_keeps_every_bit(flow: Any) -> None:
    back = formats.decode_flo(formats.encode_flo(flow), "a.flo")
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back.view(np.uint32), flow.view(np.uint32))


@unhurried
@given(flows())
def test_pfm_keeps_every_bit(flow: Any) -> None:
    back = formats.decode_pfm(formats.encode_pfm(flow), "a.pfm")
    np.testing.assert_array_equal(back.view(np.uint32), flow.view(np.uint32))


@unhurried
@given(st.tuples(sides, sides).flatmap(lambda size: st.tuples(arrays(np.uint16, (*size, 2)), arrays(np.bool_, size))))
def test_kitti_flow_keeps_every_value_of_the_format(case: Any) -> None:
    raw, valid = case
    flow = (raw.astype(np.float32) - 32768) / 64
    back, back_valid = formats.decode_kitti_flow(formats.encode_kitti_flow(flow, valid), "a.png")
    np.testing.assert_array_equal(back_valid, valid)
    np.testing.assert_array_equal(back, flow * valid[..., None])


@unhurried
@given(frames())
def test_frames_keep_every_pixel(frame: Any) -> None:
    np.testing.assert_array_equal(formats.decode_frame(formats.encode_frame_png(frame), "a.png"), frame)
    np.testing.assert_array_equal(formats.decode_frame(formats.encode_frame_ppm(frame), "a.ppm"), frame)


@unhurried
@given(masks())
def test_masks_keep_every_pixel(mask: Any) -> None:
    np.testing.assert_array_equal(formats.decode_mask(formats.encode_mask(mask), "a.png"), mask)


def test_flo_is_middleburys() -> None:
    data = struct.pack("<f", 202021.25) + struct.pack("<ii", 2, 1) + struct.pack("<4f", 1, 2, 3, 4)
    np.testing.assert_array_equal(formats.decode_flo(data, "a.flo"), [[[1, 2], [3, 4]]])
    assert formats.encode_flo(np.array([[[1, 2], [3, 4]]], np.float32)) == data


@pytest.mark.parametrize(("scale", "order"), [("-1.0", "<"), ("1.0", ">"), ("-1.000000e+00", "<")])
def test_pfm_rows_go_from_the_bottom_up_in_the_scales_byte_order(scale: str, order: str) -> None:
    data = f"PF\n1 2\n{scale}\n".encode() + struct.pack(order + "6f", 5, 6, 99, 7, 8, 99)
    np.testing.assert_array_equal(formats.decode_pfm(data, "a.pfm"), [[[7, 8]], [[5, 6]]])


def test_kitti_flow_is_x_y_valid_in_64ths_around_2_to_the_15() -> None:
    bgr = np.array([[[1, 2**15 - 64, 2**15 + 32], [0, 7, 7]]], np.uint16)  # OpenCV's order: valid, y, x
    flow, valid = formats.decode_kitti_flow(cv2.imencode(".png", bgr)[1].tobytes(), "a.png")
    np.testing.assert_array_equal(flow, [[[0.5, -1], [0, 0]]])
    np.testing.assert_array_equal(valid, [[True, False]])


def test_kitti_flow_rounds_to_the_nearest_64th_and_refuses_what_does_not_fit() -> None:
    valid = np.ones((1, 1), np.bool_)
    coarse = np.array([[[1.49 / 64, -1.51 / 64]]], np.float32)
    np.testing.assert_array_equal(
        formats.decode_kitti_flow(formats.encode_kitti_flow(coarse, valid), "a.png")[0] * 64, [[[1, -2]]]
    )
    far = np.full((1, 1, 2), 512, np.float32)
    with pytest.raises(ValueError, match="512"):
        formats.encode_kitti_flow(far, valid)
    with pytest.raises(ValueError, match=r"511\.98"):
        formats.encode_kitti_flow(np.full((1, 1, 2), np.nan, np.float32), valid)
    assert not formats.decode_kitti_flow(formats.encode_kitti_flow(far, ~valid), "a.png")[1].any()


def test_ppm_headers_may_hold_comments_and_any_white_space() -> None:
    data = b"P6 \n# by hand\n2  1 \n255\n" + bytes(range(6))
    np.testing.assert_array_equal(formats.decode_frame(data, "a.ppm"), [[[0, 1, 2], [3, 4, 5]]])


@pytest.mark.parametrize("extension", [".png", ".pgm", ".jpg"])
def test_grey_frames_become_rgb(extension: str) -> None:
    grey = np.full((16, 24), 77, np.uint8)
    frame = formats.decode_frame(cv2.imencode(extension, grey)[1].tobytes(), "a" + extension)
    np.testing.assert_array_equal(frame, np.full((16, 24, 3), 77))


def test_an_alpha_channel_is_dropped() -> None:
    rgba = np.dstack([FRAME, np.full(FRAME.shape[:2], 100, np.uint8)])
    data = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    np.testing.assert_array_equal(formats.decode_frame(data, "a.png"), FRAME)


def test_a_mask_is_true_where_any_channel_is_set() -> None:
    blue_only = np.zeros((1, 2, 3), np.uint8)
    blue_only[0, 1, 2] = 1
    np.testing.assert_array_equal(formats.decode_mask(formats.encode_frame_png(blue_only), "m.png"), [[False, True]])


def test_kitti_flow_is_valid_wherever_its_third_channel_is_not_zero() -> None:
    bgr = np.array([[[0, 2**15, 2**15], [1, 2**15, 2**15], [2, 2**15, 2**15], [65535, 2**15, 2**15]]], np.uint16)
    _, valid = formats.decode_kitti_flow(cv2.imencode(".png", bgr)[1].tobytes(), "a.png")
    np.testing.assert_array_equal(valid, [[False, True, True, True]])


def test_an_alpha_channel_says_nothing_about_a_mask() -> None:
    opaque = np.zeros((1, 2, 4), np.uint8)
    opaque[..., 3], opaque[0, 1, 0] = 255, 255
    data = cv2.imencode(".png", opaque)[1].tobytes()
    np.testing.assert_array_equal(formats.decode_mask(data, "m.png"), [[False, True]])


def test_a_jpegs_orientation_is_not_applied_for_the_flow_belongs_to_the_stored_pixels() -> None:
    tag = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # orientation: turned by a quarter
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + tag + struct.pack("<I", 0)
    turned = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + JPEG[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (7, 5, 3)
    np.testing.assert_array_equal(formats.decode_frame(turned, "a.jpg"), formats.decode_frame(JPEG, "a.jpg"))
    assert formats.image_size(turned, "a.jpg") == FRAME.shape[:2]


@every_format
@unhurried
@given(data=st.data())
def test_a_truncated_file_is_named_and_refused(name: str, data: st.DataObject) -> None:
    whole, decode = WHOLE_FILES[name]
    length = data.draw(st.integers(0, len(whole) - 1))
    assert name in refusal(lambda: decode(whole[:length], name))


@every_format
def test_bytes_after_the_end_are_refused(name: str) -> None:
    whole, decode = WHOLE_FILES[name]
    decode(whole, name)
    assert name in refusal(lambda: decode(whole + b"\0", name))


def thumbnailed(jpeg: bytes) -> bytes:
    """With a whole JPEG in its header, as cameras write them."""
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(JPEG)) + JPEG + jpeg[2:]


@pytest.mark.parametrize("jpeg", [JPEG, thumbnailed(JPEG)])
@pytest.mark.parametrize("trailer", [b"", b"\0" * 8 + b"SEFT", JPEG, JPEG[:-1]])
def test_a_jpeg_with_a_trailer_is_taken_where_that_is_allowed(jpeg: bytes, trailer: bytes) -> None:
    frame = formats.decode_frame(jpeg + trailer, "a.jpg", allow_trailer=True)
    np.testing.assert_array_equal(frame, formats.decode_frame(JPEG, "a.jpg"))


def test_a_png_with_a_trailer_is_taken_where_that_is_allowed() -> None:
    png = formats.encode_frame_png(FRAME)
    np.testing.assert_array_equal(formats.decode_frame(png + b"made by", "a.png", allow_trailer=True), FRAME)
    for length in range(len(png)):
        assert "a.png" in refusal(lambda: formats.decode_frame(png[:length], "a.png", allow_trailer=True))  # noqa: B023


@pytest.mark.parametrize("fill", [1, 5])
@pytest.mark.parametrize("allow_trailer", [False, True])
def test_a_jpegs_markers_may_be_filled_up(fill: int, allow_trailer: bool) -> None:
    """With bytes of FF, as the standard allows before any of them."""
    first, size, scan = 2, JPEG.index(b"\xff\xc0"), JPEG.index(b"\xff\xda")
    pieces = [JPEG[:first], JPEG[first:size], JPEG[size:scan], JPEG[scan:]]
    filled = (b"\xff" * fill).join(pieces)
    assert formats.image_size(filled, "a.jpg") == FRAME.shape[:2]
    decoded = formats.decode_frame(filled, "a.jpg", allow_trailer=allow_trailer)
    np.testing.assert_array_equal(decoded, formats.decode_frame(JPEG, "a.jpg"))


@pytest.mark.parametrize("jpeg", [JPEG, thumbnailed(JPEG)])
def test_a_truncated_jpeg_is_refused_even_where_a_trailer_is_allowed(jpeg: bytes) -> None:
    for length in range(len(jpeg)):
        assert "a.jpg" in refusal(lambda: formats.decode_frame(jpeg[:length], "a.jpg", allow_trailer=True))  # noqa: B023


@pytest.mark.parametrize("name", [name for name in WHOLE_FILES if name.endswith(".png")])
@unhurried
@given(data=st.data())
def test_a_png_with_one_flipped_bit_is_refused(name: str, data: st.DataObject) -> None:
    whole, decode = WHOLE_FILES[name]
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    assert name in refusal(lambda: decode(bytes(damaged), name))


@every_format
def test_another_formats_file_is_refused(name: str) -> None:
    decode = WHOLE_FILES[name][1]
    assert "text.txt" in refusal(lambda: decode(b"<html>404 not found</html>" * 9, "text.txt"))


def png_of_size(height: int, width: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(
    "data",
    [
        b"PIEH" + struct.pack("<ii", 2**30, 2**30),
        b"PIEH" + struct.pack("<ii", 0, 5),
        b"PIEH" + struct.pack("<ii", -3, 5),
        b"PF\n99999999999 2\n-1.0\n",
        b"PF\n0 2\n-1.0\n",
        b"P6\n70000 70000\n255\n",
        b"P6\n32768 32768\n255\n",
        png_of_size(2**31 - 1, 2**31 - 1),
        png_of_size(0, 3),
    ],
)
def test_an_absurd_size_is_refused_from_the_header_alone(data: bytes) -> None:
    assert "pixels" in refusal(lambda: formats.image_size(data, "a"))


@pytest.mark.parametrize("scale", [b"-1..0", b".", b"1.2.3"])
def test_a_scale_that_is_no_number_is_damage(scale: bytes) -> None:
    """Else the run would end at one pair's file instead of leaving the pair out."""
    assert "header is damaged" in refusal(lambda: formats.decode_pfm(b"PF\n1 1\n" + scale + b"\n" + bytes(12), "a.pfm"))


def test_what_a_file_is_instead_is_said() -> None:
    sixteen_bits = cv2.imencode(".png", FRAME.astype(np.uint16))[1].tobytes()
    assert "16 bits" in refusal(lambda: formats.decode_frame(sixteen_bits, "a.png"))
    assert "8-bit PNG" in refusal(lambda: formats.decode_kitti_flow(formats.encode_frame_png(FRAME), "a.png"))
    assert "one-channel" in refusal(lambda: formats.decode_pfm(b"Pf\n1 1\n-1.0\n" + b"\0" * 4, "a.pfm"))
    assert "byte order" in refusal(lambda: formats.decode_pfm(b"PF\n1 1\n0.0\n" + b"\0" * 12, "a.pfm"))
    assert "65535" in refusal(lambda: formats.decode_frame(b"P6\n1 1\n65535\n" + b"\0" * 6, "a.ppm"))


@every_format
def test_the_size_is_read_from_the_first_bytes(name: str) -> None:
    whole, _ = WHOLE_FILES[name]
    head = whole if name.endswith(".jpg") else whole[:64]
    assert formats.image_size(head, name) == (5, 7)


@every_format
def test_too_few_bytes_to_tell_the_size_are_refused(name: str) -> None:
    assert name in refusal(lambda: formats.image_size(WHOLE_FILES[name][0][:8], name))


def test_real_files_decode_and_encode_to_the_same_content(samples: Path, format_samples: Path) -> None:
    roots = [samples, format_samples]
    paths = [
        path for root in roots for path in sorted(root.rglob("*.*")) if path.suffix in (".flo", ".pfm", ".png", ".ppm")
    ]
    assert paths
    for path in paths:
        data, name = path.read_bytes(), path.name
        if path.suffix == ".flo":
            decoded = formats.decode_flo(data, name)
            assert formats.encode_flo(decoded) == data
        elif path.suffix == ".pfm":
            decoded = formats.decode_pfm(data, name)
            np.testing.assert_array_equal(formats.decode_pfm(formats.encode_pfm(decoded), name), decoded)
        elif "flow_occ" in path.parts:
            decoded, valid = formats.decode_kitti_flow(data, name)
            again, valid_again = formats.decode_kitti_flow(formats.encode_kitti_flow(decoded, valid), name)
            np.testing.assert_array_equal(again, decoded)
            np.testing.assert_array_equal(valid_again, valid)
        else:
            decoded = formats.decode_frame(data, name)
            np.testing.assert_array_equal(decoded, cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1])
        assert formats.image_size(data[: formats.HEAD_BYTES], name) == decoded.shape[:2]
