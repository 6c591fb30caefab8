"""A picture of a dataset at a glance: some of its pairs with their flow, one below the other."""

from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl.samples import FlowSample
from pipelines.training.pictures import coloured_truth

_CELL_WIDTH = 320
_CAPTION_HEIGHT = 16


def contact_sheet(samples: Iterable[FlowSample]) -> npt.NDArray[np.uint8]:
    """One row per sample: both frames, then the flow in colours, scaled to the sample's fastest pixel and black where
    there is no ground truth. Returns uint8 [H, W, 3], RGB. Raises ValueError if there are no samples.
    """
    rows = [_row(sample) for sample in samples]
    if not rows:
        raise ValueError("no samples to show")
    return np.vstack(rows)


def _row(sample: FlowSample) -> npt.NDArray[np.uint8]:
    flow, caption = _coloured_flow(sample)
    # Averaging with the black around them would make sparse points too dark to see.
    way = cv2.INTER_NEAREST if sample.sparse else cv2.INTER_AREA
    frames = [_shrunk(image, cv2.INTER_AREA) for image in (sample.image0, sample.image1)]
    cells = np.hstack([*frames, _shrunk(flow, way)])
    bar = np.zeros((_CAPTION_HEIGHT, cells.shape[1], 3), np.uint8)
    height, width = sample.image0.shape[:2]
    text = f"{sample.key}   {width}x{height}   {caption}"
    cv2.putText(bar, text, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return np.vstack([bar, cells])


def _coloured_flow(sample: FlowSample) -> tuple[npt.NDArray[np.uint8], str]:
    if sample.flow is None or sample.valid is None or not sample.valid.any():
        return np.zeros_like(sample.image0), "no ground truth"
    coloured, fastest = coloured_truth(sample.flow, sample.valid)
    return coloured, f"up to {fastest:.1f} px, {sample.valid.mean():.0%} with ground truth"


def _shrunk(image: npt.NDArray[np.uint8], way: int) -> npt.NDArray[np.uint8]:
    height = max(1, round(image.shape[0] * _CELL_WIDTH / image.shape[1]))
    cell: npt.NDArray[np.uint8] = cv2.resize(image, (_CELL_WIDTH, height), interpolation=way)
    return cell
