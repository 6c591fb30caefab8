"""Let long commands continue where they stopped: a note in the output says what its files were made from."""

import json
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from datasets_etl.errors import DataError
from datasets_etl.objects import ObjectStore
from pipelines.errors import PipelineError

_NOTE = "made_by.json"
_INPUTS = "inputs"
_STALE = "stale"
_FRAME_NUMBER = re.compile(r"(.*)_\d{6,}(?=[._][^/]*$)")  # the last number: a video's own name may hold some

ANY_FRAME = "_*"
"""Stands for a video's frame number, `_000123`, in a key: the number of frames is known only at the video's end."""


def claim_output(
    output: ObjectStore,
    job: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    *,
    overwrite: bool,
    names: Mapping[str, str] = MappingProxyType({}),
) -> set[str]:
    """Note in `output` which job makes it, and find the files that an interrupted run of the same job wrote there.

    Args:
        output: where the files go.
        job: everything that decides the content of all files, as JSON.
        inputs: what single files are made from: key of the file, perhaps with `ANY_FRAME`, → digest of its input.
        overwrite: accept an output of another job or other inputs, and keep none of its files.
        names: what people call an entry of `job`, where that is not its key, such as "--max-flow".

    Returns:
        Keys of the files that may be kept. On S3, a stale file that was remade with the same bytes is not among them.

    Raises:
        PipelineError: `overwrite` is not set, and the output is of another job, or one of the files named by `inputs`
            (without `inputs`, any file) is of other inputs or of unknown origin.
    """
    wanted = json.loads(json.dumps(job))
    there = {found.key: found.stamp for found in output.walk() if found.key != _NOTE}
    noted = _noted(output) if there else {}  # the note of a run that wrote nothing else blocks nobody
    noted_inputs, stale = dict(noted.pop(_INPUTS, {})), dict(noted.pop(_STALE, {}))
    if noted and noted != wanted and not overwrite:
        differing = sorted(name for name in {*noted, *wanted} if noted.get(name) != wanted.get(name))
        listed = ", ".join(
            f"{names.get(name, name)} {_said(noted.get(name))}, not {_said(wanted.get(name))}" for name in differing
        )
        raise PipelineError(f"{output.url} holds another run's files ({listed}); give another folder or --overwrite")
    if there and not noted and not inputs and not overwrite:
        raise PipelineError(
            f"{output.url} holds files that this command did not make; give another folder or --overwrite"
        )
    if overwrite:
        # Every file there will be replaced. If this run is interrupted, some old files remain; their stamps, which are
        # noted here, tell them from new ones.
        kept = set()
        stale = {key: stamp for key, stamp in there.items() if not inputs or _of_key(key, inputs)}
    elif inputs:
        kept = _made_of(inputs, noted_inputs, there, output.url)
    else:
        kept = set(there)
    stale = {key: stamp for key, stamp in stale.items() if there.get(key) == stamp}
    content = dict(wanted)
    if inputs:
        content[_INPUTS] = inputs if overwrite else {**noted_inputs, **inputs}
    if stale:
        content[_STALE] = stale
    output.write(_NOTE, json.dumps(content, indent=1, sort_keys=True).encode())
    return kept - stale.keys()


def _said(value: Any) -> str:
    """A value of a job as its user would put it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else repr(value)


def _noted(output: ObjectStore) -> dict[str, Any]:
    if output.size(_NOTE) is None:
        return {}
    try:
        noted = json.loads(output.read(_NOTE))
    except (ValueError, DataError):
        return {}
    sections = [noted, *(noted.get(name, {}) for name in (_INPUTS, _STALE))] if isinstance(noted, dict) else [noted]
    return noted if all(isinstance(section, dict) for section in sections) else {}


def _made_of(inputs: Mapping[str, str], noted_inputs: Mapping[str, str], there: Iterable[str], url: str) -> set[str]:
    """The keys of files made from these inputs. Raises PipelineError if such a file was made from something else."""
    kept = set()
    for key in sorted(there):
        wanted = _of_key(key, inputs)
        if wanted is None:
            continue
        if wanted != _of_key(key, noted_inputs):
            raise PipelineError(
                f"{url}/{key} is there already, of other input or not by this command; give another folder or "
                "--overwrite"
            )
        kept.add(key)
    return kept


def _of_key(key: str, inputs: Mapping[str, str]) -> str | None:
    return inputs.get(key) or inputs.get(any_frame(key))


def any_frame(key: str) -> str:
    """The key with `ANY_FRAME` in place of the number before its suffix, if that looks like a video's frame number."""
    return _FRAME_NUMBER.sub(rf"\1{ANY_FRAME}", key)
