"""Measure the data plane: encodings of frames and flow, samples per second, storage, writing, planning.

    python -m benchmarks.data                                    # all; writing takes longest, `--only` leaves it out
    python -m benchmarks.data --only codes,loading --rounds 7

Real samples are found as in the tests, through GMFLOW_SAMPLES and GMFLOW_FORMAT_SAMPLES. What is compared takes turns,
round by round, and each figure is the median of its rounds, so that ratios are meaningful even on a shared machine. A
process computes on one core: OpenCV, zstd and torch use no threads of their own.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import psutil
import ray
import torch
import zstandard
from PIL import Image
from rich.console import Console
from rich.table import Table
from webdataset import TarWriter

from datasets_etl import formats, rowcode
from datasets_etl.augment import AugmentConfig, augment, draw_geometry
from datasets_etl.colour_jitter import apply_jitters, draw_jitters
from datasets_etl.etl import run_etl
from datasets_etl.loader import MixturePart, PositionDataset, TrainingStream, collate, read_sample, to_tensors
from datasets_etl.manifest import Manifest
from datasets_etl.order import Order, rank_positions, sample_generator
from datasets_etl.samples import FlowSample, dense_valid, encode_sample
from datasets_etl.shards import raw_files
from datasets_etl.sources import SOURCES, SampleRef, SourceTree, is_sparse
from datasets_etl.storage import open_store
from pipelines.arguments import positive

Array = npt.NDArray[Any]  # uint8 frames, float32 flow
console = Console(width=130)

# Crops and scales of the paper's recipes, samples per second of the reference loader, and the multiple to reach.
RECIPES = {
    "chairs": (AugmentConfig((384, 512), -0.1, 1.0), 37.8, 3.0),
    "sintel": (AugmentConfig((320, 896), -0.2, 0.6), 14.1, 2.5),
    "kitti": (AugmentConfig((320, 1152), -0.2, 0.4, vflip=0.0), 12.0, 2.0),
}
SAMPLES = ("GMFLOW_SAMPLES", "GMFLOW_FORMAT_SAMPLES")
BATCH = 4
LOADED = 3 * BATCH  # samples per round


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def taking_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one warm-up round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if number:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def raw_tree(root: Path) -> SourceTree:
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return SourceTree(str(root), files, lambda name: (root / name).read_bytes())


@dataclass(frozen=True)
class Raw:
    """A raw dataset in a local folder."""

    name: str
    root: Path

    @property
    def tree(self) -> SourceTree:
        return raw_tree(self.root)

    @property
    def refs(self) -> list[SampleRef]:
        return SOURCES[self.name](self.tree)


# ---------------------------------------------------------------------------------------------------------------- codes


@dataclass(frozen=True)
class Code:
    """A candidate encoding: array → bytes, and (bytes, shape) → array."""

    encode: Callable[[Array], bytes]
    decode: Callable[[bytes, tuple[int, int]], Array]


def _png(level: int) -> Code:
    def encode(image: Array) -> bytes:
        return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, level])[
            1
        ].tobytes()

    return Code(encode, _decode_image)


def _webp(method: int, quality: int) -> Code:
    def encode(image: Array) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "WEBP", lossless=True, method=method, quality=quality, exact=True)
        return buffer.getvalue()

    return Code(encode, _decode_image)


def _decode_image(data: bytes, shape: tuple[int, int]) -> Array:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=rowcode.FLOW_LEVEL).compress(data)


def _unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def _byte_shuffled(flow: Array) -> bytes:
    return _zstd(np.ascontiguousarray(flow.view(np.uint8).reshape(-1, 4).T).tobytes())


def _byte_unshuffled(data: bytes, shape: tuple[int, int]) -> Array:
    planes = np.frombuffer(_unzstd(data), np.uint8).reshape(4, 1, -1)
    return cv2.merge(list(planes)).view(np.float32).reshape(*shape, 2)


def _bit_shuffled(flow: Array) -> bytes:
    bits = np.unpackbits(flow.view(np.uint8).reshape(-1, 4), axis=1)  # [values, 32]
    return _zstd(np.packbits(np.ascontiguousarray(bits.T)).tobytes())


def _bit_unshuffled(data: bytes, shape: tuple[int, int]) -> Array:
    bits = np.unpackbits(np.frombuffer(_unzstd(data), np.uint8)).reshape(32, -1)
    return np.packbits(np.ascontiguousarray(bits.T), axis=1).view(np.float32).reshape(*shape, 2)


def _plane_zigzag(flow: Array) -> bytes:
    """Subtracts the pixel above, then the one to the left, and folds the sign into the lowest bit."""
    words = flow.view(np.uint32)
    down = words.copy()
    down[1:] -= words[:-1]
    across = down.copy()
    across[:, 1:] -= down[:, :-1]
    signed = across.view(np.int32)
    folded = ((signed << 1) ^ (signed >> 31)).view(np.uint8)
    return _zstd(np.ascontiguousarray(folded.reshape(-1, 8).T).tobytes())


def _plane_unzigzag(data: bytes, shape: tuple[int, int]) -> Array:
    planes = np.frombuffer(_unzstd(data), np.uint8).reshape(8, *shape)
    folded = cv2.merge(list(planes)).view(np.uint32)  # [H, W, 2]
    across = (folded >> 1) ^ (np.uint32(0) - (folded & 1))
    np.add.accumulate(across, axis=1, dtype=np.uint32, out=across)
    for y in range(1, shape[0]):
        np.add(across[y], across[y - 1], out=across[y])
    return across.view(np.float32)


FRAME_CODES = {
    "raw": Code(lambda image: image.tobytes(), lambda data, shape: np.frombuffer(data, np.uint8).reshape(*shape, 3)),
    "PNG, level 1": _png(1),
    "PNG, level 6": _png(6),
    "lossless WebP, method 0": _webp(0, 0),
    "lossless WebP, method 2": _webp(2, 50),
    "lossless WebP, method 4": _webp(4, 75),
    "rows, zstd 3": Code(partial(rowcode.encode_frame, level=3), rowcode.decode_frame),
    f"rows, zstd {rowcode.FRAME_LEVEL} (stored)": Code(rowcode.encode_frame, rowcode.decode_frame),
    "rows, zstd 15": Code(partial(rowcode.encode_frame, level=15), rowcode.decode_frame),
}
FLOW_CODES = {
    "raw": Code(lambda flow: flow.tobytes(), lambda data, shape: np.frombuffer(data, np.float32).reshape(*shape, 2)),
    "zstd": Code(
        lambda flow: _zstd(flow.tobytes()),
        lambda data, shape: np.frombuffer(_unzstd(data), np.float32).reshape(*shape, 2),
    ),
    "bytes shuffled, zstd": Code(_byte_shuffled, _byte_unshuffled),
    "bits shuffled, zstd": Code(_bit_shuffled, _bit_unshuffled),
    f"rows, zstd {rowcode.FLOW_LEVEL} (stored)": Code(rowcode.encode_flow, rowcode.decode_flow),
    "rows and columns, zigzag, zstd": Code(_plane_zigzag, _plane_unzigzag),
}


def codes(raws: Sequence[Raw], rounds: int) -> None:
    for title, candidates, arrays_of in (
        ("Frames", FRAME_CODES, _some_frames),
        ("Dense flow", FLOW_CODES, _some_flows),
    ):
        table = Table(title=f"{title}: size over raw, milliseconds to encode, milliseconds to decode")
        table.add_column("code")
        found = {raw.name: arrays_of(raw) for raw in raws}
        found = {name: arrays for name, arrays in found.items() if arrays}
        for name, arrays in found.items():
            table.add_column(f"{name} {arrays[0].shape[1]}x{arrays[0].shape[0]}", justify="right")
        columns = [_measured_codes(candidates, arrays, rounds) for arrays in found.values()]
        for name in candidates:
            table.add_row(name, *(column[name] for column in columns))
        console.print(table)


def _measured_codes(candidates: dict[str, Code], arrays: list[Array], rounds: int) -> dict[str, str]:
    encoding = taking_turns({name: partial(_encode_all, code, arrays) for name, code in candidates.items()}, rounds)
    encoded = {name: _encode_all(code, arrays) for name, code in candidates.items()}
    for name, code in candidates.items():
        for array, data in zip(arrays, encoded[name], strict=True):
            if code.decode(data, array.shape[:2]).tobytes() != array.tobytes():
                raise RuntimeError(f"{name} is not lossless")
    decoding = taking_turns(
        {name: partial(_decode_all, code, arrays, encoded[name]) for name, code in candidates.items()}, rounds
    )
    raw = sum(array.nbytes for array in arrays)
    return {
        name: f"{sum(map(len, encoded[name])) / raw:.3f} {1e3 * encoding[name] / len(arrays):5.0f} "
        f"{1e3 * decoding[name] / len(arrays):5.1f}"
        for name in candidates
    }


def _encode_all(code: Code, arrays: list[Array]) -> list[bytes]:
    return [code.encode(array) for array in arrays]


def _decode_all(code: Code, arrays: list[Array], encoded: list[bytes]) -> None:
    for array, data in zip(arrays, encoded, strict=True):
        code.decode(data, array.shape[:2])


def _some_frames(raw: Raw) -> list[Array]:
    return [formats.decode_frame(raw.tree.read(ref.image0), ref.image0) for ref in raw.refs[::2]][:2]


def _some_flows(raw: Raw) -> list[Array]:
    if is_sparse(raw.name):
        return []
    return [_raw_flow(raw.tree, ref)[0] for ref in raw.refs[::2]][:2]


def _raw_flow(tree: SourceTree, ref: SampleRef) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    if ref.flow is None:
        raise ValueError(f"{ref.key} has no flow")
    data = tree.read(ref.flow)
    if is_sparse(ref.dataset):
        return formats.decode_kitti_flow(data, ref.flow)
    flow = formats.decode_pfm(data, ref.flow) if ref.flow.endswith(".pfm") else formats.decode_flo(data, ref.flow)
    return flow, dense_valid(flow)


# -------------------------------------------------------------------------------------------------------------- loading


def naive_sample(tree: SourceTree, ref: SampleRef, config: AugmentConfig, rng: np.random.Generator) -> FlowSample:
    """A sample from raw files in the usual way: jitter and resize whole frames, then flip, then crop.

    The baseline is favourable: it uses our fast colour jitter, and the raw files are in the page cache.
    """
    frames = [formats.decode_frame(tree.read(path), path) for path in (ref.image0, ref.image1)]
    flow, valid = _raw_flow(tree, ref)
    sparse = is_sparse(ref.dataset)
    frames = apply_jitters(frames, frames, draw_jitters(sparse, rng))
    drawn = draw_geometry(valid.shape, sparse, config, rng)
    scale_y, scale_x = drawn.scale
    if sparse:
        frames, flow, valid = _resized_sparse(frames, flow, valid, scale_y, scale_x)
    else:
        frames = [cv2.resize(frame, None, fx=scale_x, fy=scale_y) for frame in frames]
        flow = cv2.resize(flow, None, fx=scale_x, fy=scale_y) * np.array([scale_x, scale_y], np.float32)
        valid = (np.abs(flow) < 1000).all(axis=2)
    if drawn.hflip:
        frames, flow, valid = (
            [f[:, ::-1] for f in frames],
            flow[:, ::-1] * np.array([-1, 1], np.float32),
            valid[:, ::-1],
        )
    if drawn.vflip:
        frames, flow, valid = [f[::-1] for f in frames], flow[::-1] * np.array([1, -1], np.float32), valid[::-1]
    (y, x), (height, width) = drawn.offset, config.crop
    window = np.s_[y : y + height, x : x + width]
    image0, image1 = (np.ascontiguousarray(frame[window]) for frame in frames)
    flow, valid = np.ascontiguousarray(flow[window]), np.ascontiguousarray(valid[window])
    return FlowSample(ref.key, ref.dataset, ref.subset, sparse, image0, image1, flow, valid)


def _resized_sparse(
    frames: list[npt.NDArray[np.uint8]],
    flow: npt.NDArray[np.float32],
    valid: npt.NDArray[np.bool_],
    scale_y: float,
    scale_x: float,
) -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    frames = [cv2.resize(frame, None, fx=scale_x, fy=scale_y) for frame in frames]
    height, width = frames[0].shape[:2]
    y, x = np.nonzero(valid)
    to_y, to_x = np.rint(y * scale_y).astype(int), np.rint(x * scale_x).astype(int)
    inside = (to_y < height) & (to_x < width)
    moved, there = np.zeros((height, width, 2), np.float32), np.zeros((height, width), np.bool_)
    vectors = flow[y, x] * np.array([scale_x, scale_y], np.float32)
    moved[to_y[inside], to_x[inside]] = vectors[inside]
    there[to_y[inside], to_x[inside]] = True
    return frames, moved, there


def loading(raws: Sequence[Raw], rounds: int, manifests: dict[str, Manifest]) -> None:
    table = Table(title="Decode + augment + collate on one core, samples a second")
    for name in ("dataset, crop", "naive", "ours", "ours / naive", "to reach", "ms: decode", "augment", "collate"):
        table.add_column(name, justify="left" if name.startswith("dataset") else "right")
    for raw in raws:
        if raw.name not in RECIPES:
            continue
        config, reference, factor = RECIPES[raw.name]
        manifest, tree, refs = manifests[raw.name], raw.tree, raw.refs

        def naive(tree: SourceTree = tree, refs: list[SampleRef] = refs, config: AugmentConfig = config) -> None:
            for first in range(0, LOADED, BATCH):
                positions = range(first, first + BATCH)
                collate(
                    [
                        to_tensors(naive_sample(tree, refs[p % len(refs)], config, sample_generator(1, p)))
                        for p in positions
                    ]
                )

        stages = _Stages(manifest, config, LOADED)
        spent = taking_turns({"naive": naive, "ours": stages}, rounds)
        rates = {name: LOADED / each for name, each in spent.items()}
        table.add_row(
            f"{raw.name} {config.crop[1]}x{config.crop[0]}",
            f"{rates['naive']:.1f}",
            f"{rates['ours']:.1f}",
            f"{rates['ours'] / rates['naive']:.2f}",
            f"{factor:g} x {reference} = {factor * reference:.0f}",
            *(f"{1e3 * statistics.median(each[1:]):.1f}" for each in stages.seconds),  # without the warm-up
        )
    console.print(table)


class _Stages:
    """Reads, augments and collates `count` samples when called, and records the seconds per sample of each stage."""

    def __init__(self, manifest: Manifest, config: AugmentConfig, count: int) -> None:
        self.manifest, self.config, self.count = manifest, config, count
        self.seconds: tuple[list[float], list[float], list[float]] = ([], [], [])

    def __call__(self) -> None:
        clock = time.perf_counter
        spent = [0.0, 0.0, 0.0]
        for first in range(0, self.count, BATCH):
            batch = []
            for position in range(first, first + BATCH):
                times = [clock()]
                sample = read_sample(self.manifest, position % len(self.manifest.samples), occlusion=False)
                times.append(clock())
                batch.append(augment(sample, self.config, sample_generator(1, position)))
                times.append(clock())
                spent[0] += times[1] - times[0]
                spent[1] += times[2] - times[1]
            began = clock()
            collate([to_tensors(sample) for sample in batch])
            spent[2] += clock() - began
        for stage, each in zip(self.seconds, spent, strict=True):
            stage.append(each / self.count)


# -------------------------------------------------------------------------------------------------------------- storage


def stored(raws: Sequence[Raw], manifests: dict[str, Manifest]) -> None:
    table = Table(title="Bytes on storage")
    for name in ("dataset", "pairs", "raw files, MiB", "shards, MiB", "stored / raw"):
        table.add_column(name, justify="left" if name == "dataset" else "right")
    for raw in raws:
        paths = {path for ref in raw.refs for path in raw_files(ref)}
        before = sum((raw.root / path).stat().st_size for path in paths) / 2**20
        after = sum(shard.bytes for shard in manifests[raw.name].shards) / 2**20
        table.add_row(raw.name, str(len(raw.refs)), f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}")
    console.print(table)


def s3(manifest: Manifest, rounds: int) -> None:
    """Compare the same stream with one loader process from a folder and from an S3 server on this machine."""
    from tests.seaweedfs import running  # the server that the tests start

    cores = sorted(os.sched_getaffinity(0))
    table = Table(title="The stream with one loader process that reads ahead, samples a second")
    for heading in ("", "folder", "S3", "S3 / folder", "to reach"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        os.environ.update(server.settings)
        remote = open_store("s3://data/bench")
        for shard in manifest.shards:
            remote.write(shard.name, manifest.store().read(shard.name))
        name = manifest.url.rpartition("/")[2]
        remote.write(name, manifest.to_bytes())
        streams = {
            "folder": _warm_stream(manifest),
            "S3": _warm_stream(Manifest.load(f"{remote.url}/{name}")),
        }
        places = {"loader on a core, server and consumer on the others": cores[:1], "all on all cores": cores}
        for how, loaders in places.items():
            _place(loaders, [core for core in cores if core not in loaders] or cores)
            rates = _rates(streams, rounds)
            ratio = rates["S3"] / rates["folder"]
            table.add_row(how, f"{rates['folder']:.1f}", f"{rates['S3']:.1f}", f"{ratio:.2f}", "0.9")
    console.print(table)


def _place(loaders: Sequence[int], others: Sequence[int]) -> None:
    """Pin this process's loader processes to some cores, and itself and all its other children (servers) to others."""
    loading = {process.pid for process in multiprocessing.active_children()}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, loaders if process.pid in loading else others)


