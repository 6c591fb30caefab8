"""Long commands that go on where they stopped: a note in the output says what its files are of."""

import json
from collections.abc import Mapping
from typing import Any

from datasets_etl.errors import DataError
from datasets_etl.storage import ObjectStore
from pipelines.errors import PipelineError

_NOTE = "made_by.json"


def claim_output(output: ObjectStore, job: Mapping[str, Any], *, overwrite: bool) -> set[str]:
    """Note in `output` what it is made by, and find what an interrupted run of the same job has written there.

    Args:
        output: where the files go.
        job: all that decides their content, as JSON.
        overwrite: take over the output of another job, and keep nothing.

    Returns:
        Keys of the files that may be kept.

    Raises:
        PipelineError: the output is of another job, and not to be overwritten.
    """
    noted = None
    if output.size(_NOTE) is not None:
        try:
            noted = json.loads(output.read(_NOTE))
        except (ValueError, DataError):
            noted = {}
    wanted = json.loads(json.dumps(job))
    if noted is not None and noted != wanted and not overwrite:
        differing = sorted(name for name in {*noted, *wanted} if noted.get(name) != wanted.get(name))
        told = ", ".join(f"{name} {noted.get(name)!r}, not {wanted.get(name)!r}" for name in differing)
        raise PipelineError(f"{output.url} holds another run's files ({told}); give another folder or --overwrite")
    kept = {found.key for found in output.walk()} if noted == wanted and not overwrite else set()
    output.write(_NOTE, json.dumps(wanted, indent=1, sort_keys=True).encode())
    return kept
