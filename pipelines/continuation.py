"""Long commands that go on where they stopped: a note in the output says what its files are of."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from datasets_etl.errors import DataError
from datasets_etl.storage import ObjectStore
from pipelines.errors import PipelineError

_NOTE = "made_by.json"
_INPUTS = "inputs"
_STALE = "stale"
_FRAME_NUMBER = re.compile(r"(.*)_\d{6,}(?=[._][^/]*$)")  # the last: a video's own name may hold such numbers

ANY_FRAME = "_*"
"""Stands for a video's frame number, `_000123`, in a key: how many frames it has shows at its end."""


def claim_output(
    output: ObjectStore, job: Mapping[str, Any], inputs: Mapping[str, str] | None = None, *, overwrite: bool
) -> set[str]:
    """Note in `output` what it is made by, and find what an interrupted run of the same job has written there.

    Args:
        output: where the files go.
        job: all that decides the content of every file, as JSON.
        inputs: what only some files are made of: key, perhaps with `ANY_FRAME`, → digest of it.
        overwrite: take over the output of another job or input, and keep nothing.

    Returns:
        Keys of the files that may be kept. On S3 one that was made again with the same bytes is not among them.

    Raises:
        PipelineError: files there are of another job, of other inputs or of unknown origin, and not to be overwritten.
    """
    wanted = json.loads(json.dumps(job))
    there = {found.key: found.stamp for found in output.walk() if found.key != _NOTE}
    noted = _noted(output) if there else {}  # a run that failed before it wrote anything keeps nobody out
    told, stale = dict(noted.pop(_INPUTS, {})), dict(noted.pop(_STALE, {}))
    if noted and noted != wanted and not overwrite:
        differing = sorted(name for name in {*noted, *wanted} if noted.get(name) != wanted.get(name))
        listed = ", ".join(f"{name} {noted.get(name)!r}, not {wanted.get(name)!r}" for name in differing)
        raise PipelineError(f"{output.url} holds another run's files ({listed}); give another folder or --overwrite")
    kept = set(there)
    if overwrite or not noted:
        # Every file there is to be replaced. A run that is interrupted leaves some of the old ones: their stamps, noted
        # here, tell them from new ones.
        kept = set()
        stale = {key: stamp for key, stamp in there.items() if not inputs or _of_key(key, inputs)}
    if inputs and not overwrite:
        kept = _made_of(inputs, told, there, output.url)
    stale = {key: stamp for key, stamp in stale.items() if there.get(key) == stamp}
    content = dict(wanted)
    if inputs:
        content[_INPUTS] = inputs if overwrite else {**told, **inputs}
    if stale:
        content[_STALE] = stale
    output.write(_NOTE, json.dumps(content, indent=1, sort_keys=True).encode())
    return kept - stale.keys()


def _noted(output: ObjectStore) -> dict[str, Any]:
    if output.size(_NOTE) is None:
        return {}
    try:
        noted: dict[str, Any] = json.loads(output.read(_NOTE))
    except (ValueError, DataError):
        return {}
    return noted


def _made_of(inputs: Mapping[str, str], told: Mapping[str, str], there: Iterable[str], url: str) -> set[str]:
    """Those of the keys whose files are of these inputs. Raises PipelineError for one that is of others."""
    kept = set()
    for key in sorted(there):
        wanted = _of_key(key, inputs)
        if wanted is None:
            continue
        if wanted != _of_key(key, told):
            raise PipelineError(
                f"{url}/{key} is there already, of other input or not by this command; give another folder or "
                "--overwrite"
            )
        kept.add(key)
    return kept


def _of_key(key: str, inputs: Mapping[str, str]) -> str | None:
    return inputs.get(key) or inputs.get(any_frame(key))


def any_frame(key: str) -> str:
    """With `ANY_FRAME` for the number that it ends in, should it be that of a video's frame."""
    return _FRAME_NUMBER.sub(rf"\1{ANY_FRAME}", key)
