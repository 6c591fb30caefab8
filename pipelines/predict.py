"""Flow of frames: `python pipelines/predict.py --model REF --output DIR FRAME FRAME …` (or folders, or videos).

Consecutive frames make pairs. The files of each pair are named after its first frame. Run the same command again to
continue where it stopped.
"""

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import get_args

# First: see pipelines/__init__.py.
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

# isort: split
from rich.console import Console

from datasets_etl import formats
from datasets_etl.ahead import read_ahead
from datasets_etl.objects import ObjectStore
from datasets_etl.samples import check_size
from gmflow import GMFlow, Prediction, Tiling, predict_batch
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.predict import PaddingMode
from pipelines.behind import Behind
from pipelines.continuation import claim_output
from pipelines.errors import resumable_command
from pipelines.flow_files import FLOW_FORMATS, Result, Truth, read_truth
from pipelines.frames import Clip, Pair, find_clips
from pipelines.lasting import lasting_store
from pipelines.prediction_files import (
    JOB_NAMES,
    VIDEO,
    PredictionOptions,
    check_inputs,
    check_outputs,
    file_key,
    inputs_of,
    video_key,
)
from pipelines.progress import Progress, print_line
from pipelines.references import resolve_model
from pipelines.side_by_side import SideBySideVideo
from pipelines.training.memory import explaining_out_of_memory

console = Console(stderr=True)


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
    wanted = VIDEO in options.formats and video_key(clip) not in kept

    def write(result: Result) -> None:
        for name in options.files:
            if file_key(result.pair.name, name) not in kept:
                output.write(file_key(result.pair.name, name), FLOW_FORMATS[name].encode(result))
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
        output.upload(path, video_key(clip))


def _results(
    model: GMFlow, clip: Clip, output: ObjectStore, options: PredictionOptions, kept: Set[str], *, need_all: bool
) -> Iterator[Result | None]:
    """The result of every pair in order; None for a pair whose files all exist, unless `need_all`."""
    for pairs in _batches(read_ahead(clip.pairs()), options.batch):
        wanted = [pair for pair in pairs if need_all or any(file_key(pair.name, f) not in kept for f in options.files)]
        predictions = {pair.name: _earlier(pair, output, options, kept) for pair in wanted}
        missing = [pair for pair in wanted if predictions[pair.name] is None]
        if missing:
            computed = _predict(model, missing, options)
            predictions |= {pair.name: prediction for pair, prediction in zip(missing, computed, strict=True)}
        for pair in pairs:
            prediction = predictions.get(pair.name)
            yield None if prediction is None else Result(pair, prediction, _truth(pair, options), options.max_flow)


def _predict(model: GMFlow, pairs: Sequence[Pair], options: PredictionOptions) -> list[Prediction]:
    with explaining_out_of_memory(f"frame {pairs[0].name}", "--tile, a smaller --batch or --precision bf16"):
        return predict_batch(
            model,
            [(pair.frame0, pair.frame1) for pair in pairs],
            padding=options.padding,
            precision=options.precision,
            bidirectional=options.both_ways,
            tiling=options.tiling,
        )


def _batches(pairs: Iterator[Pair], count: int) -> Iterator[list[Pair]]:
    """Batches of up to `count` consecutive pairs of one size."""
    for _, alike in itertools.groupby(pairs, key=lambda pair: pair.frame0.shape):
        while batch := list(itertools.islice(alike, count)):
            yield batch


def _earlier(pair: Pair, output: ObjectStore, options: PredictionOptions, kept: Set[str]) -> Prediction | None:
    """The flow that an earlier run wrote, so that other formats need no new computation.

    None if there is none, or if both ways are needed: a .flo holds only one.
    """
    key = file_key(pair.name, "flo")
    if key not in kept or options.both_ways:
        return None
    return Prediction(formats.decode_flo(output.read(key), key))


def _truth(pair: Pair, options: PredictionOptions) -> Truth | None:
    truth = None if options.truth is None else read_truth(options.truth, pair.name)
    if truth is not None:
        check_size(f"frame {pair.name}", pair.frame0.shape, f"its truth in {options.truth}", truth.flow.shape)
    return truth


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
    kept = claim_output(
        output, options.job(model), inputs_of(clips, options), overwrite=arguments.overwrite, names=JOB_NAMES
    )
    with Progress(console) as progress:
        for number, clip in enumerate(clips, start=1):
            which = f" (clip {number} of {len(clips)})" if len(clips) > 1 else ""
            pairs = progress.counting(f"{clip.title}{which}", clip.count())
            predict_clip(model, clip, output, options, kept, pairs.advance)
    print_line(console, "flow and pictures:")
    print(output.url)


if __name__ == "__main__":
    main()
