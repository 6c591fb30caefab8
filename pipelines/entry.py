"""How a script says what its user can mend.

Nothing here takes long to load: no torch, no Ray, no MLflow. A node that is taken away has seconds (`preemption.py`).
"""

import functools
import logging
import os
import sys
from collections.abc import Callable

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
