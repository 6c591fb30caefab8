"""Small datasets in the five official layouts, with exact ground truth: for the demo and for tests."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from datasets_etl.formats import (
    Frame,
    Mask,
    encode_flo,
    encode_frame_png,
    encode_frame_ppm,
    encode_kitti_flow,
    encode_mask,
    encode_pfm,
)
from datasets_etl.samples import FlowSample
from datasets_etl.synthetic_scene import FRAMES_PER_SCENE, MAX_MOTION, Scene, make_scene

_FAST_SCENE_EVERY = 3  # so that even a handful of scenes holds fast motion


def synthetic_pair(
    seed: int, height: int, width: int, *, max_motion: float = MAX_MOTION, sparse: bool = False
) -> FlowSample:
    """One pair in memory, without files: dense ground truth with occlusions, or sparse ground truth like KITTI's."""
    rng = np.random.default_rng(seed)
    scene = make_scene(rng, height, width, max_motion=max_motion, fast=True)
    flow, occluded = scene.flow(0, 1)
    valid = _scan(rng, height, width) if sparse else np.ones((height, width), np.bool_)
    return FlowSample(
        key=f"synthetic_{seed}",
        dataset="kitti" if sparse else "sintel",
        subset="training" if sparse else "training-clean",
        sparse=sparse,
        image0=scene.render(0),
        image1=scene.render(1),
        flow=flow * valid[..., None],
        valid=valid,
        occluded=None if sparse else occluded,
    )


def write_dataset(
    name: str,
    root: Path,
    *,
    pairs: int,
    height: int,
    width: int,
    seed: int,
    held_out: int = 0,
    max_motion: float = MAX_MOTION,
) -> None:
    """Writes a synthetic dataset in an official layout. The same arguments write the same bytes.

    Args:
        name: "chairs", "things", "sintel", "kitti" or "hd1k".
        root: the dataset's folder, created if it is missing.
        pairs: number of labelled pairs to train on, in each pass. Things counts both directions, so it must be even.
        height, width: of the frames, in pixels.
        seed: the seed of all random draws. Scene n of a seed does not depend on `pairs`.
        held_out: number of pairs in the dataset's other part: chairs "val" and Things TEST have ground truth, Sintel
            "test" and KITTI "testing" have none, as published. HD1K has no other part. For unseen labelled pairs, write
            a dataset with another seed.
        max_motion: the fastest shapes' speed as a share of the width.

    Raises:
        ValueError: the name is unknown, a number for Things is odd, or `held_out` is given for HD1K.
    """
    if name not in _WRITERS:
        raise ValueError(f"there is no synthetic {name!r}: choose from {', '.join(_WRITERS)}")
    if name == "things" and (pairs % 2 or held_out % 2):
        raise ValueError(f"Things has pairs in both directions: {pairs} and {held_out} must be even")
    if name == "hd1k" and held_out:
        raise ValueError("HD1K has no other part to hold pairs out in")
    studio = _Studio(root, height, width, seed, max_motion)
    _WRITERS[name](studio, pairs, held_out)


