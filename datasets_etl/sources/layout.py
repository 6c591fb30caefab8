"""What the sources share: lists, finding a layout below a root, requiring partner files, finishing an index."""

import re
from collections.abc import Collection, Iterable

from datasets_etl.errors import DataError
from datasets_etl.sources.ref import SampleRef, SourceTree


def decoded_text(data: bytes) -> str:
    """The text of a list's file, without the byte order mark that Windows editors write at its beginning."""
    return data.decode("utf-8-sig", "replace")


def matches(tree: SourceTree, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """The files whose whole relative path fits the pattern, in the listing's order."""
    return [match for path in tree.files if (match := pattern.fullmatch(path))]


def one_prefix(tree: SourceTree, prefixes: Iterable[str], title: str, looked_for: str, way_out: str) -> str:
    """The one folder ("" or ending in "/") below the root that holds the layout.

    Args:
        tree: the listing.
        prefixes: the folders in which the layout was found.
        title: the dataset as its authors call it.
        looked_for: a path of the layout, as an example.
        way_out: what to do if the layout is missing.

    Raises:
        DataError: there is no such folder, or there are several.
    """
    found = sorted(set(prefixes))
    if len(found) > 1:
        places = ", ".join(prefix or "." for prefix in found[:4])
        raise DataError(f"{tree.root} holds several copies of {title} ({places}): point to one of them")
    if found:
        return found[0]
    if not tree.files:
        raise DataError(f"{tree.root} is empty or does not exist: looked for {title}, {looked_for}; {way_out}")
    top = sorted({path.split("/", 1)[0] for path in tree.files})
    there = ", ".join(top[:4]) + (", …" if len(top) > 4 else "")
    raise DataError(f"{tree.root} does not hold {title}: looked for {looked_for}, found only {there}; {way_out}")


def require(tree: SourceTree, files: Collection[str], path: str, partner: str) -> str:
    """Returns `path` if it is among the files. Otherwise raises DataError with its name and the file that needs it."""
    if path not in files:
        raise DataError(
            f"{tree.root} lacks {path}, which {partner} needs: complete the download, or remove {partner} as well"
        )
    return path


def require_together(tree: SourceTree, places: Collection[tuple[str, str]]) -> None:
    """Checks that the parts of a layout lie in the same folder.

    Args:
        tree: the listing.
        places: (folder, part) for each part found; the folder below the root is "" or ends in "/".

    Raises:
        DataError: each part was found once, but not all in one folder, because archives were unpacked apart.
    """
    folders, parts = {folder for folder, _ in places}, {part for _, part in places}
    if len(folders) > 1 and len(parts) == len(places):
        there = ", ".join(sorted(folder + part for folder, part in places))
        raise DataError(f"{tree.root} holds {there}: unpacked apart; move them into one folder")


def require_unbroken(tree: SourceTree, numbers: Collection[int], path_format: str) -> None:
    """Checks that a sequence's frame numbers have no gap. Raises DataError with the name of the first missing file."""
    for number in range(min(numbers), max(numbers)):
        if number not in numbers:
            raise DataError(
                f"{tree.root} lacks {path_format.format(number)} in the middle of its sequence: "
                "complete the download, or remove the sequence"
            )


def finished(tree: SourceTree, refs: list[SampleRef], title: str) -> list[SampleRef]:
    """The refs in their fixed order: sorted by key.

    Raises:
        DataError: there are no refs.
    """
    if not refs:
        raise DataError(f"{tree.root} holds frames of {title} but no pair of them: complete the download")
    return sorted(refs, key=lambda ref: ref.key)
