"""How a finished model is run: precision, activation checkpointing, compilation, data parallelism.

The model says what is computed and knows nothing of this. It is applied here and nowhere else.
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
from gmflow.convolution import mend_backward, narrow_backward
from gmflow.errors import GMFlowError
from gmflow.model import FlowOutput, GMFlow
from gmflow.process import allow_tf32, flush_denormals, keep_freed_memory_for_reuse, sum_in_order
from gmflow.replay import replay_passes
from gmflow.summation import SummationOrder
from gmflow.transformer import AttentionLayer, FeatureTransformer, FeedForward, TransformerBlock

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Checkpointing = Literal["none", "selective", "full"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_RECOMPUTED: dict[str, tuple[type[nn.Module], ...]] = {
    "none": (),
    "selective": (FeedForward, ResidualBlock),
    "full": (TransformerBlock, ResidualBlock),
}
# The attribute in which a model keeps how it was prepared; its copies have it too.
_PREPARED_FOR = "_prepared_for"


@dataclass(frozen=True)
class ExecutionConfig:
    """How to run a model.

    Attributes:
        precision: what products are computed in. Parameters, the residual stream, matching, propagation and flow are
            float32 in all four.
            "fp32": float32. On a CPU, inference adds up in the reference's order; another order moves the flow by more
            than 0.001 px. Training keeps that order in the backbone alone and takes the fastest elsewhere.
            "tf32": float32 that rounds differently and takes less time. NVIDIA GPUs round the factors of products to 10
            bits; a CPU adds up in the fastest order.
            "bf16", "fp16": convolutions, attention and feed-forward in 16 bits. Where gradients are wanted, the
            backbone, the feed-forward and (on a CPU) attention stay in float32 in the forward pass; only their
            backward pass is in 16 bits. Products that stay in float32 round as with "tf32". "fp16" needs a gradient
            scaler.
            On a GPU, attention within windows is float16 in the forward pass of all but "fp32". See
            docs/performance.md.
        checkpointing: what is recomputed in the backward pass instead of kept. "selective": the feed-forward's hidden
            layer and the residual blocks; "full": whole transformer blocks and the residual blocks.
        compile: run through `torch.compile`, which needs a C++ compiler (CPU) or a C compiler (NVIDIA GPU) on this
            machine.
        ddp: wrap into DistributedDataParallel over the default process group.
        replay: on an NVIDIA GPU, record the operations of a pass once for each shape of images and replay them
            (`gmflow/replay.py`): the same numbers, without the time that launching each operation takes.
        same_bits: on an NVIDIA GPU, add up in the same order every time, so that a repeated step is the same to the
            last bit; on a CPU it is anyway. It holds for the whole process and is never taken back.

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
            raise GMFlowError("replay does not work on a compiled model; choose it or compile")


def prepare_model(
    model: GMFlow,
    config: ExecutionConfig,
    device: torch.device | str | None = None,
    *,
    keep_freed_memory: bool = True,
) -> nn.Module:
    """Make a model run as configured.

    The model is changed in place (its parameters and their names are not) and returned, in a
    `DistributedDataParallel` where that was asked for: its `.module` is the model.

    Some settings hold for more than the model. On a CPU, the calling thread and the threads that compute for it take
    numbers below 1e-38 for zero from then on: run the model in that thread. On an NVIDIA GPU, whether float32 products
    round is a setting of the process, and the model prepared last decides: models prepared for "fp32" and for another
    precision must not be used in one process. `same_bits` stays on for the process, too.

    Args:
        model: freshly built or loaded; not prepared before.
        config: see `ExecutionConfig`.
        device: where to move the model first; left out, it stays where it is.
        keep_freed_memory: on a CPU, let the process keep freed memory, which is faster (docs/performance.md). Turn it
            off where the process's memory is measured, or where other work in the process needs that memory.

    Raises:
        GMFlowError: DDP without an initialised process group, `compile` without a compiler, or a model that was
            prepared before. The model is then unchanged.
    """
    if prepared_for(model) is not None:
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
        # All parameters are used. But without this, DDP rearranges the gradients after its first step, in the order in
        # which they become ready, and with three or more ranks the order in which an element is added up depends on its
        # place. The first step of a resumed process would then have other bits than the same step of one that went on.
        find_unused_parameters=True,
    )


