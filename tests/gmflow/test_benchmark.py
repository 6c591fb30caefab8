"""What `benchmarks.model` would measure, where there is no GPU to measure it on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model import DTYPES, _clock, _peak_memory, cases, matrix_gflop
from gmflow import GMFlow, GMFlowConfig
from tests.gmflow import oracle


def test_every_precision_has_rows_and_a_peak() -> None:
    """TF32's peak is that of float32 matrices under the setting that `prepare_model` makes."""
    rows = {device: cases(False, False, device) for device in ("cpu", "cuda", "cuda:1")}
    for device in rows:
        for mode in ("inference", "train"):
            assert {row.precision for row in rows[device] if row.mode == mode} == {"fp32", "tf32", "bf16"}
    assert rows["cuda"] == rows["cuda:1"]
    assert {row.precision for row in rows["cuda"]} <= set(DTYPES)
    assert DTYPES["tf32"] == torch.float32


ODD: dict[str, Any] = {"backbone_channels": (16, 24, 40), "feature_channels": 32, "num_layers": 3, "ffn_expansion": 2}


@pytest.mark.parametrize(
    "config",
    [
        GMFlowConfig.base(),
        GMFlowConfig(**ODD, attn_splits=(1,)),
        GMFlowConfig(2, **ODD, attn_splits=(2, 4), corr_radius=(-1, -1), prop_radius=(-1, -1)),
    ],
    ids=["base", "one scale", "two scales"],
)
def test_the_work_of_a_row_is_that_of_the_oracle(config: GMFlowConfig) -> None:
    """Which PyTorch counts, but for neighbourhoods, as they are no matrix products."""
    parameters = dict(GMFlow(config).named_parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        oracle.predictions(parameters, config, *torch.rand(2, 1, 3, 64, 96))
    assert matrix_gflop(config, 64, 96, training=False) == pytest.approx(counted.get_total_flops() / 1e9, rel=1e-9)
    assert matrix_gflop(config, 64, 96, training=True) == pytest.approx(3 * counted.get_total_flops() / 1e9, rel=1e-9)


def test_the_work_of_a_neighbourhood_grows_with_its_side() -> None:
    """Of each pixel's scores with C channels, and of their mean of flow or positions, which have two."""
    pixels, channels = 64 * 96 / 8**2, 128
    work = {radius: matrix_gflop(GMFlowConfig(corr_radius=(radius,)), 64, 96, training=False) for radius in (-1, 1, 4)}
    assert work[4] - work[1] == pytest.approx(2 * pixels * (9**2 - 3**2) * (channels + 2) / 1e9)
    assert work[-1] - work[4] == pytest.approx(2 * pixels * (pixels - 9**2) * (channels + 2) / 1e9)


def test_the_device_that_computes_is_waited_for_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: asked.append(device) or 1)
    _clock("wall", "cuda:1")()
    _peak_memory("cuda:1")
    assert asked == ["cuda:1", "cuda:1"]
