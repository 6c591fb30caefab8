"""Flow of frames: `python pipelines/predict.py --model REF --output DIR FRAME FRAME …` (or a folder, or a video).

Consecutive frames make pairs. Every pair gives `NAME.flo` and a colour picture `NAME.png`, named after its first frame.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from datasets_etl import formats
from datasets_etl.errors import DataError
from datasets_etl.storage import ObjectStore, open_store
from gmflow import GMFlow, flow_to_image, predict_flow
from pipelines.arguments import device
from pipelines.errors import PipelineError, command
from pipelines.training.pictures import to_png
from pipelines.training.registry import resolve_model

Frame = tuple[str, npt.NDArray[np.uint8]]

_FRAME_SUFFIXES = (".png", ".ppm", ".jpg", ".jpeg")
_VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")

console = Console(stderr=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Optical flow between consecutive frames.")
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, .pth or .safetensors")
    parser.add_argument("--output", required=True, help="folder or URL for .flo and .png")
    parser.add_argument(
        "--device", type=device, default=device("auto"), help="cpu, cuda, cuda:1 (default: best there is)"
    )
    parser.add_argument("frames", nargs="+", metavar="FRAME", help="two or more images, a folder of them, or a video")
    return parser.parse_args(argv)


class FrameSource:
    """Frames in order, one at a time: files, a folder's files by name, or a video's frames."""

    def __init__(self, paths: list[str]) -> None:
        self.files = [Path(path) for path in paths]
        for path in self.files:
            if not path.exists():
                raise PipelineError(f"{path}: no such file or folder")
        self.video: Path | None = None
        if len(self.files) == 1 and self.files[0].is_dir():
            folder = self.files[0]
            self.files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _FRAME_SUFFIXES)
            if len(self.files) < 2:
                raise PipelineError(
                    f"{folder}: {len(self.files)} frames in it; two or more of {_FRAME_SUFFIXES} needed"
                )
        elif len(self.files) == 1 and self.files[0].suffix.lower() in _VIDEO_SUFFIXES:
            self.video = self.files[0]
        elif len(self.files) < 2:
            raise PipelineError(f"{self.files[0]}: one frame makes no pair; give two frames, a folder or a video")

    def count(self) -> int | None:
        """Number of frames; None where a video does not tell."""
        if self.video is None:
            return len(self.files)
        told = int(cv2.VideoCapture(str(self.video)).get(cv2.CAP_PROP_FRAME_COUNT))
        return told if told > 0 else None

    def __iter__(self) -> Iterator[Frame]:
        if self.video is not None:
            yield from _video_frames(self.video)
            return
        for path in self.files:
            yield path.stem, formats.decode_frame(path.read_bytes(), str(path))


def _video_frames(path: Path) -> Iterator[Frame]:
    capture = cv2.VideoCapture(str(path))
    number = 0
    while True:
        read, frame = capture.read()
        if not read:
            break
        yield f"{path.stem}_{number:06d}", cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        number += 1
    if number < 2:
        raise PipelineError(f"{path}: {number} frames could be read; not a video, or its codec is unknown here")


def predict_pair(model: GMFlow, first: Frame, second: Frame, output: ObjectStore) -> None:
    """Write the flow of one pair as `.flo` and as a picture."""
    (name, frame0), (other, frame1) = first, second
    if frame0.shape != frame1.shape:
        (h0, w0, _), (h1, w1, _) = frame0.shape, frame1.shape
        raise DataError(f"frames {name} ({w0}x{h0}) and {other} ({w1}x{h1}) differ in size; a pair needs one size")
    flow = predict_flow(model, frame0, frame1)
    output.write(f"{name}.flo", formats.encode_flo(flow))
    output.write(f"{name}.png", to_png(flow_to_image(flow)))


@command
def main() -> None:
    arguments = parse_arguments()
    source = FrameSource(arguments.frames)
    model = resolve_model(arguments.model).to(arguments.device)
    output = open_store(arguments.output)
    with Progress(console=console) as progress:
        count = source.count()
        bar = progress.add_task("predicting", total=None if count is None else count - 1)
        for first, second in itertools.pairwise(source):
            predict_pair(model, first, second, output)
            progress.advance(bar)
    console.print("flow and pictures:", end=" ")
    print(output.url)


if __name__ == "__main__":
    main()
