"""What only an NVIDIA GPU shows; skipped where there is none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gmflow import GMFlowError, load_model
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.loss import sequence_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")

WEIGHTS = {"refine": "gmflow_refine_published.pth", "base": "gmflow_base_random.pth"}
PRECISIONS = ["fp32", "tf32", "bf16", "fp16"]

Pair = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    """As they were before."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    yield
    products.allow_tf32, convolutions.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def prepared(reference: Path, variant: str, precision: Any, **how: Any) -> nn.Module:
    return prepare_model(load_model(reference / WEIGHTS[variant]), ExecutionConfig(precision, **how), "cuda")


def on_gpu(pair: Pair, copies: int = 1) -> Pair:
    image0, image1, flow = (tensor.repeat(copies, 1, 1, 1).cuda() for tensor in pair)
    return image0, image1, flow


def step(model: nn.Module, pair: Pair) -> Tensor:
    """The loss, backpropagated."""
    image0, image1, flow = pair
    valid = torch.ones_like(flow[:, 0], dtype=torch.bool)
    loss = sequence_loss(model(image0, image1).predictions, flow, valid)
    loss.backward()
    return loss.detach()


def taken_gradients(model: nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()
    model.zero_grad()
    return found


@pytest.mark.parametrize(("key", "limit"), [("refine_eval", 2e-3), ("base_crop_eval", 3e-2)])
def test_flow_is_that_of_the_reference(
    key: str, limit: float, reference: Path, reference_outputs: Any, reference_pair: Pair, reference_crop: Pair
) -> None:
    """Other kernels make other partial sums, and the random weights of base magnify any difference."""
    model = prepared(reference, key.split("_")[0], "fp32")
    pair = on_gpu(reference_crop if "crop" in key else reference_pair)
    with torch.inference_mode():
        flow = model(*pair[:2]).flow.cpu().numpy()
    assert np.abs(flow - reference_outputs[key]).max() <= limit


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_epe_in_less_precision(precision: str, reference: Path, reference_pair: Pair) -> None:
    epe = {}
    for one in ("fp32", precision):
        model = prepared(reference, "refine", one)
        image0, image1, flow = on_gpu(reference_pair)
        with torch.inference_mode():
            epe[one] = (model(image0, image1).flow - flow).norm(dim=1).mean().item()
    assert abs(epe[precision] - epe["fp32"]) <= 0.02


@pytest.mark.parametrize(
    ("precision", "norm", "cosine"),
    [("fp32", 1e-3, 0.99999), ("tf32", 0.02, 0.99), ("bf16", 0.02, 0.99), ("fp16", 0.02, 0.99)],
)
def test_gradients_are_those_of_a_cpu(
    precision: str, norm: float, cosine: float, reference: Path, reference_crop: Pair
) -> None:
    on_cpu = load_model(reference / WEIGHTS["refine"]).train()
    wanted_loss = step(on_cpu, reference_crop)
    wanted = taken_gradients(on_cpu).double()
    model = prepared(reference, "refine", precision, same_bits=True).train()  # as stages train
    loss = step(model, on_gpu(reference_crop))
    found = taken_gradients(model).cpu().double()
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=2e-3)
    assert found.norm() / wanted.norm() == pytest.approx(1, abs=norm)
    assert torch.dot(found, wanted) >= cosine * found.norm() * wanted.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", WEIGHTS)
