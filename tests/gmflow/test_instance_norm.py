"""Instance normalisation in either layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow import GMFlow, GMFlowConfig
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.instance_norm import instance_norm


def maps(*shape: int, dtype: torch.dtype) -> Tensor:
    """Of different means and spreads by image and channel."""
    values = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (values[0] * (1 + values[1, ..., :1, :1].abs()) + 3 * values[1, ..., :1, :1]).to(dtype)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (3, 8, 6, 9), (2, 1, 4, 4), (2, 5, 1, 3)])
@pytest.mark.parametrize("learns", [False, True])
def test_channels_last_maps_stay_so_and_are_normalised_as_others(shape: tuple[int, ...], learns: bool) -> None:
    plain = maps(*shape, dtype=torch.float64).requires_grad_(learns)
    last = plain.detach().contiguous(memory_format=torch.channels_last).requires_grad_(learns)
    wanted, found = F.instance_norm(plain), instance_norm(last)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    if learns:
        upper = maps(*shape, dtype=torch.float64).flip(-1)
        gradients = [torch.autograd.grad(out, one, upper)[0] for out, one in ((found, last), (wanted, plain))]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_contiguous_maps_are_left_to_pytorch_bit_by_bit() -> None:
    plain = maps(2, 8, 16, 24, dtype=torch.float32)
    assert torch.equal(instance_norm(plain), F.instance_norm(plain))


@pytest.mark.parametrize(
    ("precision", "layout"), [("fp32", "contiguous"), ("tf32", "channels_last"), ("bf16", "channels_last")]
)
def test_what_the_backbones_maps_are_like_on_a_cpu(precision: Any, layout: str) -> None:
    """In float32 the reference's, also for images that come channels-last, as from an array [H, W, 3]."""
    model = prepare_model(GMFlow(GMFlowConfig.base()).eval(), ExecutionConfig(precision))
    found: list[bool] = []
    memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    for block in model.backbone.stages:
        block.register_forward_hook(lambda _, __, out: found.append(out.is_contiguous(memory_format=memory_format)))
    images = 255 * torch.rand(2, 1, 64, 96, 3)
    with torch.no_grad():
        model(*images.permute(0, 1, 4, 2, 3))
    assert found == [True] * 3
