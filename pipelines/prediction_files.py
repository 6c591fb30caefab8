"""The files that a prediction will write: their names, what each is made from, and the checks before the first pair."""

import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets_etl.file_store import FileStore
from datasets_etl.objects import ObjectStore, file_sha256
from datasets_etl.samples import check_size
from gmflow import GMFlow, Tiling
from gmflow.execution import Precision
from gmflow.predict import PaddingMode
from gmflow.weights import weights_digest
from pipelines.continuation import ANY_FRAME, any_frame
from pipelines.errors import PipelineError
from pipelines.flow_files import FLOW_FORMATS, TRUTH_SUFFIXES, no_truth, truth_file
from pipelines.frames import FRAME_SUFFIXES, Clip, header_size, naming_unreadable_file

VIDEO = "video"
"""The format that is one file per clip; all others, `FLOW_FORMATS`, are one file per pair."""


JOB_NAMES = {
    "weights": "--model's weights",
    "precision": "--precision",
    "padding": "--padding",
    "tiling": "--tile and --overlap",
    "max_flow": "--max-flow",
    "both_ways": "--bidirectional",
}
"""Entry of `PredictionOptions.job` → the command's option that decides it."""


@dataclass(frozen=True)
class PredictionOptions:
    """What to compute and what to write.

    Attributes:
        formats: names of `FLOW_FORMATS`, and "video" for one side-by-side video per clip.
        batch: pairs computed at a time.
        bidirectional: compute both flows and the occlusion.
        precision: precision of the forward pass.
        padding: see `gmflow.predict.Padding`.
        tiling: how frames larger than a tile are cut; None to compute them whole.
        truth: folder with ground truth, whose files are named like the frames.
        max_flow: speed in pixels that is drawn with full saturation; None for that of the fastest pixel.
    """

    formats: tuple[str, ...] = ("flo", "color")
    batch: int = 1
    bidirectional: bool = False
    precision: Precision = "fp32"
    padding: PaddingMode = "sintel"
    tiling: Tiling | None = None
    truth: Path | None = None
    max_flow: float | None = None

    def __post_init__(self) -> None:
        for name in self.formats:
            if name != VIDEO and name not in FLOW_FORMATS:
                raise PipelineError(f"no format {name!r}; there is {', '.join((*FLOW_FORMATS, VIDEO))}")
        for name in self.files:
            if FLOW_FORMATS[name].truth and self.truth is None:
                raise PipelineError(f"format {name} needs --truth, a folder of ground truth named as the frames are")
        if self.truth is not None and not self.truth.is_dir():
            raise PipelineError(f"{self.truth}: no such folder of ground truth")

    @property
    def files(self) -> tuple[str, ...]:
        """The formats of which each pair gets a file."""
        return tuple(name for name in self.formats if name != VIDEO)

    @property
    def both_ways(self) -> bool:
        """Whether the flow from the second frame to the first is needed too."""
        return self.bidirectional or any(FLOW_FORMATS[name].both_ways for name in self.files)

    def job(self, model: GMFlow) -> dict[str, object]:
        """What decides the content of the files: the weights and settings, but not the choice of formats."""
        tiling = None if self.tiling is None else list(vars(self.tiling).values())
        return {
            "weights": weights_digest(model),
            "precision": self.precision,
            "padding": self.padding,
            "tiling": tiling,
            "max_flow": self.max_flow,
            "both_ways": self.both_ways,
        }


def file_key(stem: str, name: str) -> str:
    """The key of a pair's file in the format `name`; `stem` is the pair's name, perhaps with `ANY_FRAME`."""
    return f"{stem}{FLOW_FORMATS[name].suffix}"


def video_key(clip: Clip) -> str:
    """The key of a clip's side-by-side video."""
    return f"{clip.title}_flow.mp4"


def inputs_of(clips: Sequence[Clip], options: PredictionOptions) -> dict[str, str]:
    """Digests of what every file is made from, for `claim_output`: its frames, and the truth if the file shows it."""
    inputs = {}
    for clip in clips:
        digests = clip.digests()
        truths = {name: _truth_digest(clip, name, options.truth) for name in digests}
        for name, stem in zip(digests, _stems(clip), strict=True):
            for form in {*options.files, "flo"}:  # an earlier run's .flo is read, whatever formats this one writes
                shown_truth = truths[name] if FLOW_FORMATS[form].truth else ""
                inputs[file_key(stem, form)] = digests[name] + shown_truth
        if VIDEO in options.formats:
            whole = "".join([*digests.values(), *truths.values()])
            inputs[video_key(clip)] = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return inputs


