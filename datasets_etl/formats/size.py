"""The size of an image or flow file from its first bytes, whatever its format."""

from datasets_etl.formats.checks import checked_size, damaged, not_empty
from datasets_etl.formats.flow import FLO_MAGIC, PFM_MAGICS, flo_size, pfm_size
from datasets_etl.formats.jpeg import JPEG_MAGIC, jpeg_size
from datasets_etl.formats.png import PNG_MAGIC, png_size
from datasets_etl.formats.pnm import PNM_MAGICS, pnm_header


def image_size(head: bytes, name: str) -> tuple[int, int]:
    """(height, width) of a frame, mask or flow file from its first bytes: cheap enough for a whole dataset.

    Args:
        head: the first HEAD_BYTES of the file or more. A JPEG's size may come later, so pass the whole file.
        name: the file's name for error messages.

    Raises:
        DamagedError: the file has none of this module's formats, claims an absurd size, or `head` is too short to tell.
    """
    if not_empty(head, name).startswith(FLO_MAGIC):
        return flo_size(head, name)
    if head.startswith(PNG_MAGIC):
        return png_size(head, name)
    if head[:2] in PNM_MAGICS:
        return pnm_header(head, name)[:2]
    if head[:2] in PFM_MAGICS:
        return pfm_size(head, name)
    if head.startswith(JPEG_MAGIC):
        return checked_size(*jpeg_size(head, name), name)
    raise damaged(name, "is none of .flo, .pfm, .png, .jpg, .ppm (P6), .pgm (P5)", "check what the file is")
