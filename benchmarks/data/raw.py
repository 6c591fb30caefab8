"""Raw datasets in local folders: real samples, found as in the tests."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datasets_etl import formats
from datasets_etl.samples import dense_valid
from datasets_etl.sources import SOURCES, SampleRef, SourceTree

_FOLDERS = {
    "chairs": ("GMFLOW_SAMPLES", "FlyingChairs_release"),
    "sintel": ("GMFLOW_SAMPLES", "Sintel"),
    "kitti": ("GMFLOW_SAMPLES", "KITTI"),
    "things": ("GMFLOW_FORMAT_SAMPLES", "FlyingThings3D"),
    "hd1k": ("GMFLOW_FORMAT_SAMPLES", "HD1K"),
}

VARIABLES = ("GMFLOW_SAMPLES", "GMFLOW_FORMAT_SAMPLES")
"""Variables of the environment that name the folders of the samples."""


@dataclass(frozen=True)
class Raw:
    """A raw dataset in a local folder."""

    name: str
    root: Path

    @property
    def tree(self) -> SourceTree:
        files = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        return SourceTree(str(self.root), files, lambda name: (self.root / name).read_bytes())

    @property
    def refs(self) -> list[SampleRef]:
        return SOURCES[self.name](self.tree)


def real_samples() -> list[Raw]:
    """The samples in the folders that `VARIABLES` name; a variable that is not set names none."""
    return [
        Raw(name, Path(os.environ[variable]) / folder)
        for name, (variable, folder) in _FOLDERS.items()
        if variable in os.environ
    ]


def read_flow(tree: SourceTree, ref: SampleRef) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Flow, float32 [H, W, 2], and where it is valid, bool [H, W]."""
    if ref.flow is None:
        raise ValueError(f"{ref.key} has no flow")
    data = tree.read(ref.flow)
    if ref.is_sparse:
        return formats.decode_kitti_flow(data, ref.flow)
    flow = formats.decode_pfm(data, ref.flow) if ref.flow.endswith(".pfm") else formats.decode_flo(data, ref.flow)
    return flow, dense_valid(flow)
