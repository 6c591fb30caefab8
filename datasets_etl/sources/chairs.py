"""FlyingChairs (Dosovitskiy et al., ICCV 2015): independent pairs in one folder, split by a list.

    FlyingChairs_release/data/00001_img1.ppm  00001_img2.ppm  00001_flow.flo
    FlyingChairs_release/FlyingChairs_train_val.txt     one line per pair: 1 = training, 2 = validation

Subsets: "train" (22,232 pairs) and "val" (640).
"""

import hashlib
import re
from pathlib import PurePosixPath

from datasets_etl.errors import DataError
from datasets_etl.sources.layout import decoded_text, finished, matches, one_prefix, require
from datasets_etl.sources.ref import SampleRef, SourceTree

SPLIT_FILES = ("FlyingChairs_train_val.txt", "chairs_split.txt")
"""The list's name on the authors' page, and the one under which RAFT and GMFlow ship the same file."""

_TITLE = "FlyingChairs"
_FILE = re.compile(r"(?P<prefix>(?:.*/)?)(?P<number>\d{5})_(?:img1\.ppm|img2\.ppm|flow\.flo)")
_SUBSETS = {"1": "train", "2": "val"}
_HASH_VAL_SHARE = 640 / 22872  # the same validation share as in the official list


def index(tree: SourceTree, *, split_list: str | None = None) -> list[SampleRef]:
    """Every pair: first "train", then "val", each ordered by number.

    Args:
        tree: the listing; the folder of pairs may lie anywhere below the root.
        split_list: the text of the official list; None: it is read from its file, anywhere below the root.

    Raises:
        DataError: no pairs, a missing partner file, no list, or a list that does not fit the pairs.
    """
    prefix, numbers = _pairs(tree)
    where = "the given split list" if split_list is not None else _split_path(tree)
    text = split_list if split_list is not None else decoded_text(tree.read(where))
    lines = text.split()
    wrong = next((line for line in lines if line not in _SUBSETS), None)
    if wrong is not None:
        raise DataError(f"{where} holds {wrong[:20]!r}: every line is 1 (training) or 2 (validation)")
    if int(numbers[-1]) > len(lines) or int(numbers[0]) < 1:
        raise DataError(
            f"{where} has {len(lines)} lines, but {tree.root} holds pair {numbers[-1]}: "
            "use the list that belongs to the dataset (22,872 lines), or split by hash (--split-by-hash)"
        )
    # By pair number, not by position in the listing: an excerpt of the dataset keeps the official split.
    subsets = {number: _SUBSETS[lines[int(number) - 1]] for number in numbers}
    return _refs(tree, prefix, subsets)


def index_by_hash(tree: SourceTree) -> list[SampleRef]:
    """Like index(), without the official list: the SHA-256 of a pair's number decides, with the usual share of "val".

    Results on such a "val" cannot be compared with published ones.
    """
    prefix, numbers = _pairs(tree)
    subsets = {number: "val" if _unit_hash(number) < _HASH_VAL_SHARE else "train" for number in numbers}
    return _refs(tree, prefix, subsets)


def _pairs(tree: SourceTree) -> tuple[str, list[str]]:
    found = matches(tree, _FILE)
    prefix = one_prefix(
        tree,
        (match["prefix"] for match in found),
        _TITLE,
        "data/00001_img1.ppm",
        "give the folder that FlyingChairs.zip unpacks to",
    )
    return prefix, sorted({match["number"] for match in found})


def _split_path(tree: SourceTree) -> str:
    found = [path for path in tree.files if PurePosixPath(path).name in SPLIT_FILES]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{tree.root} holds several split lists ({', '.join(found)}): keep or give one of them")
    raise DataError(
        f"{tree.root} lacks {SPLIT_FILES[0]}, the official training/validation list: "
        "put it there, give its path (--split-list), or split by hash (--split-by-hash)"
    )


def _unit_hash(number: str) -> float:
    return int.from_bytes(hashlib.sha256(number.encode()).digest()[:8], "big") / 2**64


def _refs(tree: SourceTree, prefix: str, subsets: dict[str, str]) -> list[SampleRef]:
    files = frozenset(tree.files)
    refs = []
    for number, subset in subsets.items():
        pair = f"pair {number}"
        refs.append(
            SampleRef(
                dataset="chairs",
                subset=subset,
                key=f"{subset}_{number}",
                scene=number,
                frame="img1",
                image0=require(tree, files, f"{prefix}{number}_img1.ppm", pair),
                image1=require(tree, files, f"{prefix}{number}_img2.ppm", pair),
                flow=require(tree, files, f"{prefix}{number}_flow.flo", pair),
            )
        )
    return finished(tree, refs, _TITLE)
