"""A frame pair with its ground truth, in memory and as files in a shard: the schema.

In a shard, a sample consists of these members, named `KEY.EXTENSION` as WebDataset requires:

    json             dataset, subset, scene, frame, size, the raw files and their hashes
    frame0.zst       first frame, uint8 [H, W, 3] RGB in the encoding of rowcode.py
    frame1.zst       second frame
    flow.zst         dense flow, float32 [H, W, 2] in the encoding of rowcode.py
    flow.png         sparse flow (KITTI, HD1K): the 16-bit PNG as published
    occluded.png     occlusion mask, 0 or 255: Sintel's own; for KITTI, pixels in flow_occ but not in flow_noc
    invalid.png      Sintel's mask of invalid pixels, 0 or 255; kept, but those pixels count as valid when a sample is
                     read, because they do in all published figures

Everything is kept to the bit, including non-finite flow. Which pixels are valid is decided when a sample is read.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datasets_etl import formats, rowcode
from datasets_etl.errors import DamagedError, DataError
from datasets_etl.sources import SampleRef, SourceTree

SCHEMA_VERSION = 2

# Dense components this large mark a pixel without ground truth, as in the reference implementation.
MAX_DENSE_FLOW = 1000.0


@dataclass(frozen=True)
class FlowSample:
    """One decoded frame pair.

    Attributes:
        key: the sample's name within its dataset.
        dataset: "chairs", "things", "sintel", "kitti" or "hd1k", or the name of a dataset of one's own.
        subset: the subset's name, such as "train" or "training-clean".
        sparse: whether ground truth exists only at some pixels (KITTI, HD1K), so that it must never be interpolated.
        image0, image1: RGB, uint8 [H, W, 3].
        flow: float32 [H, W, 2], pixels, x then y; 0 where not valid. None without ground truth.
        valid: bool [H, W], where flow may be used. None without ground truth.
        occluded: bool [H, W], pixels with no counterpart in image1. None if unknown or not decoded.
        scene, frame: names of the sequence, and of the first frame in it, as in the dataset.
    """

    key: str
    dataset: str
    subset: str
    sparse: bool
    image0: npt.NDArray[np.uint8]
    image1: npt.NDArray[np.uint8]
    flow: npt.NDArray[np.float32] | None = None
    valid: npt.NDArray[np.bool_] | None = None
    occluded: npt.NDArray[np.bool_] | None = None
    scene: str = ""
    frame: str = ""


@dataclass(frozen=True)
class SampleFacts:
    """What the manifest says about a sample besides its position; `invalid_pixels` is None without ground truth."""

    height: int
    width: int
    invalid_pixels: int | None


def encode_sample(ref: SampleRef, tree: SourceTree) -> tuple[dict[str, bytes | str], SampleFacts]:
    """Raw files of one pair → members of its shard, in the form that webdataset's writer takes.

    Raises DamagedError if a file is damaged, DataError if files differ in size. The message is one line with paths
    relative to the dataset, so it does not depend on where the dataset lies.
    """
    raw = _RawFiles(tree)
    image0, image1 = (formats.decode_frame(raw.read(path), path) for path in (ref.image0, ref.image1))
    height, width = size = image0.shape[:2]
    check_size(ref.image0, size, ref.image1, image1.shape)
    truth, valid = _encode_truth(ref, raw, size)
    masks = _encode_masks(ref, raw, size)
    facts = SampleFacts(height, width, None if valid is None else int((~valid).sum()))
    described = {
        "schema": SCHEMA_VERSION,
        **{name: value for name, value in asdict(ref).items() if value is not None},
        "height": height,
        "width": width,
        "sha256": raw.sha256,
    }
    members: dict[str, bytes | str] = {
        "__key__": ref.key,
        "json": json.dumps(described, sort_keys=True).encode(),
        "frame0.zst": rowcode.encode_frame(image0),
        "frame1.zst": rowcode.encode_frame(image1),
    }
    return members | truth | masks, facts


class _RawFiles:
    """The raw files of one pair, each read once; `sha256` holds the hashes of what was read, by path."""

    def __init__(self, tree: SourceTree) -> None:
        self.sha256: dict[str, str] = {}
        self._tree = tree

    def read(self, path: str) -> bytes:
        data = formats.not_empty(self._tree.read(path), path)
        self.sha256[path] = hashlib.sha256(data).hexdigest()
        return data


def _encode_truth(
    ref: SampleRef, raw: _RawFiles, size: tuple[int, int]
) -> tuple[dict[str, bytes], npt.NDArray[np.bool_] | None]:
    """Members of the flow, and for KITTI of the occlusion it implies; and where the flow is valid, bool [H, W]."""
    if ref.flow is None:
        return {}, None
    data = raw.read(ref.flow)
    if ref.is_sparse:
        flow, valid = formats.decode_kitti_flow(data, ref.flow)
        members = {"flow.png": data}
    else:
        flow = _decode_dense(data, ref.flow)
        valid = dense_valid(flow)
        members = {"flow.zst": rowcode.encode_flow(flow)}
    check_size(ref.image0, size, ref.flow, flow.shape)
    if ref.flow_noc is not None:
        _, seen_in_both = formats.decode_kitti_flow(raw.read(ref.flow_noc), ref.flow_noc)
        check_size(ref.image0, size, ref.flow_noc, seen_in_both.shape)
        members["occluded.png"] = formats.encode_mask(valid & ~seen_in_both)
    return members, valid


def _encode_masks(ref: SampleRef, raw: _RawFiles, size: tuple[int, int]) -> dict[str, bytes]:
    members = {}
    for name, path in (("occluded.png", ref.occlusion), ("invalid.png", ref.invalid)):
        if path is not None:
            mask = formats.decode_mask(raw.read(path), path)
            check_size(ref.image0, size, path, mask.shape)
            members[name] = formats.encode_mask(mask)
    return members


def decode_sample(data: bytes, where: str, *, occlusion: bool = True) -> FlowSample:
    """The bytes of one sample's members in a tar → the sample.

    Args:
        data: the members, from the first one's header to the end of the last one's last block.
        where: the sample's name for error messages.
        occlusion: whether to decode the occlusion mask, if there is one; training does not use it.

    Raises:
        DamagedError: a member is missing or does not decode.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = {member.name.partition(".")[2]: _member(tar, member) for member in tar}
        described: dict[str, Any] = json.loads(members["json"])
        if described["schema"] != SCHEMA_VERSION:
            raise ValueError(f"schema {described['schema']}, this version reads {SCHEMA_VERSION}")
        shape = (described["height"], described["width"])
        image0 = rowcode.decode_frame(members["frame0.zst"], shape)
        image1 = rowcode.decode_frame(members["frame1.zst"], shape)
        flow, valid = _decode_truth(members, shape, where)
        mask = members.get("occluded.png") if occlusion else None
        occluded = None if mask is None else formats.decode_mask(mask, where)
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise DamagedError(
            f"{where}: damaged sample ({error}); delete its shard and run pipelines/etl.py again, it writes what is "
            "missing"
        ) from error
    return FlowSample(
        key=described["key"],
        dataset=described["dataset"],
        subset=described["subset"],
        sparse="flow.png" in members,
        image0=image0,
        image1=image1,
        flow=flow,
        valid=valid,
        occluded=occluded,
        scene=described["scene"],
        frame=described["frame"],
    )


