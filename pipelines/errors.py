"""The errors that a user can cause in a pipeline, and the decorators for scripts that report them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from datasets_etl.errors import DamagedError, DataError, StorageOutageError
from gmflow import GMFlowError
from pipelines.entry import OutageError as OutageError  # re-exported for modules that load torch anyway
from pipelines.entry import PipelineError as PipelineError
from pipelines.entry import command_for

USER_ERRORS = (PipelineError, DataError, GMFlowError)

# A retry would meet these errors again. Any other DataError may come from storage that is down for a while.
LASTING_ERRORS = (PipelineError, DamagedError, GMFlowError)

_OUTAGES = (OutageError, StorageOutageError)

command = command_for(*USER_ERRORS, outages=_OUTAGES)
resumable_command = command_for(*USER_ERRORS, outages=_OUTAGES, goes_on=True)


@contextlib.contextmanager
def naming_reference(reference: str, path: Path) -> Iterator[None]:
    """Errors about weights fetched to `path` name the reference instead, because the user knows only that."""
    try:
        yield
    except GMFlowError as error:
        raise GMFlowError(str(error).replace(str(path), reference)) from error
