"""How a finished model is run: precision, checkpointing, compiling, DDP."""

from __future__ import annotations

import copy
import os
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from gmflow import (
    GMFlowConfig,
    GMFlowError,
)
from gmflow.backbone import Backbone
from gmflow.execution import ExecutionConfig, _require_compiler, prepare_model
from gmflow.matching import match
from gmflow.summation import SummationOrder
from tests.gmflow.models import BASE, REFINE, tiny


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_low_precision_keeps_float32_results_and_gradients(precision: Any) -> None:
    model = tiny().train()
    prepare_model(model, ExecutionConfig(precision=precision))
    out = model(*torch.rand(2, 1, 3, 64, 64) * 255)
    out.flow.abs().mean().backward()
    assert out.flow.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_an_autocast_that_is_on_by_the_time_of_the_backward_pass_may_be_of_another_type(precision: Any) -> None:
    """As where a whole step stands within the caller's: what products are in was chosen in the forward pass."""
    model = tiny(BASE).train()
    if precision is not None:
        prepare_model(model, ExecutionConfig(precision))
    images = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    gradients = []
    for on in (False, True):
        model.zero_grad()
        loss = model(*images).flow.abs().mean()
        with torch.autocast("cpu", torch.float16, enabled=on):
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    usual, found = gradients
    assert (found - usual).norm() < 0.02 * usual.norm()


@pytest.mark.parametrize(("dtype", "alike"), [(torch.bfloat16, 0.9), (torch.float16, 0.99)])
def test_a_model_that_was_not_prepared_learns_within_the_callers_autocast(dtype: torch.dtype, alike: float) -> None:
    """In whose type the backbone is as well: random weights magnify what that rounds."""
    images = torch.rand(2, 1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    gradients = []
    for on in (False, True):
        model = tiny(BASE).train()
        with torch.autocast("cpu", dtype, enabled=on):
            model(*images).flow.abs().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    exact, rounded = gradients
    assert torch.cosine_similarity(rounded, exact, dim=0) > alike


@pytest.mark.parametrize("radius", [-1, 4])
def test_matching_is_float32_whatever_surrounds_it(radius: int) -> None:
    """Rounded to 16 bits, the position of the best match is off by parts of a pixel, times the upsampling."""
    feature0, feature1 = torch.randn(2, 1, 16, 12, 14, generator=torch.Generator().manual_seed(0))
    usual = match(feature0, feature1, radius)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(feature0, feature1, radius), usual)


