"""A dataset of one's own: a list says which files are a pair.

    subset,image0,image1,flow,name
    train,walk/left_0001.png,walk/left_0002.png,walk/flow_0001.flo,
    val,drive/0007_a.jpg,drive/0007_b.jpg,drive/0007.png,drive_7

CSV with a header. Paths are relative to the dataset's folder. The flow's suffix says how it is stored: `.flo`, `.pfm`,
or `.png` as KITTI's, which is sparse; without one the pair has no ground truth. `name` may be left out: then it is the
path of image0.
"""

import csv
import io
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath

from datasets_etl.errors import DataError
from datasets_etl.sources.layout import require
from datasets_etl.sources.ref import SPARSE_SUFFIX, SampleRef, SourceTree

_NEEDED = ("subset", "image0", "image1", "flow")
_COLUMNS = (*_NEEDED, "name")
_SUBSET = re.compile(r"[\w-]+", re.ASCII)
_NOT_IN_KEYS = re.compile(r"[^\w-]", re.ASCII)
_FLOW_SUFFIXES = (".flo", ".pfm", SPARSE_SUFFIX)


def index(tree: SourceTree, *, dataset: str, text: str, where: str) -> list[SampleRef]:
    """Every pair of the list, ordered by subset and name.

    Args:
        tree: the listing of the dataset's folder.
        dataset: the name that the dataset shall have.
        text: the list.
        where: its name for error messages.

    Raises:
        DataError: the list lacks a column or has an unknown one, a row lacks a value, a file is not in the folder, or
            two pairs of a subset have one name.
    """
    files = frozenset(tree.files)
    lines: dict[str, int] = {}
    refs = []
    for line, row in _rows(text, where):
        ref = _ref(tree, files, dataset, row, f"line {line} of {where}")
        if ref.key in lines:
            raise DataError(
                f"lines {lines[ref.key]} and {line} of {where} both name their pair {ref.key}: give each another name "
                "(column name)"
            )
        lines[ref.key] = line
        refs.append(ref)
    if not refs:
        raise DataError(f"{where} lists no pairs")
    return sorted(refs, key=lambda ref: ref.key)


def _rows(text: str, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The number of a row's line, and its values by column."""
    rows = csv.reader(io.StringIO(text), skipinitialspace=True, strict=True)
    try:
        first, *others = [(rows.line_num, row) for row in rows if row] or [(0, [])]
    except csv.Error as error:
        raise DataError(f"line {rows.line_num} of {where} is no CSV ({error})") from None
    columns = [column.strip() for column in first[1]]
    known = f"its first line names the columns {', '.join(_NEEDED)}, and perhaps name"
    for column in columns:
        if column not in _COLUMNS or columns.count(column) > 1:
            raise DataError(f"{where}: column {column!r} is unknown, or there twice: {known}")
    if missing := [column for column in _NEEDED if column not in columns]:
        raise DataError(f"{where}: no column {missing[0]!r}: {known}")
    for line, row in others:
        if len(row) != len(columns):
            raise DataError(f"line {line} of {where}: {len(row)} values for {len(columns)} columns")
        yield line, dict(zip(columns, (value.strip() for value in row), strict=True))


def _ref(tree: SourceTree, files: Collection[str], dataset: str, row: Mapping[str, str], where: str) -> SampleRef:
    subset, flow = row["subset"], row["flow"]
    if not _SUBSET.fullmatch(subset):
        raise DataError(f"{where}: subset {subset!r}: letters, digits, _ and - make a subset's name")
    if flow and not flow.endswith(_FLOW_SUFFIXES):
        raise DataError(f"{where}: {flow}: flow is a file with the suffix {', '.join(_FLOW_SUFFIXES)}")
    if empty := [column for column in ("image0", "image1") if not row[column]]:
        raise DataError(f"{where}: no {empty[0]}")
    image0, image1 = (require(tree, files, str(PurePosixPath(row[column])), where) for column in ("image0", "image1"))
    first = PurePosixPath(image0)
    name = _NOT_IN_KEYS.sub("_", row.get("name") or str(first.with_suffix("")))
    return SampleRef(
        dataset=dataset,
        subset=subset,
        key=f"{subset}_{name}",
        scene=_NOT_IN_KEYS.sub("_", str(first.parent)) if first.parent.name else name,
        frame=first.stem,
        image0=image0,
        image1=image1,
        flow=require(tree, files, str(PurePosixPath(flow)), where) if flow else None,
    )
