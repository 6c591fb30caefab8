"""What a user can cause in a pipeline, and the entry of a script that says so."""

from datasets_etl.errors import DamagedError, DataError
from gmflow import GMFlowError
from pipelines.entry import PipelineError as PipelineError  # from here to all that load torch anyway
from pipelines.entry import command_for

USER_ERRORS = (PipelineError, DataError, GMFlowError)

# Met again by who tries again; other errors of data may be of storage that is away.
LASTING_ERRORS = (PipelineError, DamagedError, GMFlowError)

command = command_for(*USER_ERRORS)
