"""Flow of frames: `python pipelines/predict.py --model REF --output DIR FRAME FRAME …` (or folders, or videos).

Consecutive frames make pairs. The files of each pair are named after its first frame. Run the same command again to
continue where it stopped.
"""

import argparse
import contextlib
import glob
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datasets_etl import formats
from datasets_etl.ahead import read_ahead
from datasets_etl.file_store import FileStore
from datasets_etl.objects import ObjectStore, file_sha256
from datasets_etl.samples import check_size
from gmflow import GMFlow, Prediction, Tiling, predict_batch
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from gmflow.predict import PaddingMode
from gmflow.weights import weights_digest
from pipelines.arguments import (
    Parser,
    add_device,
    add_model,
    add_overwrite,
    add_precision,
    positive,
    positive_number,
    size,
)
from pipelines.behind import Behind
from pipelines.continuation import ANY_FRAME, any_frame, claim_output
from pipelines.errors import PipelineError, resumable_command
from pipelines.flow_files import FLOW_FORMATS, TRUTH_SUFFIXES, Result, Truth, no_truth, read_truth, truth_file
from pipelines.frames import FRAME_SUFFIXES, Clip, Pair, find_clips, telling_which_file, told_size
from pipelines.lasting import lasting_store
from pipelines.references import resolve_model
from pipelines.side_by_side import SideBySideVideo
from pipelines.training.memory import telling_memory_lack

console = Console(stderr=True)

VIDEO = "video"


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
        return tuple(name for name in self.formats if name != VIDEO)

    @property
    def both_ways(self) -> bool:
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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Optical flow between consecutive frames.")
    add_model(parser)
    parser.add_argument("--output", required=True, help="folder or URL for the files")
    parser.add_argument(
        "--formats",
        default="flo,color",
        help=f"comma-separated, of {', '.join((*FLOW_FORMATS, VIDEO))} (default: %(default)s)",
    )
    parser.add_argument("--bidirectional", action="store_true", help="both flows and occlusion, into the .npz as well")
    parser.add_argument("--truth", type=Path, metavar="DIR", help="ground truth by the frames' names, for error, video")
    parser.add_argument("--max-flow", type=positive_number, help="speed in pixels of full saturation in all pictures")
    parser.add_argument("--batch", type=positive, default=1, help="pairs computed at a time (default: %(default)s)")
    add_precision(parser)
    parser.add_argument("--padding", choices=get_args(PaddingMode), default="sintel", help="(default: %(default)s)")
    parser.add_argument("--tile", type=size, metavar="HxW", help="compute larger frames by tiles, such as 768x1024")
    parser.add_argument("--overlap", type=positive, default=128, help="of tiles, pixels (default: %(default)s)")
    add_overwrite(parser)
    add_device(parser)
    parser.add_argument("frames", nargs="+", metavar="FRAME", help="two or more images, folders of them, or videos")
    return parser.parse_args(argv)


def predict_clip(
    model: GMFlow,
    clip: Clip,
    output: ObjectStore,
    options: PredictionOptions,
    kept: Set[str] = frozenset(),
    on_pair: Callable[[], None] = lambda: None,
) -> None:
    """Write the files of every pair of a clip; those `kept` from an earlier run are not made again.

    Threads write them, for several pairs at a time, while the model computes. They also call `on_pair`; for a
    pair without anything to write, the caller's thread does.
    """
    wanted = VIDEO in options.formats and _video_key(clip) not in kept

    def write(result: Result) -> None:
        for name in options.files:
            if _key(result.pair, name) not in kept:
                output.write(_key(result.pair, name), FLOW_FORMATS[name].encode(result))
        on_pair()

    with _video_of(clip, output, options) if wanted else contextlib.nullcontext() as video, Behind() as behind:
        for result in _results(model, clip, output, options, kept, need_all=wanted):
            if result is None:
                on_pair()
                continue
            behind.do(write, result)
            if video is not None:
                video.add(result)


@contextlib.contextmanager
def _video_of(clip: Clip, output: ObjectStore, options: PredictionOptions) -> Iterator[SideBySideVideo]:
    """A video to fill in a `with`, at whose end it is uploaded to the output."""
    with tempfile.TemporaryDirectory(prefix="gmflow-video-") as folder:
        path = Path(folder) / "video.mp4"
        with SideBySideVideo(path, clip.rate, with_truth=options.truth is not None) as video:
            yield video
        output.upload(path, _video_key(clip))


def _results(
    model: GMFlow, clip: Clip, output: ObjectStore, options: PredictionOptions, kept: Set[str], *, need_all: bool
) -> Iterator[Result | None]:
    """The result of every pair in order; None for a pair whose files all exist, unless `need_all`."""
    for pairs in _batches(read_ahead(clip.pairs()), options.batch):
        wanted = [need_all or any(_key(pair, name) not in kept for name in options.files) for pair in pairs]
        predictions = [
            _earlier(pair, output, options, kept) if wants else None for pair, wants in zip(pairs, wanted, strict=True)
        ]
        missing = [n for n, wants in enumerate(wanted) if wants and predictions[n] is None]
        if missing:
            frames = [(pairs[n].frame0, pairs[n].frame1) for n in missing]
            with telling_memory_lack(
                f"frame {pairs[missing[0]].name}", "--tile, a smaller --batch or --precision bf16"
            ):
                computed = predict_batch(
                    model,
                    frames,
                    padding=options.padding,
                    precision=options.precision,
                    bidirectional=options.both_ways,
                    tiling=options.tiling,
                )
            for n, prediction in zip(missing, computed, strict=True):
                predictions[n] = prediction
        for pair, found in zip(pairs, predictions, strict=True):
            yield None if found is None else Result(pair, found, _truth(pair, options), options.max_flow)