def _rates(streams: dict[str, Iterator[object]], rounds: int) -> dict[str, float]:
    made_before, steps = 5, 30

    def draw(stream: Iterator[object], count: int) -> None:
        for _ in range(count):
            next(stream)

    times: dict[str, list[float]] = {place: [] for place in streams}
    for number in range(rounds + 1):
        for place, stream in streams.items():
            draw(stream, made_before)  # these were loaded while the others had their turn
            spent = seconds(partial(draw, stream, steps))
            if number:
                times[place].append(spent)
    return {place: steps * BATCH / statistics.median(spent) for place, spent in times.items()}


def _warm_stream(manifest: Manifest) -> Iterator[object]:
    dataset = PositionDataset([MixturePart(manifest, None, 1, RECIPES["chairs"][0])], seed=1)
    stream = TrainingStream(
        dataset, range(10**6), global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, workers=1
    )

    def batches() -> Iterator[object]:
        for _, micro_batches in stream:
            yield from micro_batches

    warm = batches()
    next(warm)
    return warm


# -------------------------------------------------------------------------------------------------------------- writing


def writing(chairs: Raw, rounds: int) -> None:
    """Compare ETL workers with a plain loop that uses webdataset's writer and the same encoding."""
    with tempfile.TemporaryDirectory() as folder:
        many = _repeated(chairs, Path(folder) / "raw", copies=120)
        tree, refs = many.tree, many.refs
        places = iter(range(10**6))

        def serial() -> None:
            with (Path(folder) / "serial.tar").open("wb") as file, TarWriter(file) as writer:
                for ref in refs:
                    writer.write(encode_sample(ref, tree)[0])

        def etl(workers: int) -> None:
            target = f"{folder}/out{next(places)}"
            run_etl("chairs", str(many.root), target, workers=workers, shard_bytes=15 * 2**20)

        spent = taking_turns({"serial": serial, "one": partial(etl, 1), "two": partial(etl, 2)}, rounds)
    table = Table(title=f"Writing {len(refs)} chairs pairs, pairs a second")
    for heading in ("serial writer", "one worker", "two workers", "one / serial (0.9)", "two / one (1.8)"):
        table.add_column(heading, justify="right")
    rates = {name: len(refs) / each for name, each in spent.items()}
    table.add_row(
        *(f"{rate:.1f}" for rate in rates.values()),
        f"{rates['one'] / rates['serial']:.2f}",
        f"{rates['two'] / rates['one']:.2f}",
    )
    console.print(table)


