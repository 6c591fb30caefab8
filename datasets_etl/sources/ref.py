"""What a source yields: one reference per frame pair, before anything is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

SPARSE_SUFFIX = ".png"
"""That of KITTI's and HD1K's flow, which says at which pixels there is any."""


@dataclass(frozen=True)
class SourceTree:
    """A raw dataset as a listing, which works in the same way for a folder and for a bucket.

    Attributes:
        root: where the dataset lies; used only in messages.
        files: every file below the root as a sorted relative POSIX path.
        read: returns the bytes of one of these files.
    """

    root: str
    files: Sequence[str]
    read: Callable[[str], bytes]


@dataclass(frozen=True)
class SampleRef:
    """One frame pair of a raw dataset; paths are relative to the dataset's root.

    Attributes:
        dataset: "chairs", "things", "sintel", "kitti" or "hd1k", or the name of a dataset of one's own.
        subset: the name by which mixtures and evaluations select pairs, such as "train" or "training-clean".
        key: a WebDataset key, without dots and unique within the dataset; keys sort in index order.
        scene: the sequence the pair belongs to.
        frame: name of the first frame within the scene.
        image0, image1: the two frames.
        flow: ground truth; None if the dataset does not publish it.
        occlusion: Sintel's occlusion mask (non-zero = occluded).
        invalid: Sintel's mask of invalid pixels (non-zero = invalid).
        flow_noc: KITTI's ground truth of non-occluded pixels only.
    """

    dataset: str
    subset: str
    key: str
    scene: str
    frame: str
    image0: str
    image1: str
    flow: str | None
    occlusion: str | None = None
    invalid: str | None = None
    flow_noc: str | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether its flow exists only at some pixels, and so must never be interpolated."""
        return self.flow is not None and self.flow.endswith(SPARSE_SUFFIX)


class Source(Protocol):
    """A dataset's official layout."""

    def __call__(self, tree: SourceTree) -> list[SampleRef]:
        """Every pair in a fixed order. Raises DataError that names what is missing from the layout."""
        ...