def _batches(pairs: Iterator[Pair], count: int) -> Iterator[list[Pair]]:
    """Batches of up to `count` consecutive pairs of one size."""
    for _, alike in itertools.groupby(pairs, key=lambda pair: pair.frame0.shape):
        while batch := list(itertools.islice(alike, count)):
            yield batch


def _earlier(pair: Pair, output: ObjectStore, options: PredictionOptions, kept: Set[str]) -> Prediction | None:
    """The flow that an earlier run wrote, so that other formats need no new computation.

    None if there is none, or if both ways are needed: a .flo holds only one.
    """
    key = _key(pair, "flo")
    if key not in kept or options.both_ways:
        return None
    return Prediction(formats.decode_flo(output.read(key), key))


def _truth(pair: Pair, options: PredictionOptions) -> Truth | None:
    truth = None if options.truth is None else read_truth(options.truth, pair.name)
    if truth is not None:
        check_size(f"frame {pair.name}", pair.frame0.shape, f"its truth in {options.truth}", truth.flow.shape)
    return truth


def _key(pair: Pair, name: str) -> str:
    return f"{pair.name}{FLOW_FORMATS[name].suffix}"


def inputs_of(clips: Sequence[Clip], options: PredictionOptions) -> dict[str, str]:
    """Digests of what every file is made from, for `claim_output`: its frames, and the truth if the file shows it."""
    inputs = {}
    for clip in clips:
        digests = clip.digests()
        truths = {name: _truth_digest(clip, name, options.truth) for name in digests}
        for name, stem in zip(digests, _stems(clip), strict=True):
            for form in (FLOW_FORMATS[chosen] for chosen in {*options.files, "flo"}):  # `_earlier` reads that one
                inputs[f"{stem}{form.suffix}"] = digests[name] + truths[name] * form.truth
        if VIDEO in options.formats:
            whole = "".join([*digests.values(), *truths.values()])
            inputs[_video_key(clip)] = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return inputs


def _truth_digest(clip: Clip, name: str, folder: Path | None) -> str:
    """Names and digests of the truth files of a pair, or of all pairs of a video; "" if there are none."""
    if folder is None:
        return ""
    with telling_which_file():
        if clip.is_video:
            stem = folder / name
            found = stem.parent.glob(f"{glob.escape(stem.name)}_*")
            names = {f"{stem.name}{ANY_FRAME}{suffix}" for suffix in TRUTH_SUFFIXES}
            files = sorted(path for path in found if any_frame(path.name) in names)
        else:
            files = [path for path in (truth_file(folder, name),) if path is not None]
        return "".join(f" with {path.name} {file_sha256(path)[:16]}" for path in files)


def _video_key(clip: Clip) -> str:
    return f"{clip.title}_flow.mp4"


def _stems(clip: Clip) -> list[str]:
    """The beginning of the keys of each pair's files; for a video, one with `ANY_FRAME` for all pairs."""
    return [f"{name}{ANY_FRAME}" if clip.is_video else name for name in clip.pair_names]


def _outputs(clips: Sequence[Clip], options: PredictionOptions) -> Iterator[tuple[str, Path]]:
    """The key of every file, perhaps with `ANY_FRAME`, and the first of the input files that it is made from."""
    for clip in clips:
        for stem, file in zip(_stems(clip), clip.files, strict=False):  # a clip's last frame begins no pair
            for name in options.files:
                yield f"{stem}{FLOW_FORMATS[name].suffix}", file
        if VIDEO in options.formats:
            yield _video_key(clip), clip.files[0]


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
            check_size(f"frame {name}", sizes[name], f"its truth in {folder}", told_size(path))


def options_of(arguments: argparse.Namespace) -> PredictionOptions:
    return PredictionOptions(
        formats=tuple(dict.fromkeys(arguments.formats.split(","))),
        batch=arguments.batch,
        bidirectional=arguments.bidirectional,
        precision=arguments.precision,
        padding=arguments.padding,
        tiling=Tiling(arguments.tile[0], arguments.tile[1], arguments.overlap) if arguments.tile else None,
        truth=arguments.truth,
        max_flow=arguments.max_flow,
    )


@resumable_command
def main() -> None:
    arguments = parse_arguments()
    options = options_of(arguments)
    clips = find_clips(arguments.frames)
    output = lasting_store(arguments.output, "--output")
    check_outputs(clips, output, options, [path for path in map(Path, arguments.frames) if path.is_dir()])
    check_inputs(clips, options)
    model = resolve_model(arguments.model)
    prepare_model(model, ExecutionConfig(arguments.precision, replay=True), arguments.device)
    kept = claim_output(output, options.job(model), inputs_of(clips, options), overwrite=arguments.overwrite)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for clip in clips:
            bar = progress.add_task(escape(clip.title), total=clip.count())
            predict_clip(model, clip, output, options, kept, lambda bar=bar: progress.advance(bar))  # type: ignore[misc]
    console.print("flow and pictures:", end=" ")
    print(output.url)


if __name__ == "__main__":
    main()
