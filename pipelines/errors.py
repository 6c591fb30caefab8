"""The errors that a user can cause in a pipeline, and the decorator for scripts that reports them."""

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
