"""Functions that `torch.compile` leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """For functions that loop over chunks: a compiler would unroll them, for minutes.

    `torch.compiler.disable` does the same, but loads the compiler at once, which takes as long as loading PyTorch;
    here it is loaded by who compiles.
    """

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def left_alone(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return left_alone(*args, **kwargs) if torch.compiler.is_dynamo_compiling() else function(*args, **kwargs)

    return call
