"""A model's passes on an NVIDIA GPU, recorded once for a shape of images and replayed from then on (CUDA graphs).

A pass is some thousand small operations. With few images a GPU finishes each of them long before the processor has
launched the next; a recording launches all of them at once. The operations are the same, and so are the numbers.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gmflow.errors import GMFlowError
from gmflow.model import FlowOutput, GMFlow

KEPT = 4
"""Recordings that a model keeps at most: each holds the memory of its pass."""

PASSES_AFTER_LACK = 50
"""How often a pass runs normally after its recording was dropped for lack of memory.

Validation on large images may lack the memory that the recording of a training step holds, and comes again and again;
so recordings are made again, but not so often that making them takes the time they save.
"""

WARM_UPS = 2
"""Passes of a shape that take longer than later ones: one that runs normally, and one that is recorded."""

_log = logging.getLogger(__name__)

Forward = Callable[..., FlowOutput]


class _Recording(Protocol):
    def __call__(self, image0: Tensor, image1: Tensor) -> FlowOutput: ...


def replay_passes(model: GMFlow) -> None:
    """Record the passes of a model on a GPU and replay them; in place.

    The first pass of a shape and mode runs normally and warms up; the second is recorded; later ones are replayed. In
    training, call backward before the next forward pass. Passes that need gradients for the images, or gradients in
    both directions, are never recorded. If a forward pass runs out of GPU memory, all recordings in this process are
    dropped and the pass runs normally. What was dropped is recorded again `PASSES_AFTER_LACK` passes later.

    Do not call the model from two threads at once: replays of one recording share its memory.
    """
    model.forward = partial(_forward, Recordings(), model, model.forward)  # type: ignore[method-assign]


def _forward(
    recordings: Recordings,
    model: GMFlow,
    forward: Forward,
    image0: Tensor,
    image1: Tensor,
    *,
    bidirectional: bool = False,
) -> FlowOutput:
    run_normally = partial(forward, image0, image1, bidirectional=bidirectional)
    device = image0.device.type
    learning = tuple(parameter.requires_grad for parameter in model.parameters())
    with_gradients = torch.is_grad_enabled() and any(learning)
    for_images = torch.is_grad_enabled() and (image0.requires_grad or image1.requires_grad)
    if not _can_record(device) or for_images or (with_gradients and bidirectional):
        return run_normally()
    of_images = tuple((image.shape, image.dtype, image.device) for image in (image0, image1))
    modes = model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), bidirectional
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # A model that was moved has its parameters elsewhere in memory, and one that was partly frozen has other gradients.
    key = of_images, modes, autocast, next(model.parameters()).data_ptr(), learning
    record = partial(_record, model, forward, image0, image1, bidirectional, with_gradients)
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return _replayed(recordings, key, record, run_normally, image0, image1)
    # Out of memory. Outside the block above, where the error no longer holds the tensors of the pass that failed.
    if recordings.lacked_memory(key):
        _log.warning("GPU memory does not suffice to record passes of images %s", tuple(image0.shape))
    torch.cuda.empty_cache()
    return run_normally()


def _can_record(device: str) -> bool:
    """Not after a model that was prepared on a GPU was moved away, or was loaded elsewhere."""
    return device == "cuda"


def _replayed(
    recordings: Recordings,
    key: Any,
    record: Callable[[], _Recording],
    run_normally: Callable[[], FlowOutput],
    image0: Tensor,
    image1: Tensor,
) -> FlowOutput:
    recording = recordings.of(key, record)
    if recording is not None:
        return recording(image0, image1)
    out = run_normally()
    recordings.saw(key)
    return out


_of_this_process: weakref.WeakSet[Recordings] = weakref.WeakSet()


class Recordings:
    """The recordings of one model, by key (shape, type, mode, …, see `_forward`); the `KEPT` used last are kept.

    A copy starts empty, because recordings point into the original's memory.
    """

    def __init__(self) -> None:
        _of_this_process.add(self)
        self._seen: dict[Any, int] = {}  # how many passes ran normally
        self._too_large: set[Any] = set()
        self._kept: OrderedDict[Any, _Recording] = OrderedDict()

    def of(self, key: Any, record: Callable[[], _Recording]) -> _Recording | None:
        """The recording of this key. If there is none, it is made now if its pass has run normally; otherwise None."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._seen.get(key, 0) < 1 or key in self._too_large:
            return None
        while len(self._kept) >= KEPT:
            self._kept.popitem(last=False)
        self._kept[key] = record()
        return self._kept[key]

    def saw(self, key: Any) -> None:
        """Note that a pass of this key ran normally, without an error: the next one may be recorded."""
        self._seen[key] = self._seen.get(key, 0) + 1

    def lacked_memory(self, key: Any) -> bool:
        """Memory ran out in a pass of this key: drop all recordings of this process; they are made again later.

        If there were none, the pass itself is too large to be recorded, and never will be. Returns whether that is so.
        """
        holding = [each for each in _of_this_process if each._kept]
        for each in holding:
            each._seen.update(dict.fromkeys(each._kept, 1 - PASSES_AFTER_LACK))
            each._kept.clear()
        if holding:
            self._seen[key] = 1 - PASSES_AFTER_LACK
        else:
            self._too_large.add(key)
        return not holding

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()