def runs_in(model: nn.Module, precision: Precision | None) -> Precision:
    """The precision in which a model runs if `precision` is asked for; None asks for none in particular.

    Raises:
        GMFlowError: an unknown precision, or one that this model does not run in.
    """
    if precision is not None:
        _check_choice("precision", precision, get_args(Precision))
    prepared = prepared_for(model)
    if prepared is None and precision == "tf32":
        raise GMFlowError(
            'tf32 takes a prepared model: gmflow.execution.prepare_model(model, ExecutionConfig(precision="tf32"))'
        )
    if prepared is not None and precision not in (None, prepared.precision):
        raise GMFlowError(
            f"this model was prepared for {prepared.precision} and does not run in {precision}; "
            "leave precision out, or build the model afresh"
        )
    return prepared.precision if prepared is not None else precision or "fp32"


def _require_compiler(device: torch.device) -> None:
    """Look for a compiler as PyTorch's compiler does on a CPU, and Triton on a GPU.

    Without this check, a missing one would end the first forward pass with a traceback.
    """
    if sys.platform != "linux" or device.type not in ("cpu", "cuda"):
        return  # there, compilers have other names
    if device.type == "cpu" and os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        return  # PyTorch then installs one itself
    variable, usual = ("CXX", ("g++",)) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    named = os.environ.get(variable)
    if not any(shutil.which(name) for name in (usual if named is None else (named,))):
        missing = " or ".join(usual) if named is None else f"{variable}={named!r}"
        raise GMFlowError(
            f"compile needs a compiler, and this machine has no {missing}; "
            f"install it, name one that is there in {variable}, or leave compile out"
        )


def prepared_for(model: nn.Module) -> ExecutionConfig | None:
    """How `prepare_model` prepared this model; None if it did not."""
    return vars(model).get(_PREPARED_FOR)


def _wrap_parts(model: GMFlow, config: ExecutionConfig) -> None:
    """Replace forward passes by partials of functions, so that copies of the model call their own, and can be pickled.

    A closure would still call the forward pass of the model that was copied.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            mend_backward(module)
    for module in model.modules():
        if isinstance(module, (Backbone, FeatureTransformer, AttentionLayer, FeedForward)):
            module.summation = SummationOrder.FREE if config.precision != "fp32" else _summation_in_fp32(module)
        if config.precision in _DTYPES and isinstance(module, Backbone):
            module.forward = partial(_wide_in_training, module.forward)  # type: ignore[method-assign]
            for convolution in (part for part in module.modules() if isinstance(part, nn.Conv2d)):
                narrow_backward(convolution, _DTYPES[config.precision])
        if isinstance(module, _RECOMPUTED[config.checkpointing]):
            # No random numbers are drawn in the model, so there is no generator state to bring back.
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    if config.precision in _DTYPES:
        model.forward = partial(_in_16_bits, model.forward, _DTYPES[config.precision])  # type: ignore[method-assign]


def _summation_in_fp32(module: nn.Module) -> SummationOrder:
    """The backbone keeps the reference's order also in training.

    Training magnifies a different rounding of the backbone ten times as much as one of the rest, and another order
    saves little time there. This way, twenty steps stay within a thousandth of those in the reference's order
    (docs/performance.md).
    """
    return SummationOrder.REFERENCE if isinstance(module, Backbone) else SummationOrder.FREE_TO_LEARN


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
    """In float32 where gradients are wanted: rounding a forward pass changes them too much (docs/performance.md)."""
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
