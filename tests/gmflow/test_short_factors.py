"""Products whose factors have bf16's bits: exact sums, and no setting left behind."""

from __future__ import annotations

import threading

import pytest
import torch

from gmflow import GMFlow, GMFlowConfig
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.short_factors import short_factors


def rounds() -> bool:
    """Whether float32 products of this process may round their factors."""
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_factors_of_16_bits_are_multiplied_exactly():
    query, key = (torch.randn(3, 96, 128, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (1, 2))
    exact = query.double() @ key.double().transpose(1, 2)
    with short_factors():
        found = torch.bmm(query.float(), key.float().transpose(1, 2))
    rounded = torch.bmm(query, key.transpose(1, 2))
    assert (found - exact).abs().max() < 1e-4
    assert (rounded - exact).abs().max() > 1e-2  # what is spared


def test_the_setting_ends_with_the_last_block_that_wants_it():
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with short_factors():
            inside.set()
            leave.wait()

    other = threading.Thread(target=hold)
    other.start()
    inside.wait()
    with short_factors():
        assert rounds()
    assert rounds(), "the other thread is still in its block"
    leave.set()
    other.join()
    assert not rounds()
    with pytest.raises(RuntimeError), short_factors():
        raise RuntimeError
    assert not rounds()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_rounds_scores_factors_in_bf16_only_and_leaves_the_setting_alone(precision, monkeypatch):
    """Of the scores only: matching and propagation of the same forward pass multiply all bits."""
    monkeypatch.setattr("gmflow.attention.BF16_MATRIX_UNITS", False)  # scores of the fused operation are its own
    config = GMFlowConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)
    model = prepare_model(GMFlow(config).eval(), ExecutionConfig(precision))
    seen: dict[bool, int] = {True: 0, False: 0}
    product = torch.bmm

    def counted(left: torch.Tensor, *others: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32:
            seen[rounds()] += 1
        return product(left, *others, **named)

    monkeypatch.setattr(torch, "bmm", counted)
    with torch.no_grad():
        model(*torch.rand(2, 1, 3, 64, 96) * 255)
    assert (seen[True] > 0) == (precision == "bf16")
    assert seen[False] > 0
    assert not rounds()
