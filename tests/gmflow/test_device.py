"""A step stays on its device: no tensor is built on the host and moved, no value is read back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gmflow import GMFlow, GMFlowConfig
from gmflow.loss import sequence_loss

CONFIGS = {"base": GMFlowConfig.base(), "refine": GMFlowConfig.refine()}


class Elsewhere(TorchDispatchMode):
    """Names the operations that give a tensor on another device than this one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.operations = device, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, torch.Tensor) and one.device.type != self.device:
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


def test_what_is_built_elsewhere_is_seen() -> None:
    with Elsewhere("meta") as elsewhere:
        torch.arange(3).to("meta")
    assert elsewhere.operations == {"aten.arange.default"}