def _record(
    model: GMFlow, forward: Forward, image0: Tensor, image1: Tensor, bidirectional: bool, with_gradients: bool
) -> _Recording:
    images = [image0.detach().clone(), image1.detach().clone()]
    compute = partial(forward, *images, bidirectional=bidirectional)
    if not with_gradients:
        with _own_casts():
            return _InferencePass(images, compute)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _aliases(model) as aliases, _own_casts():
        return _TrainingPass(images, compute, parameters, [aliases[parameter] for parameter in parameters])


@contextlib.contextmanager
def _own_casts() -> Iterator[None]:
    """A pass within the block makes its own 16-bit copies of parameters, and none of them is used after it.

    Within the caller's `torch.autocast` such copies are kept from pass to pass, and freed at its end: a recording that
    read them would go on reading their memory.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _aliases(model: nn.Module) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Within the block the model computes with other tensors in the memory of its parameters; yields them by parameter.

    With the parameters themselves, a recording would depend on the stream on which somebody began to wait for their
    gradients, as DistributedDataParallel does. It must not.
    """
    places = [(module._parameters, name) for module in model.modules() for name in module._parameters]
    own = [parameters[name] for parameters, name in places]
    aliases = {one: one.detach().requires_grad_(one.requires_grad) for one in own if one is not None}
    try:
        for (parameters, name), one in zip(places, own, strict=True):
            parameters[name] = None if one is None else aliases[one]  # type: ignore[assignment]
        yield aliases
    finally:
        for (parameters, name), one in zip(places, own, strict=True):
            parameters[name] = one


class _Graph:
    """A CUDA graph: operations on a GPU, recorded once, that can then be launched all at once."""

    def __init__(self, pool: Any, device: torch.device) -> None:
        self._graph, self._pool, self._device = torch.cuda.CUDAGraph(), pool, device

    def record(self, compute: Callable[[], Any]) -> Any:
        # Record this thread alone: what others do meanwhile, such as pinning the next batch, must not disturb it.
        recording = torch.cuda.graph(
            self._graph, pool=self._pool, stream=_stream(self._device), capture_error_mode="thread_local"
        )
        with torch.cuda.device(self._device), _no_garbage_collected(), recording:
            return compute()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Collect garbage before the block, and not within it: freeing another model's recordings would break this one."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a GPU's passes are recorded: one for all, because cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _InferencePass:
    def __init__(self, images: list[Tensor], compute: Callable[[], FlowOutput]) -> None:
        self._images = images
        self._graph = _Graph(torch.cuda.graph_pool_handle(), images[0].device)
        self._out: FlowOutput = self._graph.record(compute)

    def __call__(self, image0: Tensor, image1: Tensor) -> FlowOutput:
        _put(self._images, (image0, image1))
        self._graph.replay()
        backward = None if self._out.backward_flow is None else self._out.backward_flow.clone()
        return _output([prediction.clone() for prediction in self._out.predictions], backward)


class _TrainingPass:
    """A recorded forward pass and a recorded backward pass; between them, the loss's gradients are copied in."""

    def __init__(
        self,
        images: list[Tensor],
        compute: Callable[[], FlowOutput],
        parameters: list[nn.Parameter],
        aliases: list[Tensor],
    ) -> None:
        self.images, self.parameters = images, parameters
        pool, device = torch.cuda.graph_pool_handle(), images[0].device
        self.forward, self.backward = _Graph(pool, device), _Graph(pool, device)
        predictions = self.forward.record(lambda: compute().predictions)
        self.upper = [torch.zeros_like(prediction) for prediction in predictions]

        def gradients() -> Tensor:
            found = torch.autograd.grad(predictions, aliases, self.upper, materialize_grads=True)
            return torch.cat([gradient.flatten() for gradient in found])  # one copy a pass instead of many

        self.gradients: Tensor = self.backward.record(gradients)
        self.predictions = [prediction.detach() for prediction in predictions]
        self.turn = 0

    def __call__(self, image0: Tensor, image1: Tensor) -> FlowOutput:
        predictions = _Replay.apply(self, image0, image1, *self.parameters)  # type: ignore[no-untyped-call]
        return _output(predictions, None)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: _TrainingPass, image0: Tensor, image1: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        _put(recorded.images, (image0, image1))
        recorded.forward.replay()
        recorded.turn += 1
        ctx.recorded, ctx.turn = recorded, recorded.turn
        return tuple(prediction.clone() for prediction in recorded.predictions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upper: Tensor) -> tuple[Tensor | None, ...]:
        recorded: _TrainingPass = ctx.recorded
        if ctx.turn != recorded.turn:
            raise GMFlowError(
                "another forward pass took the memory of this one; do each backward pass before the next forward pass, "
                "or prepare the model without replay"
            )
        _put(recorded.upper, upper)
        recorded.backward.replay()
        parts = torch.split(recorded.gradients.clone(), [parameter.numel() for parameter in recorded.parameters])
        return None, None, None, *(part.view_as(one) for part, one in zip(parts, recorded.parameters, strict=True))


def _put(memory: Iterable[Tensor], tensors: Iterable[Tensor]) -> None:
    for own, given in zip(memory, tensors, strict=True):
        own.copy_(given)


def _output(predictions: Sequence[Tensor], backward: Tensor | None) -> FlowOutput:
    return FlowOutput(predictions[-1], backward, tuple(predictions))