def _repeated(chairs: Raw, root: Path, copies: int) -> Raw:
    """The same pairs under more numbers, as symbolic links."""
    (root / "data").mkdir(parents=True)
    refs = chairs.refs
    for number in range(copies * len(refs)):
        ref = refs[number % len(refs)]
        stem = f"data/{number + 1:05d}"
        for path, end in ((ref.image0, "img1.ppm"), (ref.image1, "img2.ppm"), (ref.flow, "flow.flo")):
            (root / f"{stem}_{end}").symlink_to((chairs.root / str(path)).resolve())
    (root / "FlyingChairs_train_val.txt").write_text("1\n" * copies * len(refs))
    return Raw("chairs", root)


# ------------------------------------------------------------------------------------------------------------- planning


def planning(rounds: int) -> None:
    """Locate the samples of a step, for an epoch of 10⁹ positions and 10⁴ workers. Nothing is stored for any step."""
    order = Order(sizes=(600_000_000, 40_000, 1041), repeats=(1, 9_000, 38_000), seed=3)
    workers, each = 10_000, 8
    steps = iter(range(1, 10**9, 977))

    def one_rank() -> None:
        step = next(steps)
        order.locate(rank_positions(step, workers * each, step % workers, workers))

    def all_ranks() -> None:
        step = next(steps)
        order.locate(range(step * workers * each, (step + 1) * workers * each))

    spent = taking_turns({"one": one_rank, "all": all_ranks}, 20 * rounds)
    table = Table(
        title=f"Planning a step: {order.epoch_length:,} positions an epoch, {workers:,} workers, milliseconds"
    )
    for heading in (f"one worker's {each} samples (to reach: 1)", f"all {workers * each:,} samples of a step"):
        table.add_column(heading, justify="right")
    table.add_row(f"{1e3 * spent['one']:.3f}", f"{1e3 * spent['all']:.1f}")
    console.print(table)


