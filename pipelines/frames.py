"""Frames in order, from files, folders and videos, read one at a time."""

import contextlib
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl import formats
from datasets_etl.errors import DataError
from datasets_etl.objects import file_sha256
from pipelines.errors import PipelineError

log = logging.getLogger(__name__)

FRAME_SUFFIXES = (".png", ".ppm", ".pgm", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm")
DEFAULT_RATE = 10.0

_INSTEAD = 3  # folders that an error names at most

# The headers of these count the frames. For Matroska, OpenCV estimates the count from the duration, which gives too
# many if the rate varies.
_COUNTED_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi")
_JPEG_MAGIC = b"\xff\xd8"  # a JPEG's size may come late in the file


@dataclass(frozen=True)
class Pair:
    """Two consecutive frames, uint8 [H, W, 3], RGB; `name` is the name of the first one."""

    name: str
    frame0: npt.NDArray[np.uint8]
    frame1: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """Frames that follow each other: some files, or one video.

    Attributes:
        title: unique name of the clip.
        names: names of its frames, unique among all clips; for a video, only the prefix of its frames' names.
        files: the files of its frames, or only the video.
    """

    title: str
    names: tuple[str, ...]
    files: tuple[Path, ...]
    is_video: bool

    @property
    def rate(self) -> float:
        """Frames per second; `DEFAULT_RATE` if the files do not tell."""
        rate = float(_opened(self.files[0]).get(cv2.CAP_PROP_FPS)) if self.is_video else 0.0
        return rate if 0 < rate < 1000 else DEFAULT_RATE

    def count(self) -> int | None:
        """Number of pairs; None if a video does not tell."""
        if not self.is_video:
            return len(self.files) - 1
        frames = int(_opened(self.files[0]).get(cv2.CAP_PROP_FRAME_COUNT))
        return frames - 1 if frames > 1 else None

    def digests(self) -> dict[str, str]:
        """Pair name → hashes of the pair's two files; for a video, the prefix of its frames' names → its hash.

        Raises PipelineError if a file cannot be read.
        """
        with naming_unreadable_file():
            found = [file_sha256(file)[:16] for file in self.files]
        if self.is_video:
            return {self.names[0]: found[0]}
        return {
            name: f"{one}-{next_one}"
            for name, (one, next_one) in zip(self.pair_names, itertools.pairwise(found), strict=True)
        }

    @property
    def pair_names(self) -> tuple[str, ...]:
        """The names of all pairs; for a video, only the prefix of these names."""
        return self.names if self.is_video else self.names[:-1]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Frame name → (height, width) from the file's header; empty for a video, whose frames have one size.

        Raises DataError if the two frames of a pair differ in size, or if a file is no frame.
        """
        if self.is_video:
            return {}
        found = {name: header_size(path) for name, path in zip(self.names, self.files, strict=True)}
        for (name, size), (other, other_size) in itertools.pairwise(found.items()):
            _check_sizes(name, size, other, other_size)
        return found

    def pairs(self) -> Iterator[Pair]:
        """All pairs. Raises DataError if the frames of one differ in size, PipelineError if a video holds no pair."""
        for (name, frame0), (other, frame1) in itertools.pairwise(self._frames()):
            _check_sizes(name, frame0.shape, other, frame1.shape)
            yield Pair(name, frame0, frame1)

    def _frames(self) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        if self.is_video:
            yield from self._video_frames()
            return
        for name, path in zip(self.names, self.files, strict=True):
            yield name, formats.decode_frame(path.read_bytes(), str(path), allow_trailer=True)

    def _video_frames(self) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        capture = _opened(self.files[0])
        for number in itertools.count():
            read, frame = capture.read()
            if not read:
                break
            yield f"{self.names[0]}_{number:06d}", cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        if number < 2:
            raise PipelineError(
                f"{self.files[0]}: {number} frames could be read; not a video, or its codec is unknown here"
            )
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if number < total and self.files[0].suffix.lower() in _COUNTED_SUFFIXES:
            log.warning(
                "%s: %d of %d frames could be read; copy it again unless it was trimmed",
                self.files[0],
                number,
                total,
            )


def _opened(video: Path) -> cv2.VideoCapture:
    return cv2.VideoCapture(str(video.absolute()))  # in a relative path, text before a colon would be a protocol


@contextlib.contextmanager
def naming_unreadable_file() -> Iterator[None]:
    """Turns an OSError into a PipelineError that names the file or folder which cannot be read."""
    try:
        yield
    except OSError as error:
        raise PipelineError(f"{error.filename}: cannot be read ({error.strerror})") from error


def header_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header of a frame or flow file.

    Raises PipelineError if the file cannot be read, DamagedError if it has no such header.
    """
    with naming_unreadable_file(), path.open("rb") as file:
        head = file.read(formats.HEAD_BYTES)
        return formats.image_size(head + file.read() if head.startswith(_JPEG_MAGIC) else head, str(path))


def _check_sizes(name: str, size: Sequence[int], other: str, other_size: Sequence[int]) -> None:
    if tuple(size) != tuple(other_size):
        raise DataError(
            f"frames {name} ({size[1]}x{size[0]}) and {other} ({other_size[1]}x{other_size[0]}) differ in size; a pair "
            "needs one size"
        )


def find_clips(paths: Sequence[str]) -> list[Clip]:
    """Each folder and each video becomes a clip; all single files together become one clip, in the order given.

    A folder's frames are ordered by the numbers in their names: 2.png comes before 10.png. Frames are named after their
    files. If that would give two frames the same name, their folders are added to all names; if that is not enough, a
    running number is added instead.

    Raises:
        PipelineError: a path does not exist or cannot be read, or a clip has fewer than two frames.
    """
    with naming_unreadable_file():
        return _clips_of([Path(path) for path in paths])


def _clips_of(paths: Sequence[Path]) -> list[Clip]:
    groups: list[tuple[str, list[Path]]] = []
    loose: list[Path] = []
    videos: list[Path] = []
    for path in paths:
        if not path.exists():
            raise PipelineError(f"{path}: no such file or folder")
        if path.is_dir():
            groups.append((path.resolve().name, _frames_of(path)))
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            videos.append(path)
        else:
            loose.append(path)
    if len(loose) == 1:
        raise PipelineError(
            f"{loose[0]}: one frame makes no pair; give two frames, a folder or a video ({', '.join(VIDEO_SUFFIXES)})"
        )
    if loose:
        groups.append(("frames", loose))
    files = [file for _, group in groups for file in group] + videos
    names = iter(_unique_names(files))
    clips = [
        Clip(title, tuple(itertools.islice(names, len(group))), tuple(group), is_video=False) for title, group in groups
    ]
    clips += [Clip(video.stem, (next(names),), (video,), is_video=True) for video in videos]
    return _with_unique_titles(clips)


def _frames_of(folder: Path) -> list[Path]:
    named = (path for path in folder.iterdir() if _named_as_a_frame(path) and not path.is_dir())
    found = sorted(named, key=_by_numbers)
    for path in found:
        if not path.exists():
            raise PipelineError(f"{path}: a link to {path.readlink()}, which is not there; mend or remove it")
    if len(found) < 2:
        held = "1 frame" if found else "no frames"
        instead = _clip_folders(folder)
        advice = f"; give {' or '.join(map(str, instead))}" if instead else ""
        raise PipelineError(f"{folder}: {held} in it; two or more of {', '.join(FRAME_SUFFIXES)} needed{advice}")
    return found


def _clip_folders(folder: Path) -> list[Path]:
    """The first few folders in this one that hold two frames or more, which may be what was meant."""
    folders = sorted((path for path in folder.iterdir() if path.is_dir()), key=_by_numbers)
    readable = (path for path in folders if os.access(path, os.R_OK | os.X_OK))
    return list(itertools.islice(filter(_holds_a_pair, readable), _INSTEAD))


def _holds_a_pair(folder: Path) -> bool:
    frames = (path for path in folder.iterdir() if _named_as_a_frame(path) and path.is_file())
    return len(list(itertools.islice(frames, 2))) == 2


def _named_as_a_frame(path: Path) -> bool:
    """Hidden files are none: beside each `frame.png`, macOS writes a `._frame.png` without pixels on foreign disks."""
    return path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".")


def _by_numbers(file: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", file.stem)  # text and digits in turn
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], file.name


def _unique_names(files: Sequence[Path]) -> list[str]:
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    resolved = [file.resolve() for file in files]
    common = Path(os.path.commonpath([file.parent for file in resolved]))
    relative = [file.relative_to(common).with_suffix("").as_posix() for file in resolved]
    if len(set(relative)) == len(relative):
        return relative
    return [f"{number:06d}_{stem}" for number, stem in enumerate(stems)]


def _with_unique_titles(clips: Sequence[Clip]) -> list[Clip]:
    seen = Counter(clip.title for clip in clips)
    taken = set(seen)
    titled = []
    for number, clip in enumerate(clips, start=1):
        if seen[clip.title] > 1:
            numbered = (f"{clip.title}_{n}" for n in itertools.count(number))
            clip = replace(clip, title=next(title for title in numbered if title not in taken))
            taken.add(clip.title)
        titled.append(clip)
    return titled
