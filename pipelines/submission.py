"""What the benchmarks' servers take: `python pipelines/submission.py --model REF --data MANIFEST_URL --output DIR`.

    Sintel    clean/ambush_1/frame0001.flo    final/…            of the subsets test-clean and test-final
    KITTI     flow/000000_10.png, 16 bit                         of the subset testing

KITTI's server takes a ZIP file, which is written beside the folder. Sintel's server takes what `bundler`, a program in
the dataset's download, makes of the folder; its command line is printed. The last line on stdout is the path of the
ZIP file or of the folder. Run the same command again to continue where it stopped.
"""

import argparse
import shlex
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# First: see pipelines/__init__.py.
from pipelines.arguments import Parser, add_device, add_model, add_overwrite, add_precision, local_path

# isort: split
from rich.console import Console

from datasets_etl import formats
from datasets_etl.ahead import read_ahead
from datasets_etl.file_store import FileStore
from datasets_etl.manifest import Manifest
from datasets_etl.reading import read_sample
from datasets_etl.samples import FlowSample
from gmflow import GMFlow, Prediction, predict_batch
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from gmflow.predict import PaddingMode
from gmflow.weights import replace_file, weights_digest
from pipelines.behind import Behind
from pipelines.continuation import claim_output
from pipelines.errors import PipelineError, resumable_command
from pipelines.flow_files import encode_kitti, require_finite
from pipelines.lasting import lasting_store
from pipelines.progress import Progress, print_line
from pipelines.references import resolve_model
from pipelines.training.memory import explaining_out_of_memory
from pipelines.wording import counted

console = Console(stderr=True)


@dataclass(frozen=True)
class Benchmark:
    """What a server asks for.

    Attributes:
        subsets: all subsets that must be handed in.
        padding: how the images are padded.
        path: gives the path of a sample's file.
        encode: gives the content of that file for a prediction.
        pairs: number of pairs in the whole submission.
        bundled: whether the benchmark's own program packs the files to hand in; otherwise they go into a ZIP file.
    """

    subsets: tuple[str, ...]
    padding: PaddingMode
    path: Callable[[FlowSample], str]
    encode: Callable[[Prediction], bytes]
    pairs: int
    bundled: bool = False


def _sintel_path(sample: FlowSample) -> str:
    """A path such as `clean/ambush_1/frame0001.flo`, with the frame's own number, which begins at 1."""
    return f"{sample.subset.removeprefix('test-')}/{sample.scene}/{sample.frame.replace('_', '')}.flo"


BENCHMARKS = {
    "sintel": Benchmark(
        ("test-clean", "test-final"),
        "sintel",
        _sintel_path,
        lambda found: formats.encode_flo(found.flow),
        2 * 552,
        bundled=True,
    ),
    "kitti": Benchmark(
        ("testing",),
        "kitti",
        lambda sample: f"flow/{sample.scene}_{sample.frame}.png",
        lambda found: encode_kitti(found.flow),
        200,
    ),
}
"""Dataset → what its server asks for."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Predict a benchmark's test set, in the layout its server takes.")
    add_model(parser)
    parser.add_argument("--data", required=True, help="URL of a manifest of Sintel or KITTI with its test subsets")
    parser.add_argument(
        "--output", required=True, type=local_path, help="folder; KITTI's archive is that name with .zip"
    )
    add_precision(parser)
    add_overwrite(parser)
    add_device(parser)
    return parser.parse_args(argv)


def benchmark_of(manifest: Manifest) -> Benchmark:
    """The benchmark of a manifest's dataset. Raises PipelineError if it has no server, or a test subset is missing."""
    benchmark = BENCHMARKS.get(manifest.dataset)
    if benchmark is None:
        raise PipelineError(f"{manifest.url}: {manifest.dataset} has no server; {' and '.join(BENCHMARKS)} have")
    missing = [subset for subset in benchmark.subsets if subset not in manifest.subsets]
    if missing:
        raise PipelineError(
            f"{manifest.url}: no subset {' and '.join(missing)}, only {', '.join(manifest.subsets)}; "
            "shard the dataset with its test folder"
        )
    return benchmark


def predict_submission(
    model: GMFlow, manifest: Manifest, folder: Path, precision: Precision = "fp32", *, overwrite: bool = False
) -> list[str]:
    """Write every file that is missing in `folder`. Returns the paths of all files in it."""
    benchmark = benchmark_of(manifest)
    output = FileStore(folder)
    job = {"weights": weights_digest(model), "data": manifest.version, "precision": precision}
    kept = claim_output(output, job, overwrite=overwrite)
    numbers = [int(n) for subset in benchmark.subsets for n in manifest.select(subset, with_truth=False)]
    if len(numbers) != benchmark.pairs:
        held = counted(len(numbers), "pair")
        console.print(f"[yellow]{held}, the whole test set has {benchmark.pairs}: not to be handed in")
    samples = read_ahead(read_sample(manifest, number, occlusion=False) for number in numbers)

    def write(path: str, found: Prediction) -> None:
        output.write(path, benchmark.encode(found))

    paths = []
    with Progress(console) as progress, Behind() as behind:
        pairs = progress.counting("predicting", len(numbers))
        for sample in samples:
            path = benchmark.path(sample)
            paths.append(path)
            if path not in kept:
                frames = [(sample.image0, sample.image1)]
                with explaining_out_of_memory(f"pair {sample.key}", "--precision bf16 or --device cpu"):
                    (found,) = predict_batch(model, frames, padding=benchmark.padding, precision=precision)
                require_finite(sample.key, found.flow)
                behind.do(write, path, found)
            pairs.advance()
    return paths


def archive_of(folder: Path) -> Path:
    """The path `FOLDER.zip`. Raises PipelineError if that is a folder."""
    archive = folder.with_name(f"{folder.name}.zip")
    if archive.is_dir():
        raise PipelineError(f"{archive}: a folder where the archive goes; give another --output")
    return archive


def zip_submission(folder: Path, paths: list[str]) -> Path:
    """Write `FOLDER.zip`, whole or not at all, with only these files, under their paths in the folder."""

    def write(beside: str) -> None:
        # Flow hardly gets smaller. The time stamp is ZIP's earliest, so that the same files give the same archive.
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(paths):
                file.writestr(zipfile.ZipInfo(path), (folder / path).read_bytes(), zipfile.ZIP_DEFLATED)

    archive = archive_of(folder)
    replace_file(archive, write)
    return archive


@resumable_command
def main() -> None:
    arguments = parse_arguments()
    manifest = Manifest.load(arguments.data)
    benchmark = benchmark_of(manifest)
    folder = arguments.output.absolute()
    lasting_store(str(folder), "--output")
    if not benchmark.bundled:
        archive_of(folder)  # fails before anything is computed
    model = resolve_model(arguments.model)
    prepare_model(model, ExecutionConfig(arguments.precision, replay=True), arguments.device)
    paths = predict_submission(model, manifest, folder, arguments.precision, overwrite=arguments.overwrite)
    if benchmark.bundled:
        held = counted(len(paths), "file")
        print_line(console, f"{held}; the server takes what the bundler in the dataset's download makes of them:")
        print(shlex.join(["bundler", f"{folder}/clean", f"{folder}/final", f"{folder}.lzma"]), file=sys.stderr)
        print(folder)
    else:
        console.print(f"{counted(len(paths), 'file')}, as the server takes them:", end=" ")
        print(zip_submission(folder, paths))


if __name__ == "__main__":
    main()
