"""How a script ends: it says what its user can mend, and what interrupted it.

Nothing here takes long to load: no torch, no Ray, no MLflow. A node that is taken away has seconds (`preemption.py`).
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
    """A wrong config, reference or state: one line saying what, where and what to do."""


def command_for(*user_errors: type[Exception]) -> Callable[[Main], Main]:
    """A script's entry: errors of the user's become one line on stderr and exit code 2, never a trace."""

    def command(main: Main) -> Main:
        @functools.wraps(main)
        def run() -> None:
            logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
            try:
                main()
                sys.stdout.flush()
            except user_errors as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                sys.exit(2)
            except KeyboardInterrupt:
                print("interrupted; the same command goes on from here", file=sys.stderr)
                sys.exit(130)
            except BrokenPipeError:  # `… | head` closed our stdout
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)

        return run

    return command


@contextlib.contextmanager
def interrupted_by(number: signal.Signals) -> Iterator[None]:
    """A signal is as good as Ctrl-C for the length of a `with`, where that is in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)
