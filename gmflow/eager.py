"""Functions that `torch.compile` leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import ParamSpec, TypeVar

import torch._C._dynamo.eval_frame as frames

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator for functions that loop over chunks: a compiler would take minutes to unroll the loops.

    `torch.compiler.disable` does the same, but loads the compiler at once, which takes as long as loading PyTorch. With
    this decorator it is loaded only when something is compiled.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    # The graph ends before a call of it. Its frame, and all frames below, run without being compiled.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    skip = frames._FrameAction.SKIP
    code: CodeType = call.__code__  # type: ignore[attr-defined]
    frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
    return call
