"""What the model takes, and how it begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gmflow import (
    GMFlow,
    GMFlowConfig,
    GMFlowError,
)
from tests.gmflow.models import TINY, tiny


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_of_any_floating_type_are_their_values_in_float32(dtype: torch.dtype) -> None:
    model = tiny().eval()
    images = (torch.rand(2, 1, 3, 64, 96) * 255).to(dtype)
    with torch.no_grad():
        assert torch.equal(model(*images).flow, model(*images.float()).flow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_whose_parameters_are_not_float32_says_what_to_do(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    with pytest.raises(GMFlowError, match=rf"parameters are {dtype}.*gmflow\.execution\.prepare_model\(model, Exec"):
        model(*torch.zeros(2, 1, 3, 32, 32, dtype=dtype))
    assert torch.isfinite(model.float()(*torch.zeros(2, 1, 3, 32, 32, dtype=dtype)).flow).all()


def test_model_refuses_sizes_that_do_not_divide() -> None:
    for height, width in ((48, 64), (64, 48)):
        with pytest.raises(GMFlowError, match=f"divisible by 32 .* not {height}×{width}"):
            tiny()(torch.zeros(1, 3, height, width), torch.zeros(1, 3, height, width))
    image = torch.zeros(1, 3, 32, 32)
    for pair in ((image.byte(), image), (image, image.byte())):
        with pytest.raises(GMFlowError, match="floating point"):
            tiny()(*pair)


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (1, 3, 0, 32), (1, 3, 32, 0), (1, 4, 32, 32), (3, 32, 32)])
def test_what_is_no_batch_of_rgb_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(GMFlowError, match=rf"non-empty batches \[B, 3, H, W\], not \[{shape[0]}, "):
        tiny()(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(GMFlowError, match="both images must have one shape"):
        tiny()(torch.zeros(shape), torch.zeros(1, 3, 32, 32))


def test_one_feature_pixel_is_refused() -> None:
    model = GMFlow(GMFlowConfig(**TINY, attn_splits=(1,)))
    with pytest.raises(GMFlowError, match="8×8"):
        model(*torch.zeros(2, 1, 3, 8, 8))


def test_a_fresh_model_is_initialised_as_the_published_one() -> None:
    """Kaiming for convolutions, Xavier for matrices; PyTorch's own defaults train to other weights."""
    torch.manual_seed(0)
    model = GMFlow(GMFlowConfig.refine())
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or name.startswith("upsampler"):
            continue
        outgoing, incoming, *kernel = module.weight.shape
        area = int(np.prod(kernel))
        if name == "backbone.shared":
            variance = 2 / (incoming * area)
        elif isinstance(module, nn.Conv2d):
            variance = 2 / (outgoing * area)
        else:
            variance = 2 / (incoming + outgoing)
        assert module.weight.var().item() == pytest.approx(variance, rel=0.1), name
        largest = module.weight.abs().max().item() / variance**0.5
        assert (largest > 3) == (isinstance(module, nn.Conv2d) and name != "backbone.shared"), name  # normal or uniform