def _truth_digest(clip: Clip, name: str, folder: Path | None) -> str:
    """Names and digests of the truth files of a pair, or of all pairs of a video; "" if there are none."""
    if folder is None:
        return ""
    with naming_unreadable_file():
        if clip.is_video:
            stem = folder / name
            found = stem.parent.glob(f"{glob.escape(stem.name)}_*")
            names = {f"{stem.name}{ANY_FRAME}{suffix}" for suffix in TRUTH_SUFFIXES}
            files = sorted(path for path in found if any_frame(path.name) in names)
        else:
            files = [path for path in (truth_file(folder, name),) if path is not None]
        return "".join(f" with {path.name} {file_sha256(path)[:16]}" for path in files)


def check_outputs(
    clips: Sequence[Clip], output: ObjectStore, options: PredictionOptions, folders: Sequence[Path]
) -> None:
    """Check that no two outputs have the same name, and that none replaces a frame or truth, or would be read as one.

    Raises PipelineError if the check fails.
    """
    made: dict[str, Path] = {}
    for key, file in sorted(_outputs(clips, options), key=lambda found: ANY_FRAME not in found[0]):
        other = made.get(key) or made.get(any_frame(key))
        if other is not None:
            raise PipelineError(f"{other} and {file} would both give {key}; rename one, or give each its own --output")
        made[key] = file
    if isinstance(output, FileStore):
        _check_frames_survive(clips, made, output.root, folders)
        if options.truth is not None:
            _check_truth_survives(clips, made, output.root, options.truth)


def _outputs(clips: Sequence[Clip], options: PredictionOptions) -> Iterator[tuple[str, Path]]:
    """The key of every file, perhaps with `ANY_FRAME`, and the first of the input files that it is made from."""
    for clip in clips:
        for stem, file in zip(_stems(clip), clip.files, strict=False):  # a clip's last frame begins no pair
            for name in options.files:
                yield file_key(stem, name), file
        if VIDEO in options.formats:
            yield video_key(clip), clip.files[0]


def _stems(clip: Clip) -> list[str]:
    """The beginning of the keys of each pair's files; for a video, one with `ANY_FRAME` for all pairs."""
    return [f"{name}{ANY_FRAME}" if clip.is_video else name for name in clip.pair_names]


def _check_frames_survive(clips: Sequence[Clip], keys: Iterable[str], root: Path, folders: Sequence[Path]) -> None:
    """Check that no output replaces a frame, or is put where the same command would read it as a folder's frame."""
    inputs = {file.resolve() for clip in clips for file in clip.files}
    inputs |= {file.with_name(any_frame(file.name)) for file in inputs}
    folders = [folder.resolve() for folder in folders]
    for key in keys:
        path = (root / key).resolve()
        if path in inputs:
            raise PipelineError(f"{root}: {key} would replace a frame; give another --output")
        if path.parent in folders and path.suffix in FRAME_SUFFIXES:
            raise PipelineError(f"{root}: {key} would be taken for a frame of {path.parent}; give another --output")


def _check_truth_survives(clips: Sequence[Clip], keys: Iterable[str], root: Path, folder: Path) -> None:
    """Check that no output replaces ground truth, or is put where the next command would read it as such."""
    truths = {
        (folder / f"{stem}{suffix}").resolve() for clip in clips for stem in _stems(clip) for suffix in TRUTH_SUFFIXES
    }
    for key in keys:
        if (root / key).resolve() in truths:
            raise PipelineError(f"{root}: {key} would be taken for ground truth of --truth; give another --output")


def check_inputs(clips: Sequence[Clip], options: PredictionOptions) -> None:
    """Check the headers: frames and their truth must have one size, and an error map needs the truth.

    Raises PipelineError or DataError if the check fails.
    """
    for clip in clips:
        sizes = clip.sizes()
        if options.truth is not None:
            _check_truth(clip, sizes, options.truth, needed=any(FLOW_FORMATS[name].truth for name in options.files))


def _check_truth(clip: Clip, sizes: Mapping[str, tuple[int, int]], folder: Path, *, needed: bool) -> None:
    for name in clip.pair_names:
        pair = f"{name}_000000" if clip.is_video else name
        path = truth_file(folder, pair)
        if path is None and needed:
            raise no_truth(pair)
        if path is not None and name in sizes:
            check_size(f"frame {name}", sizes[name], f"its truth in {folder}", header_size(path))
