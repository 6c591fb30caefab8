"""How a finished model is run: precision, activation checkpointing, compilation, data parallelism.

The model says what is computed and knows none of this; here is the one place that applies it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gmflow.backbone import Backbone, ResidualBlock
from gmflow.convolution import mend_way_back, narrow_way_back
from gmflow.errors import GMFlowError
from gmflow.model import FlowOutput, GMFlow
from gmflow.order import Order
from gmflow.process import allow_tf32, flush_denormals, keep_freed_memory_for_reuse, sum_in_order
from gmflow.replay import replay_passes
from gmflow.transformer import AttentionLayer, FeatureTransformer, FeedForward, TransformerBlock

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Checkpointing = Literal["none", "selective", "full"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_RECOMPUTED: dict[str, tuple[type[nn.Module], ...]] = {
    "none": (),
    "selective": (FeedForward, ResidualBlock),
    "full": (TransformerBlock, ResidualBlock),
}
# Where a model keeps how it was prepared: its copies carry it with them.
_PREPARED_FOR = "_prepared_for"


@dataclass(frozen=True)
class ExecutionConfig:
    """How to run a model.

    Attributes:
        precision: "fp32", on a CPU in the reference's order of operations, or the flow would be more than 0.001 px off,
            but where gradients are wanted, behind the backbone, in the fastest; "tf32" is float32 that rounds otherwise
            and takes less time: products on NVIDIA GPUs round their factors to 10 bits, a CPU adds up all of it in the
            fastest order (docs/performance.md);
            "bf16" or "fp16" compute convolutions, attention and feed-forward in that type, while parameters, residual
            stream, matching, propagation and flow stay in float32; so do, where gradients are wanted, the backbone, the
            feed-forward and on a CPU attention, but for their way back. Products that stay in float32 round as those of
            "tf32": in training they are a quarter of all, which would take most of the time, and beside
            rounding to 16 bits it was not seen to matter (docs/performance.md). Attention within windows is float16 on
            a GPU in all three, but for its way back: it rounds to 10 bits as "tf32" does. "fp16" needs a gradient
            scaler in training.
        checkpointing: what is recomputed in the backward pass instead of kept. "selective": the feed-forward's hidden
            layer and the residual blocks; "full": whole transformer blocks and the residual blocks.
        compile: run through `torch.compile`, which needs a compiler of C++ (CPU) or C (NVIDIA GPU) on this machine.
        ddp: wrap into DistributedDataParallel over the default process group.
        replay: on an NVIDIA GPU, record the operations of a pass once for each shape of images and replay them
            (`gmflow/replay.py`): the same numbers, without the time that asking for each of them takes.
        same_bits: on an NVIDIA GPU, sum in the same order every time, so that a step repeated is the same to the last
            bit; on a CPU it is anyway. A setting of the process.

    Raises:
        GMFlowError: an unknown value, or `replay` of a compiled model.
    """

    precision: Precision = "fp32"
    checkpointing: Checkpointing = "none"
    compile: bool = False
    ddp: bool = False
    replay: bool = False
    same_bits: bool = False

    def __post_init__(self) -> None:
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("checkpointing", self.checkpointing, get_args(Checkpointing))
        if self.compile and self.replay:
            raise GMFlowError("replay records what runs as it is; choose it or compile")


def prepare_model(
    model: GMFlow,
    config: ExecutionConfig,
    device: torch.device | str | None = None,
    *,
    keep_freed_memory: bool = True,
) -> nn.Module:
    """Make a model run as configured.

    The model is changed in place (its parameters and their names are not) and returned, in a
    `DistributedDataParallel` where that was asked for: its `.module` is the model. On a CPU the thread that calls this
    takes numbers below 1e-38 for zero from then on, and so do those that it computes with: run the model in it.

    Args:
        model: freshly built or loaded; not prepared before.
        config: see `ExecutionConfig`.
        device: moved there first; where it is left out, the model stays where it is.
        keep_freed_memory: on a CPU, let the process keep what is freed, which is faster (docs/performance.md). Not
            where its memory is measured, or needed by what runs in it afterwards.

    Raises:
        GMFlowError: DDP without an initialised process group, `compile` without a compiler, or a model that was
            prepared before; it is left as it was.
    """
    if _prepared_for(model) is not None:
        raise GMFlowError("this model has been prepared already; build it afresh to run it differently")
    if config.ddp and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise GMFlowError("ddp needs an initialised process group (torch.distributed.init_process_group)")
    if config.compile:
        _require_compiler(next(model.parameters()).device if device is None else torch.device(device))
    if device is not None:
        model.to(device)
    vars(model)[_PREPARED_FOR] = config
    _wrap_parts(model, config)
    place = next(model.parameters()).device
    if place.type == "cpu":
        flush_denormals()
        if keep_freed_memory:
            keep_freed_memory_for_reuse()
    if place.type == "cuda":
        allow_tf32(rounds=config.precision != "fp32")
        if config.same_bits:
            sum_in_order()
        if config.replay:
            replay_passes(model)
    if config.compile:
        model.compile()
    if not config.ddp:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[place] if place.type == "cuda" else None,
        forward_sync_buffers=False,  # they are constants
        gradient_as_bucket_view=True,
        # All are used, but else DDP would arrange the gradients anew after its first step, in the order in which they
        # come. Three and more ranks add up an element in an order that depends on its place: the first step of a
        # process that resumes would have other bits than the same step of one that went on.
        find_unused_parameters=True,
    )


def runs_in(model: nn.Module, precision: Precision | None) -> Precision:
    """The precision in which a model runs where `precision` is asked for, or none in particular.

    Raises:
        GMFlowError: an unknown precision, or one that this model does not run in.
    """
    if precision is not None:
        _check_choice("precision", precision, get_args(Precision))
    prepared = _prepared_for(model)
    if prepared is None and precision == "tf32":
        raise GMFlowError('tf32 takes a prepared model: prepare_model(model, ExecutionConfig(precision="tf32"))')
    if prepared is not None and precision not in (None, prepared.precision):
        raise GMFlowError(
            f"this model was prepared for {prepared.precision} and does not run in {precision}; "
            "leave precision out, or build the model afresh"
        )
    return prepared.precision if prepared is not None else precision or "fp32"


def _require_compiler(device: torch.device) -> None:
    """As PyTorch's compiler looks for one on a CPU, and Triton on a GPU: they would end the first pass with a trace."""
    if sys.platform != "linux" or device.type not in ("cpu", "cuda"):
        return  # other compilers, of other names
    if device.type == "cpu" and os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        return  # PyTorch gets one itself
    variable, usual = ("CXX", ("g++",)) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    named = os.environ.get(variable)
    if not any(shutil.which(name) for name in (usual if named is None else (named,))):
        missing = " or ".join(usual) if named is None else f"{variable}={named!r}"
        raise GMFlowError(
            f"compile needs a compiler, and this machine has no {missing}; "
            f"install it, name one that is there in {variable}, or leave compile out"
        )