def test_a_step_never_waits_for_the_gpu_and_takes_the_fused_kernels(
    variant: str, precision: str, reference: Path, reference_crop: Pair
) -> None:
    model = prepared(reference, variant, precision, same_bits=True).train()
    pair = on_gpu(reference_crop)
    step(model, pair)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
            step(model, pair)
            with torch.inference_mode():
                model.eval()(*pair[:2], bidirectional=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", WEIGHTS)
def test_a_step_repeated_and_replayed_is_the_same_to_the_last_bit(
    variant: str, precision: str, checkpointing: Any, reference: Path, reference_crop: Pair
) -> None:
    how = {"same_bits": True, "checkpointing": checkpointing}
    plain, replayed = (prepared(reference, variant, precision, replay=on, **how).train() for on in (False, True))
    pair = on_gpu(reference_crop, copies=2)
    wanted_loss = step(plain, pair)
    wanted = taken_gradients(plain)
    assert wanted.isfinite().all()
    assert torch.equal(step(plain, pair), wanted_loss)
    assert torch.equal(taken_gradients(plain), wanted)
    for _ in range(4):  # as it is, recorded, replayed
        assert torch.equal(step(replayed, pair), wanted_loss)
        assert torch.equal(taken_gradients(replayed), wanted)
    step(replayed, pair)
    step(replayed, pair)  # accumulated
    assert torch.equal(taken_gradients(replayed), 2 * wanted)


def test_replayed_steps_under_ddp(reference: Path, reference_crop: Pair, tmp_path: Path) -> None:
    pair = on_gpu(reference_crop)
    plain = prepared(reference, "refine", "bf16", same_bits=True).train()
    step(plain, pair)
    wanted = taken_gradients(plain)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = prepared(reference, "refine", "bf16", same_bits=True, replay=True, ddp=True).train()
        for _ in range(4):
            with model.no_sync():
                step(model, pair)
            step(model, pair)
            assert torch.equal(taken_gradients(model), 2 * wanted)
    finally:
        torch.distributed.destroy_process_group()


def test_replayed_inference_gives_each_pair_its_own_flow(reference: Path, reference_crop: Pair) -> None:
    plain, replayed = (prepared(reference, "refine", "bf16", replay=on).eval() for on in (False, True))
    image0, image1, _ = on_gpu(reference_crop)
    pairs = [(image0, image1), (image1, image0), (image0, image0)]
    for both in (False, True):
        with torch.inference_mode():
            wanted = [plain(*pair, bidirectional=both) for pair in pairs]
            found = [replayed(*pair, bidirectional=both) for pair in pairs]
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.flow, other.flow)
            assert (one.backward_flow is None) == (not both)
            assert not both or torch.equal(one.backward_flow, other.backward_flow)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one NVIDIA GPU here")
def test_passes_are_replayed_on_a_gpu_that_is_not_the_current_one(reference: Path, reference_crop: Pair) -> None:
    pair = tuple(tensor.to("cuda:1") for tensor in reference_crop)
    plain, replayed = (
        prepare_model(
            load_model(reference / WEIGHTS["refine"]),
            ExecutionConfig("bf16", replay=on, same_bits=True),
            "cuda:1",
        )
        for on in (False, True)
    )
    with torch.inference_mode():
        wanted_flow = plain.eval()(*pair[:2]).flow
        for _ in range(3):
            assert torch.equal(replayed.eval()(*pair[:2]).flow, wanted_flow)
    wanted_loss = step(plain.train(), pair)
    wanted = taken_gradients(plain)
    for _ in range(3):
        assert torch.equal(step(replayed.train(), pair), wanted_loss)
        assert torch.equal(taken_gradients(replayed), wanted)
    assert torch.cuda.current_device() == 0


def test_a_backward_pass_whose_memory_was_taken_is_refused(reference: Path, reference_crop: Pair) -> None:
    model = prepared(reference, "base", "fp32", replay=True).train()
    pair = on_gpu(reference_crop)
    for _ in range(2):
        step(model, pair)
    first = model(*pair[:2]).flow.mean()
    model(*pair[:2])
    with pytest.raises(GMFlowError, match="another forward pass took the memory"):
        first.backward()


def test_a_model_given_up_before_another_is_recorded(reference: Path, reference_crop: Pair) -> None:
    """Its recordings are garbage, in a circle, and collected at any time: to free them would end one under way."""

    def collect(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            gc.collect()

    image0, image1, _ = on_gpu(reference_crop)
    gc.disable()
    try:
        for _ in range(2):
            model = prepared(reference, "base", "bf16", replay=True).eval()
            model.get_submodule("backbone").register_forward_pre_hook(collect)
            with torch.inference_mode():
                first, *others = [model(image0, image1).flow for _ in range(3)]
            assert all(torch.equal(first, other) for other in others)
    finally:
        gc.enable()


def test_memory_of_recordings_is_bounded_and_given_back(reference: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = prepared(reference, "base", "fp32", replay=True).eval()
    held = []
    for index in range(10):
        images = torch.rand(2, 1, 3, 128, 128 + 32 * index, device="cuda") * 255
        with torch.inference_mode():
            for _ in range(2):
                model(*images)
        held.append(torch.cuda.memory_reserved() - before)
    assert held[-1] < 2 * held[4]
    del model
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < held[0]
