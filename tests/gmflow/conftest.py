"""The reference values, and the pair they were computed for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def reference_outputs(reference: Path) -> dict[str, np.ndarray]:
    with np.load(reference / "outputs.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def reference_gradients(reference: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((reference / "gradients.json").read_text())
    return content


@pytest.fixture(scope="session")
def read_image() -> Callable[[Path], np.ndarray]:
    def read(path: Path) -> np.ndarray:
        image = cv2.imread(str(path))
        assert image is not None, path
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    return read


@pytest.fixture(scope="session")
def read_flo() -> Callable[[Path], np.ndarray]:
    def read(path: Path) -> np.ndarray:
        header = np.fromfile(path, np.int32, 3)
        return np.fromfile(path, np.float32, offset=12).reshape(header[2], header[1], 2)

    return read


@pytest.fixture(scope="session")
def reference_pair(
    samples: Path, read_image: Callable[[Path], np.ndarray], read_flo: Callable[[Path], np.ndarray]
) -> tuple[Tensor, Tensor, Tensor]:
    """The pair that the reference values were computed for: two images `[1, 3, H, W]` and its flow."""
    data = samples / "FlyingChairs_release" / "data"
    arrays = (
        read_image(data / "00001_img1.ppm"),
        read_image(data / "00001_img2.ppm"),
        read_flo(data / "00001_flow.flo"),
    )
    image0, image1, flow = (torch.from_numpy(a).permute(2, 0, 1).unsqueeze(0).float() for a in arrays)
    return image0, image1, flow


@pytest.fixture(scope="session")
def reference_crop(reference_pair: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    image0, image1, flow = (tensor[..., 64:256, 128:384].contiguous() for tensor in reference_pair)
    return image0, image1, flow
