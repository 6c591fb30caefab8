"""Let long commands continue where they stopped: a note in the output says what its files were made from."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class _Note:
    """What an output's note says about the files beside it.

    Attributes:
        job: what decides the content of all files; empty if the files' origin is unknown.
        inputs: what single files are made from, see `claim_output`.
        stale: key → stamp of the files to be replaced; a file with another stamp has been replaced.
    """

    job: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    stale: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, output: ObjectStore) -> "_Note":
        """The note in an output; an empty one if there is none or its content is not a note."""
        if output.size(_NOTE) is None:
            return cls()
        try:
            job = json.loads(output.read(_NOTE))
        except (ValueError, DataError):
            return cls()
        if not isinstance(job, dict):
            return cls()
        inputs, stale = job.pop(_INPUTS, {}), job.pop(_STALE, {})
        return cls(job, inputs, stale) if isinstance(inputs, dict) and isinstance(stale, dict) else cls()

    def write(self, output: ObjectStore) -> None:
        sections = {name: section for name, section in ((_INPUTS, self.inputs), (_STALE, self.stale)) if section}
        output.write(_NOTE, json.dumps({**self.job, **sections}, indent=1, sort_keys=True).encode())


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
    inputs = inputs or {}
    stamps = {found.key: found.stamp for found in output.walk() if found.key != _NOTE}
    noted = _Note.read(output) if stamps else _Note()  # the note of a run that wrote nothing else blocks nobody
    if overwrite:
        # Every file there will be replaced. If this run is interrupted, some old files remain; their stamps, which are
        # noted here, tell them from new ones.
        kept: set[str] = set()
        known = inputs
        stale = {key: stamp for key, stamp in stamps.items() if not inputs or _of_key(key, inputs)}
    else:
        _require_same_job(noted.job, wanted, names, output.url)
        kept = _files_to_keep(inputs, noted, stamps, output.url)
        known = {**noted.inputs, **inputs} if inputs else {}
        stale = {key: stamp for key, stamp in noted.stale.items() if stamps.get(key) == stamp}
    _Note(wanted, known, stale).write(output)
    return kept - stale.keys()


def _require_same_job(noted: Mapping[str, Any], wanted: Mapping[str, Any], names: Mapping[str, str], url: str) -> None:
    if noted and noted != wanted:
        differing = sorted(name for name in {*noted, *wanted} if noted.get(name) != wanted.get(name))
        listed = ", ".join(
            f"{names.get(name, name)} {_said(noted.get(name))}, not {_said(wanted.get(name))}" for name in differing
        )
        raise PipelineError(f"{url} holds another run's files ({listed}); give another folder or --overwrite")


def _said(value: Any) -> str:
    """A value of a job as its user would put it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else repr(value)


def _files_to_keep(inputs: Mapping[str, str], noted: _Note, there: Collection[str], url: str) -> set[str]:
    """Keys of the files made from these inputs; without `inputs`, of all files.

    Raises PipelineError if such a file was made from something else, or nobody noted from what.
    """
    if not inputs:
        if there and not noted.job:
            raise PipelineError(f"{url} holds files that this command did not make; give another folder or --overwrite")
        return set(there)
    kept = {key for key in there if _of_key(key, inputs) is not None}
    for key in sorted(kept):
        if _of_key(key, inputs) != _of_key(key, noted.inputs):
            raise PipelineError(
                f"{url}/{key} is there already, of other input or not by this command; give another folder or "
                "--overwrite"
            )
    return kept


def _of_key(key: str, inputs: Mapping[str, str]) -> str | None:
    return inputs.get(key) or inputs.get(any_frame(key))


def any_frame(key: str) -> str:
    """The key with `ANY_FRAME` in place of the number before its suffix, if that looks like a video's frame number."""
    return _FRAME_NUMBER.sub(rf"\1{ANY_FRAME}", key)