def test_images_are_float32_until_they_are_normalised_features_whatever_surrounds_them() -> None:
    """With the 8 bits of bfloat16, neighbouring shades would become one."""
    backbone, types = tiny(BASE).backbone, []
    for part in (backbone.stem, backbone.projection):
        part.register_forward_hook(lambda _, __, out: types.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        backbone(torch.rand(1, 3, 32, 32) * 255)
    assert types == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("radius", [-1, 1])
def test_propagation_is_float32_whatever_surrounds_it(radius: int) -> None:
    generator = torch.Generator().manual_seed(0)
    feature, flow = torch.randn(1, 12, 14, 16, generator=generator), 50 * torch.randn(1, 2, 12, 14, generator=generator)
    propagation = tiny(GMFlowConfig(feature_channels=16, num_layers=1)).propagation
    usual = propagation(feature, flow, radius)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(propagation(feature, flow, radius), usual)


@pytest.mark.parametrize(
    ("precision", "order"),
    [
        (None, SummationOrder.REFERENCE),
        ("fp32", SummationOrder.FREE_TO_LEARN),
        ("tf32", SummationOrder.FREE),
        ("bf16", SummationOrder.FREE),
        ("fp16", SummationOrder.FREE),
    ],
)
def test_every_part_has_the_order_of_sums_of_its_precision(precision: Any, order: SummationOrder) -> None:
    model = tiny()
    if precision is not None:
        prepare_model(model, ExecutionConfig(precision))
    told = [module.summation for module in model.modules() if hasattr(module, "summation")]
    assert isinstance(next(module for module in model.modules() if hasattr(module, "summation")), Backbone)
    # Backbone, transformer, and of each layer two kinds of attention and the feed-forward.
    in_backbone = SummationOrder.REFERENCE if order is SummationOrder.FREE_TO_LEARN else order
    assert told == [in_backbone] + [order] * (1 + 3 * model.config.num_layers)


def test_only_what_learns_on_a_cpu_is_free_of_the_references_order() -> None:
    cpu, elsewhere = torch.device("cpu"), torch.device("cuda")
    with torch.enable_grad():
        assert [order.is_free(cpu) for order in SummationOrder] == [False, True, True]
        assert [order.is_free(elsewhere) for order in SummationOrder] == [False, False, True]
    with torch.no_grad():
        assert [order.is_free(cpu) for order in SummationOrder] == [False, False, True]


@pytest.mark.parametrize("field", ["precision", "checkpointing"])
def test_unknown_execution_settings_name_the_known_ones(field: str) -> None:
    with pytest.raises(GMFlowError, match=f"{field} must be one of"):
        ExecutionConfig(**{field: "fast"})


@pytest.mark.parametrize(
    "config", [ExecutionConfig(), ExecutionConfig(checkpointing="full"), ExecutionConfig("bf16", "full")]
)
def test_a_model_is_prepared_once_and_keeps_its_parameter_names(config: ExecutionConfig) -> None:
    model = tiny()
    names = list(model.state_dict())
    prepare_model(model, config)
    assert list(model.state_dict()) == names
    for prepared in (model, copy.deepcopy(model)):
        with pytest.raises(GMFlowError, match="prepared already"):
            prepare_model(prepared, ExecutionConfig())


def test_ddp_without_a_process_group_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = tiny()
    with pytest.raises(GMFlowError, match="process group"):
        prepare_model(model, ExecutionConfig("bf16", "full", ddp=True))
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    prepare_model(model, ExecutionConfig())


COMPILERS = [  # device, what the environment names, what is installed, what is missed
    ("cpu", {}, (), "g++"),
    ("cpu", {}, ("gcc", "clang", "clang++"), "g++"),
    ("cpu", {}, ("g++",), None),
    ("cpu", {"CXX": "clang++"}, ("g++",), "CXX='clang++'"),
    ("cpu", {"CXX": "clang++"}, ("clang++",), None),
    ("cpu", {"CXX": ""}, ("g++",), "CXX=''"),
    ("cpu", {"TORCH_INDUCTOR_INSTALL_GXX": "1"}, (), None),
    ("cuda", {}, (), "gcc or clang"),
    ("cuda", {}, ("g++",), "gcc or clang"),
    ("cuda", {}, ("gcc",), None),
    ("cuda", {}, ("clang",), None),
    ("cuda", {"CC": "icx"}, ("gcc",), "CC='icx'"),
]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which programs are looked for."""
    for name in ("CC", "CXX", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="compilers have other names there")
@pytest.mark.parametrize(("device", "named", "installed", "missed"), COMPILERS)
def test_compile_is_refused_where_its_compiler_would_not_be_found(
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    named: dict[str, str],
    installed: tuple[str, ...],
    missed: str | None,
) -> None:
    for variable, value in named.items():
        monkeypatch.setenv(variable, value)
    for name in installed:
        (programs / name).touch(mode=0o755)
    if missed is None:
        _require_compiler(torch.device(device))
        return
    variable = "CXX" if device == "cpu" else "CC"
    told = f"this machine has no {missed}; install it, name one that is there in {variable}, or leave compile out"
    with pytest.raises(GMFlowError, match=f"^compile needs a compiler, and {re.escape(told)}$"):
        _require_compiler(torch.device(device))


@pytest.mark.usefixtures("programs")
@pytest.mark.skipif(sys.platform != "linux", reason="compilers have other names there")
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_compile_without_a_compiler_leaves_the_model_as_it_was(device: str | None) -> None:
    model = tiny()
    with pytest.raises(GMFlowError, match="compile needs a compiler"):
        prepare_model(model, ExecutionConfig("bf16", "full", compile=True), device)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    prepare_model(model, ExecutionConfig())


@pytest.mark.parametrize("how", ["copied", "pickled"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_prepared_models_copy_computes_with_its_own_weights(precision: Any, checkpointing: Any, how: str) -> None:
    model = tiny().train()
    prepare_model(model, ExecutionConfig(precision, checkpointing))
    copied = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))  # noqa: S301
    images = torch.rand(2, 1, 3, 64, 64) * 255
    flow = model(*images).flow
    assert torch.equal(copied(*images).flow, flow)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    zeroed = copied(*images).flow
    assert not torch.equal(zeroed, flow)
    assert torch.equal(model(*images).flow, flow)
    zeroed.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in copied.parameters())


@pytest.fixture
def tf32_settings() -> Iterator[tuple[Any, Any]]:
    """Of the process, and afterwards as they were before."""
    settings: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flags.allow_tf32 for flags in settings]
    yield settings
    for flags, allowed in zip(settings, before, strict=True):
        flags.allow_tf32 = allowed


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_products_that_stay_in_float32_round_their_factors_on_a_gpu_unless_fp32_is_asked_for(
    precision: Any, tf32_settings: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training they are a quarter of the operations, of which plain float32 would make most of the time."""
    for flags in tf32_settings:
        flags.allow_tf32 = precision == "fp32"  # the other way round
    model = tiny()
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(model, "parameters", lambda: iter([on_a_gpu]))
    prepare_model(model, ExecutionConfig(precision))
    assert [flags.allow_tf32 for flags in tf32_settings] == [precision != "fp32"] * 2


def _train_rank(rank: int, folder: str, precision: Any, checkpointing: Any) -> None:
    """Saves the gradients of the same step three times: this rank's own, and all ranks' by a fresh DDP and by the same
    DDP later.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    warnings.filterwarnings("error", "Grad strides do not match")  # which DDP would say to every user
    model = prepare_model(tiny().train(), ExecutionConfig(precision, checkpointing, ddp=True))
    assert isinstance(model, DistributedDataParallel)
    images = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(rank)) * 255

    def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        sum(prediction.abs().mean() for prediction in module(*images).predictions).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    fresh, later = gradients(model), gradients(model)
    with model.no_sync():
        torch.save((gradients(model), fresh, later), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    # One of gloo's threads may still hold a Python object with the last sum; should it let go of that while the
    # interpreter is ending, the process aborts. Nothing is left to do here, so the interpreter is not ended.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", "none"), ("fp32", "full"), ("bf16", "full")])
def test_ranks_under_ddp_get_the_same_gradients_in_their_first_step_and_later(
    precision: str, checkpointing: str, tmp_path: Path
) -> None:
    """To the bit, as a resumed run's first step needs: from three ranks on, the order of a sum may show."""
    spawn(_train_rank, (str(tmp_path), precision, checkpointing), nprocs=3)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert len(ranks[0][0]) == len(list(tiny().parameters()))
    for number, own in enumerate(zip(*(rank[0] for rank in ranks), strict=True)):
        synced = [of_all[number] for rank in ranks for of_all in rank[1:]]
        assert all(torch.equal(synced[0], other) for other in synced)
        torch.testing.assert_close(synced[0], torch.stack(own).mean(dim=0))


def test_what_loops_over_chunks_stays_out_of_compiled_graphs() -> None:
    graphs: list[set[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append({str(node.target) for node in module.graph.nodes})
        return module.forward

    model = tiny().eval()
    images = torch.rand(2, 1, 3, 64, 64) * 255
    with torch.no_grad():
        wanted = model(*images).flow
        compiled = torch.compile(model, backend=backend)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # not compiled anew for every window either
            torch.testing.assert_close(compiled(*images).flow, wanted, rtol=0, atol=1e-4)
    assert graphs
    assert not [graph for graph in graphs if any("new_empty" in name or "gelu" in name for name in graph)]


def saved_bytes(checkpointing: Any) -> int:
    """What a training pass keeps for its backward pass; each piece of memory counts once."""
    model = tiny(REFINE).train()
    prepare_model(model, ExecutionConfig(checkpointing=checkpointing))
    pieces: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(*torch.rand(2, 1, 3, 64, 96) * 255)
    assert out.flow.requires_grad
    return sum(pieces.values())


def test_checkpointing_keeps_less_the_more_is_recomputed() -> None:
    nothing, selective, full = (saved_bytes(how) for how in ("none", "selective", "full"))
    assert full < 0.9 * selective < 0.9**2 * nothing, (nothing, selective, full)


def test_a_model_is_compiled_and_moved_where_that_is_asked_for() -> None:
    model = tiny(BASE)
    prepare_model(model, ExecutionConfig(compile=True), "meta")
    assert model._compiled_call_impl is not None
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