def _decode_truth(
    members: dict[str, bytes], shape: tuple[int, int], where: str
) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.bool_] | None]:
    if "flow.png" in members:
        return formats.decode_kitti_flow(members["flow.png"], where)
    if "flow.zst" not in members:
        return None, None
    flow = rowcode.decode_flow(members["flow.zst"], shape)
    valid = dense_valid(flow)
    if not valid.all():
        flow[~valid] = 0
    return flow, valid


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no file")
    return file.read()


def check_size(name: str, size: Sequence[int], other_name: str, other_size: Sequence[int]) -> None:
    """Checks that two files of a pair have the same (height, width). Raises DataError with both names.

    This is no DamagedError, for which the pair would be left out: files that do not belong together are a wrong input.
    """
    if tuple(size[:2]) != tuple(other_size[:2]):
        raise DataError(
            f"{name} is {size[1]}x{size[0]} but {other_name} is {other_size[1]}x{other_size[0]} pixels; "
            "frames and ground truth of a pair must have one size: mend or remove the pair"
        )


def _decode_dense(data: bytes, name: str) -> npt.NDArray[np.float32]:
    return formats.decode_pfm(data, name) if name.endswith(".pfm") else formats.decode_flo(data, name)


def dense_valid(flow: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Where dense flow [H, W, 2] is known, bool [H, W]: both components are finite and within ±MAX_DENSE_FLOW."""
    # Usually all pixels are valid, and these two passes are the cheapest way to see it. NaN fails any comparison.
    if float(flow.min()) > -MAX_DENSE_FLOW and float(flow.max()) < MAX_DENSE_FLOW:
        return np.ones(flow.shape[:2], np.bool_)
    small = np.abs(flow) < MAX_DENSE_FLOW  # [H, W, 2], false for NaN and infinity too
    return small[..., 0] & small[..., 1]
