"""FlyingThings3D (Mayer et al., CVPR 2016): left camera, both passes, flow into the future and into the past.

    frames_cleanpass/TRAIN/A/0000/left/0006.png          frames_finalpass/…
    optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm
    optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0007_L.pfm

A pair into the past is (frame t, frame t-1). Subsets, for each pass: "train-clean" (40,302 pairs), and two disjoint
parts of the 7,866 test pairs: "val-clean", the 1,024 pairs that GMFlow validates on (every 7th of the first 7,168 test
pairs in order), and "test-clean", the other 6,842. The order is the reference's: by direction, then scene, then frame.
"""

import re
from collections import defaultdict

from datasets_etl.errors import DataError
from datasets_etl.sources.layout import finished, matches, one_prefix, require, require_together, require_unbroken
from datasets_etl.sources.ref import SampleRef, SourceTree

_TITLE = "FlyingThings3D"
_FRAME = re.compile(
    r"(?P<prefix>(?:.*/)?)frames_(?P<pass>clean|final)pass/(?P<part>TRAIN|TEST)/(?P<scene>[A-Z]/\d{4})"
    r"/left/(?P<number>\d{4})\.png"
)
_FLOW = re.compile(
    r"(?P<prefix>(?:.*/)?)optical_flow/(?P<part>TRAIN|TEST)/(?P<scene>[A-Z]/\d{4})"
    r"/(?P<direction>into_future|into_past)/left/OpticalFlowInto(?:Future|Past)_(?P<number>\d{4})_L\.pfm"
)
_DIRECTIONS = {"into_future": ("Future", 1), "into_past": ("Past", -1)}
_VAL_SPAN, _VAL_STRIDE = 7168, 7  # 7,866 test pairs → 1,024 (GMFlow's validation subset)


def index(tree: SourceTree) -> list[SampleRef]:
    """Every pair of the parts and passes that exist.

    Raises:
        DataError: there are no frames, a sequence has a gap, a frame has no flow, or a flow has no frame.
    """
    found = matches(tree, _FRAME)
    flows = matches(tree, _FLOW)
    _refuse_webp(tree, found)
    require_together(
        tree,
        {(match["prefix"], f"frames_{match['pass']}pass") for match in found}
        | {(match["prefix"], "optical_flow") for match in flows},
    )
    prefix = one_prefix(
        tree,
        [match["prefix"] for match in found + flows],
        _TITLE,
        "frames_cleanpass/TRAIN/A/0000/left/0006.png and optical_flow/TRAIN/…",
        "give the folder that holds frames_cleanpass, frames_finalpass and optical_flow",
    )
    frames: defaultdict[tuple[str, str, str], set[int]] = defaultdict(set)
    for match in found:
        frames[match["pass"], match["part"], match["scene"]].add(int(match["number"]))
    files = frozenset(tree.files)
    _require_frames(tree, files, prefix, frames, flows)

    refs = []
    for pass_name in ("clean", "final"):
        for part in ("TRAIN", "TEST"):
            scenes = sorted(scene for p, q, scene in frames if (p, q) == (pass_name, part))
            position = 0
            for direction in _DIRECTIONS:
                for scene in scenes:
                    for number in _first_frames(frames[pass_name, part, scene], direction):
                        subset = f"{_part_subset(part, position)}-{pass_name}"
                        refs.append(_ref(tree, files, prefix, subset, part, scene, direction, number))
                        position += 1
    return finished(tree, refs, _TITLE)


def _refuse_webp(tree: SourceTree, found: list[re.Match[str]]) -> None:
    """Raises DataError if the frames are WebP: the authors offer them as PNG and as WebP."""
    if not found and (webp := next((path for path in tree.files if path.endswith(".webp")), None)):
        raise DataError(f"{tree.root} holds frames as .webp ({webp}): download the archives with PNG frames instead")


def _part_subset(part: str, position: int) -> str:
    if part == "TRAIN":
        return "train"
    return "val" if position < _VAL_SPAN and position % _VAL_STRIDE == 0 else "test"


def _first_frames(numbers: set[int], direction: str) -> list[int]:
    step = _DIRECTIONS[direction][1]
    return sorted(number for number in numbers if number + step in numbers)


def _require_frames(
    tree: SourceTree,
    files: frozenset[str],
    prefix: str,
    frames: dict[tuple[str, str, str], set[int]],
    flows: list[re.Match[str]],
) -> None:
    for (pass_name, part, scene), numbers in frames.items():
        folder = f"{prefix}frames_{pass_name}pass/{part}/{scene}/left"
        require_unbroken(tree, numbers, folder + "/{:04d}.png")
    # Every flow needs the frame it begins at: if a scene lacked its last frame, other pairs would be validated on.
    passes = sorted({pass_name for pass_name, _, _ in frames}) or ["clean"]
    for match in flows:
        for pass_name in passes:
            frame = f"frames_{pass_name}pass/{match['part']}/{match['scene']}/left/{match['number']}.png"
            require(tree, files, prefix + frame, match[0])


def _ref(
    tree: SourceTree,
    files: frozenset[str],
    prefix: str,
    subset: str,
    part: str,
    scene: str,
    direction: str,
    number: int,
) -> SampleRef:
    word, step = _DIRECTIONS[direction]
    folder = f"{prefix}frames_{subset.rsplit('-', 1)[1]}pass/{part}/{scene}/left"
    image0 = f"{folder}/{number:04d}.png"
    flow = f"{prefix}optical_flow/{part}/{scene}/{direction}/left/OpticalFlowInto{word}_{number:04d}_L.pfm"
    return SampleRef(
        dataset="things",
        subset=subset,
        key=f"{subset}_{direction}_{scene.replace('/', '_')}_{number:04d}",
        scene=f"{part}/{scene}",
        frame=f"{number:04d}",
        image0=image0,
        image1=f"{folder}/{number + step:04d}.png",
        flow=require(tree, files, flow, image0),
    )
