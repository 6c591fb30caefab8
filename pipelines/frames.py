"""Frames in order, from files, folders and videos, read one at a time."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from datasets_etl import formats
from datasets_etl.errors import DataError
from datasets_etl.storage import file_sha256
from pipelines.errors import PipelineError

FRAME_SUFFIXES = (".png", ".ppm", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
DEFAULT_RATE = 10.0


@dataclass(frozen=True)
class Pair:
    """Two consecutive frames, uint8 [H, W, 3], RGB; `name` is what the first one is called by."""

    name: str
    frame0: npt.NDArray[np.uint8]
    frame1: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """Frames that follow each other: some files, or one video.

    Attributes:
        title: names the clip among others.
        names: of its frames, unique among those of all clips; of a video what they begin with.
        files: of its frames, or the video alone.
    """

    title: str
    names: tuple[str, ...]
    files: tuple[Path, ...]
    is_video: bool

    @property
    def rate(self) -> float:
        """Frames a second."""
        told = float(cv2.VideoCapture(str(self.files[0])).get(cv2.CAP_PROP_FPS)) if self.is_video else 0.0
        return told if 0 < told < 1000 else DEFAULT_RATE

    def count(self) -> int | None:
        """Number of pairs; None where a video does not tell."""
        if not self.is_video:
            return len(self.files) - 1
        told = int(cv2.VideoCapture(str(self.files[0])).get(cv2.CAP_PROP_FRAME_COUNT))
        return told - 1 if told > 1 else None

    def digests(self) -> dict[str, str]:
        """What the files hold: of every pair by its name, of a video by what its frames' names begin with."""
        found = [file_sha256(file)[:16] for file in self.files]
        if self.is_video:
            return {self.names[0]: found[0]}
        return {
            name: f"{one}-{next_one}"
            for name, (one, next_one) in zip(self.names[:-1], itertools.pairwise(found), strict=True)
        }

    def pairs(self) -> Iterator[Pair]:
        """Raises DataError where two frames of a pair differ in size, PipelineError where a video holds no pair."""
        for (name, frame0), (other, frame1) in itertools.pairwise(self._frames()):
            if frame0.shape != frame1.shape:
                (h0, w0, _), (h1, w1, _) = frame0.shape, frame1.shape
                raise DataError(
                    f"frames {name} ({w0}x{h0}) and {other} ({w1}x{h1}) differ in size; a pair needs one size"
                )
            yield Pair(name, frame0, frame1)

    def _frames(self) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        if self.is_video:
            yield from self._video_frames()
            return
        for name, path in zip(self.names, self.files, strict=True):
            yield name, formats.decode_frame(path.read_bytes(), str(path), allow_trailer=True)

    def _video_frames(self) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        capture = cv2.VideoCapture(str(self.files[0]))
        for number in itertools.count():
            read, frame = capture.read()
            if not read:
                break
            yield f"{self.names[0]}_{number:06d}", cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        if number < 2:
            raise PipelineError(
                f"{self.files[0]}: {number} frames could be read; not a video, or its codec is unknown here"
            )


def find_clips(paths: Sequence[str]) -> list[Clip]:
    """Every folder and every video is a clip of its own; the single files together are one, in the order given.

    A folder's frames go by the numbers in their names: 2.png comes before 10.png. Frames are named after their files.
    Where that would give two frames one name, their folders are added; where that is not enough, their numbers.

    Raises:
        PipelineError: nothing there, or a clip of a single frame.
    """
    groups: list[tuple[str, list[Path]]] = []
    loose: list[Path] = []
    videos: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise PipelineError(f"{path}: no such file or folder")
        if path.is_dir():
            groups.append((path.resolve().name, _frames_of(path)))
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            videos.append(path)
        else:
            loose.append(path)
    if len(loose) == 1:
        raise PipelineError(f"{loose[0]}: one frame makes no pair; give two frames, a folder or a video")
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
    found = sorted((path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES), key=_by_numbers)
    if len(found) < 2:
        raise PipelineError(f"{folder}: {len(found)} frames in it; two or more of {', '.join(FRAME_SUFFIXES)} needed")
    return found


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
    return [
        clip
        if seen[clip.title] == 1
        else Clip(f"{clip.title}_{number + 1}", clip.names, clip.files, is_video=clip.is_video)
        for number, clip in enumerate(clips)
    ]
