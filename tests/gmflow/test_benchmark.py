"""What `benchmarks.model` would measure, where there is no GPU to measure it on."""

from __future__ import annotations

import pytest
import torch

from benchmarks.model import DTYPES, _clock, _peak_memory, cases


def test_every_precision_has_rows_and_a_peak() -> None:
    """TF32's peak is that of float32 matrices under the setting that `prepare_model` makes."""
    rows = {device: cases(False, False, device) for device in ("cpu", "cuda", "cuda:1")}
    for device in rows:
        for mode in ("inference", "train"):
            assert {row.precision for row in rows[device] if row.mode == mode} == {"fp32", "tf32", "bf16"}
    assert rows["cuda"] == rows["cuda:1"]
    assert {row.precision for row in rows["cuda"]} <= set(DTYPES)
    assert DTYPES["tf32"] == torch.float32


def test_the_device_that_computes_is_waited_for_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: asked.append(device) or 1)
    _clock("wall", "cuda:1")()
    _peak_memory("cuda:1")
    assert asked == ["cuda:1", "cuda:1"]
