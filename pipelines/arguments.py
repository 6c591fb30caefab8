"""Arguments that several commands have, and types of arguments."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, get_args

if TYPE_CHECKING:
    import torch


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, as commands say whatever their user can mend."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help shows what there is\n")


def positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def not_negative(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def local_path(text: str) -> Path:
    """A path on this machine, for what is written as plain files."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; give a path on this machine")
    return Path(text)


def size(text: str) -> tuple[int, int]:
    """Height and width, such as "768x1024"."""
    height, cross, width = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, such as 768x1024")
    return positive(height), positive(width)


def device(text: str) -> torch.device:
    """A torch device by name; "auto" is the GPU if there is one, otherwise the CPU."""
    import torch  # only where it is needed: the import takes seconds

    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device this runs on; write auto, cpu, cuda or cuda:N")
    chosen = torch.device(text)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`, a reference that `resolve_model` takes."""
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS or /VERSION, .pth, .safetensors, checkpoint")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """`--precision`, by default the reference's float32."""
    from gmflow.execution import Precision  # imports torch, see `device`

    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="(default: %(default)s)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, of a command that computes in its own process."""
    parser.add_argument(
        "--device", type=device, default=device("auto"), help="cpu, cuda, cuda:1 (default: best there is)"
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """`--overwrite`, of a command that otherwise goes on with what an earlier run of it left, see `claim_output`."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="keep nothing of an earlier run; to go on after an interruption, leave it out",
    )
