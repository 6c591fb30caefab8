"""A step stays on its device: no tensor is built on the host and moved, no value is read back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gmflow import GMFlow, GMFlowConfig
from gmflow.loss import sequence_loss
from gmflow.transformer import FeatureTransformer

CONFIGS = {"base": GMFlowConfig.base(), "refine": GMFlowConfig.refine()}


def tensors_in(found: Any) -> list[Tensor]:
    """Those that an operation gave."""
    return [one for one in (found if isinstance(found, tuple | list) else (found,)) if isinstance(one, Tensor)]


class Elsewhere(TorchDispatchMode):
    """Names the operations that give a tensor on another device than this one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.operations = device, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(one.device.type != self.device for one in tensors_in(found)):
            self.operations.add(str(func))
        return found


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has none for the device below."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_on_a_device_without_values(name: str) -> None:
    """Its tensors have a shape and no values, so whoever asks for one fails, as a step on a GPU would wait."""
    with torch.device("meta"):
        model = GMFlow(CONFIGS[name])
        images = [torch.empty(2, 3, 384, 512) for _ in range(2)]
        target, valid = torch.empty(2, 2, 384, 512), torch.empty(2, 384, 512, dtype=torch.bool)
    with Elsewhere("meta") as elsewhere:
        sequence_loss(model.train()(*images).predictions, target, valid).backward()
        with torch.no_grad():
            model.eval()(*images, bidirectional=True)
    assert not elsewhere.operations
    assert all(parameter.grad is not None for parameter in model.parameters())


class Largest(TorchDispatchMode):
    """How many values the largest tensor had that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.values = max(self.values, *(one.numel() for one in tensors_in(found)), 0)
        return found


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_on_an_accelerator_takes_no_mask_and_memory_that_grows_with_the_image(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of a window's tokens squared would be 4 GiB here, and rules out flash attention."""
    masks: list[Tensor | None] = []

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None
    ) -> Tensor:
        masks.append(attn_mask)
        return query + key + value  # what needs no scores; PyTorch has no fused kernel for the device below

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    config = CONFIGS[name]
    height, width, splits = 2176 // config.strides[0], 3840 // config.strides[0], config.attn_splits[0]
    with torch.device("meta"):
        transformer = FeatureTransformer(config)
        features = [torch.empty(1, height, width, config.feature_channels, requires_grad=True) for _ in range(2)]
    with Largest() as largest:
        sum(one.sum() for one in transformer(*features, splits)).backward()
    assert masks
    assert not [mask for mask in masks if mask is not None]
    assert largest.values < (height * width // splits**2) ** 2 / 2


def test_what_is_built_elsewhere_is_seen() -> None:
    with Elsewhere("meta") as elsewhere:
        torch.arange(3).to("meta")
    assert elsewhere.operations == {"aten.arange.default"}