def _prepared_for(model: nn.Module) -> ExecutionConfig | None:
    return vars(model).get(_PREPARED_FOR)


def _wrap_parts(model: GMFlow, config: ExecutionConfig) -> None:
    """All wrappers are partials of functions: so a copy of the model calls its own forward passes, and can be pickled.

    A closure over a forward pass would call that of the model it was copied from.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            mend_way_back(module)
    for module in model.modules():
        if isinstance(module, (Backbone, FeatureTransformer, AttentionLayer, FeedForward)):
            module.order = Order.FREE if config.precision != "fp32" else _order_in_fp32(module)
        if config.precision in _DTYPES and isinstance(module, Backbone):
            module.forward = partial(_wide_in_training, module.forward)  # type: ignore[method-assign]
            for convolution in (part for part in module.modules() if isinstance(part, nn.Conv2d)):
                narrow_way_back(convolution, _DTYPES[config.precision])
        if isinstance(module, _RECOMPUTED[config.checkpointing]):
            # No random numbers are drawn in the model, so there is no generator state to bring back.
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    if config.precision in _DTYPES:
        model.forward = partial(_in_16_bits, model.forward, _DTYPES[config.precision])  # type: ignore[method-assign]


def _order_in_fp32(module: nn.Module) -> Order:
    """Training magnifies what the backbone rounds otherwise ten times as much as what the rest does, and gains little.

    So twenty steps stay within a thousandth of those in the reference's order (docs/performance.md).
    """
    return Order.REFERENCE if isinstance(module, Backbone) else Order.FREE_TO_LEARN


def _in_16_bits(
    forward: Callable[..., FlowOutput],
    dtype: torch.dtype,
    image0: Tensor,
    image1: Tensor,
    *,
    bidirectional: bool = False,
) -> FlowOutput:
    with torch.autocast(image0.device.type, dtype):
        return forward(image0, image1, bidirectional=bidirectional)


def _wide_in_training(forward: Callable[..., Any], *tensors: Tensor) -> Any:
    """Rounding on the way to the loss turns gradients out of proportion (docs/performance.md)."""
    if not torch.is_grad_enabled():
        return forward(*tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return forward(*(tensor.float() for tensor in tensors))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a forward pass runs in `precision` on `device`.

    Raises:
        GMFlowError: an unknown precision.
    """
    _check_choice("precision", precision, get_args(Precision))
    return torch.autocast(device.type, dtype=_DTYPES.get(precision), enabled=precision in _DTYPES)


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise GMFlowError(f"{field} must be one of {', '.join(choices)}, not {value!r}")