def main() -> None:
    parts = ("codes", "loading", "stored", "s3", "writing", "planning")
    parser = argparse.ArgumentParser(description="Measure the data plane on real samples.")
    parser.add_argument("--only", default=",".join(parts), help="some of: %(default)s")
    parser.add_argument("--rounds", type=positive, default=3, help="median of so many (default: %(default)s)")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if unknown := set(only) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    if missing := [name for name in SAMPLES if name not in os.environ and set(only) != {"planning"}]:
        parser.error(f"{missing[0]} is not set: it names a folder of samples")
    raws = [] if set(only) == {"planning"} else _raws()
    if "codes" in only:
        codes(raws, arguments.rounds)
    if "planning" in only:
        planning(arguments.rounds)
    if set(only) - {"codes", "planning"}:
        with tempfile.TemporaryDirectory() as folder:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            manifests = {raw.name: Manifest.load(run_etl(raw.name, str(raw.root), folder).manifest_url) for raw in raws}
            if "writing" in only:
                writing(raws[0], arguments.rounds)
            ray.shutdown()
            if "stored" in only:
                stored(raws, manifests)
            if "loading" in only:
                loading(raws, arguments.rounds, manifests)
            if "s3" in only:
                s3(manifests["chairs"], arguments.rounds)


def _raws() -> list[Raw]:
    real, others = (Path(os.environ[name]) for name in SAMPLES)
    return [
        Raw("chairs", real / "FlyingChairs_release"),
        Raw("sintel", real / "Sintel"),
        Raw("kitti", real / "KITTI"),
        Raw("things", others / "FlyingThings3D"),
        Raw("hd1k", others / "HD1K"),
    ]


if __name__ == "__main__":
    main()