@dataclass(frozen=True)
class _Studio:
    """Draws numbered scenes and writes files below a root."""

    root: Path
    height: int
    width: int
    seed: int
    max_motion: float

    def scene(self, number: int) -> tuple[Scene, np.random.Generator]:
        rng = np.random.default_rng([self.seed, number])
        fast = number % _FAST_SCENE_EVERY == 0
        return make_scene(rng, self.height, self.width, max_motion=self.max_motion, fast=fast), rng

    def scenes(self, pairs: int, first: int = 0) -> Iterator[tuple[int, Scene, int, np.random.Generator]]:
        """Yields (number, scene, number of frames, generator) for as many scenes as the pairs need."""
        pairs_each = FRAMES_PER_SCENE - 1
        for number in range(-(-pairs // pairs_each)):
            scene, rng = self.scene(first + number)
            yield first + number, scene, min(pairs_each, pairs - number * pairs_each) + 1, rng

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _write_chairs(studio: _Studio, pairs: int, held_out: int) -> None:
    for number in range(pairs + held_out):
        scene, _ = studio.scene(number)
        stem = f"data/{number + 1:05d}"
        studio.write(f"{stem}_img1.ppm", encode_frame_ppm(scene.render(0)))
        studio.write(f"{stem}_img2.ppm", encode_frame_ppm(scene.render(1)))
        studio.write(f"{stem}_flow.flo", encode_flo(scene.flow(0, 1)[0]))
    studio.write("FlyingChairs_train_val.txt", b"1\n" * pairs + b"2\n" * held_out)


def _write_things(studio: _Studio, pairs: int, held_out: int) -> None:
    for part, count, first in (("TRAIN", pairs // 2, 0), ("TEST", held_out // 2, pairs)):
        for number, scene, frames, rng in studio.scenes(count, first):
            folder = f"{part}/A/{number:04d}"
            for time in range(frames):
                frame = time + 6
                clean = scene.render(time)
                studio.write(f"frames_cleanpass/{folder}/left/{frame:04d}.png", encode_frame_png(clean))
                studio.write(f"frames_finalpass/{folder}/left/{frame:04d}.png", encode_frame_png(_final(clean)))
                for way, step in (("Future", 1), ("Past", -1)):  # flow is published for the outermost frames as well
                    flow, _ = scene.flow(time, time + step)
                    flow[_disc(rng, studio)] = np.nan  # NaN in places, as in the published files
                    path = f"optical_flow/{folder}/into_{way.lower()}/left/OpticalFlowInto{way}_{frame:04d}_L.pfm"
                    studio.write(path, encode_pfm(flow))


def _write_sintel(studio: _Studio, pairs: int, held_out: int) -> None:
    for part, count, first in (("training", pairs, 0), ("test", held_out, pairs)):
        for number, scene, frames, rng in studio.scenes(count, first):
            for time in range(frames):
                stem = f"scene_{number:04d}/frame_{time + 1:04d}"
                clean = scene.render(time)
                studio.write(f"{part}/clean/{stem}.png", encode_frame_png(clean))
                studio.write(f"{part}/final/{stem}.png", encode_frame_png(_final(clean)))
                if part == "training" and time + 1 < frames:
                    flow, occluded = scene.flow(time, time + 1)
                    studio.write(f"{part}/flow/{stem}.flo", encode_flo(flow))
                    studio.write(f"{part}/occlusions/{stem}.png", encode_mask(occluded))
                    studio.write(f"{part}/invalid/{stem}.png", encode_mask(_disc(rng, studio)))


def _write_kitti(studio: _Studio, pairs: int, held_out: int) -> None:
    for part, count, first in (("training", pairs, 0), ("testing", held_out, pairs)):
        for number in range(count):
            scene, rng = studio.scene(first + number)
            for time in (0, 1):
                image = encode_frame_png(scene.render(time))
                studio.write(f"{part}/image_2/{number:06d}_{10 + time}.png", image)
            if part == "training":
                flow, occluded = scene.flow(0, 1)
                scanned = _scan(rng, studio.height, studio.width)
                studio.write(f"{part}/flow_occ/{number:06d}_10.png", encode_kitti_flow(flow, scanned))
                studio.write(f"{part}/flow_noc/{number:06d}_10.png", encode_kitti_flow(flow, scanned & ~occluded))


def _write_hd1k(studio: _Studio, pairs: int, held_out: int) -> None:
    for number, scene, frames, rng in studio.scenes(pairs + held_out):
        for time in range(frames):
            stem = f"{number:06d}_{10 + time:04d}"
            studio.write(f"hd1k_input/image_2/{stem}.png", encode_frame_png(scene.render(time)))
            # The last frame's flow is published too, though the frame after it is not.
            flow, _ = scene.flow(time, time + 1)
            valid = _scan(rng, studio.height, studio.width)
            studio.write(f"hd1k_flow_gt/flow_occ/{stem}.png", encode_kitti_flow(flow, valid))


_WRITERS: dict[str, Callable[[_Studio, int, int], None]] = {
    "chairs": _write_chairs,
    "things": _write_things,
    "sintel": _write_sintel,
    "kitti": _write_kitti,
    "hd1k": _write_hd1k,
}


def _final(clean: Frame) -> Frame:
    """A "final" pass: slightly blurred and hazy."""
    return cv2.addWeighted(cv2.GaussianBlur(clean, (3, 3), 0.8), 0.85, np.full_like(clean, 170), 0.15, 0).astype(
        np.uint8
    )


def _disc(rng: np.random.Generator, studio: _Studio) -> Mask:
    """Where ground truth is unusable: a small disc at a random place."""
    y, x = np.ogrid[: studio.height, : studio.width]
    cy, cx = rng.uniform(0, studio.height), rng.uniform(0, studio.width)
    disc: Mask = (y - cy) ** 2 + (x - cx) ** 2 < (0.05 * studio.height) ** 2
    return disc


def _scan(rng: np.random.Generator, height: int, width: int) -> Mask:
    """Where a laser scanner sees something: a third of the pixels below the sky."""
    seen = rng.uniform(size=(height, width)) < 1 / 3
    seen[: height // 5] = False
    return seen
