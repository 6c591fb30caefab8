"""What a user can cause in a pipeline, and how a command says so."""

import functools
import logging
import os
import sys
from collections.abc import Callable

from datasets_etl.errors import DamagedError, DataError
from gmflow import GMFlowError


class PipelineError(Exception):
    """A wrong config, reference or state: one line saying what, where and what to do."""


USER_ERRORS = (PipelineError, DataError, GMFlowError)

# Met again by who tries again; other errors of data may be of storage that is away.
LASTING_ERRORS = (PipelineError, DamagedError, GMFlowError)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """A script's entry: errors of the user's become one line on stderr and exit code 2, never a trace."""

    @functools.wraps(main)
    def run() -> None:
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        try:
            main()
            sys.stdout.flush()
        except USER_ERRORS as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # `… | head` closed our stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return run
