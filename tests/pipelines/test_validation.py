"""Which pixels of a dataset count."""

from dataclasses import replace

import pytest
import torch

from datasets_etl.synthetic import synthetic_pair
from pipelines.training.validation import score


@pytest.mark.parametrize(("dataset", "counted"), [("things", [False, True, False]), ("sintel", [True, True, True])])
def test_flyingthings_fastest_pixels_do_not_count_as_in_the_published_figures(dataset: str, counted: list[bool]):
    sample = replace(synthetic_pair(3, 32, 64), dataset=dataset)
    flow = torch.zeros(32, 64, 2).numpy()
    flow[0, :3] = [[400, 0], [399, 0], [-240, 320]]
    (scored,) = score(None, [replace(sample, flow=flow)], torch.device("cpu"))
    speeds = [400.0, 399.0, 400.0]
    pixels = 32 * 64 - counted.count(False)
    figures = scored.metrics.compute()
    assert figures["epe"] * pixels == pytest.approx(sum(s for s, counts in zip(speeds, counted, strict=True) if counts))
    assert figures["px5"] == pytest.approx(100 * counted.count(True) / pixels)
