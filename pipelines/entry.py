"""How a script ends: with one line about an error that its user can fix, or about an interruption.

This module loads fast, without torch, Ray or MLflow: a node that is taken away has only seconds (see `preemption.py`).
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

Main = Callable[[], None]


class PipelineError(Exception):
    """A wrong config, reference or state; its message says in one line what is wrong, where, and what to do."""


class OutageError(PipelineError):
    """Nothing is wrong with what the user gave: Ray or MLflow is away, or workers were lost. The same command may
    succeed later.
    """


def first_line(error: BaseException) -> str:
    """What an error of a library says, for a message of ours: at most 200 characters, as the rest may be a whole page.
    The name of its type if it says nothing.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def last_line(error: BaseException) -> str:
    """As `first_line`, for an error whose message is a traceback, such as Ray's: at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def command_for(
    *user_errors: type[Exception], outages: tuple[type[Exception], ...] = (OutageError,), goes_on: bool = False
) -> Callable[[Main], Main]:
    """Decorator for a script's `main`: user errors become one line on stderr and exit code 2, never a traceback.

    Args:
        user_errors: their types.
        outages: those of them after which the same command may succeed later: exit code 1.
        goes_on: whether the same command, given again after an interruption, goes on where it was.
    """

    def command(main: Main) -> Main:
        @functools.wraps(main)
        def run() -> None:
            if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see pipelines/__init__.py
                signal.signal(signal.SIGINT, signal.default_int_handler)
            logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
            try:
                main()
                sys.stdout.flush()
            except user_errors as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                sys.exit(1 if isinstance(error, outages) else 2)
            except KeyboardInterrupt:
                print("interrupted" + goes_on * "; the same command goes on from here", file=sys.stderr)
                sys.exit(130)
            except BrokenPipeError:  # `… | head` closed our stdout
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)

        return run

    return command


@contextlib.contextmanager
def interrupted_by(number: signal.Signals) -> Iterator[None]:
    """Handle a signal like Ctrl-C for the length of a `with`. Outside the main thread this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)
