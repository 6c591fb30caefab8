"""MPI-Sintel (Butler et al., ECCV 2012): two passes over the same flow, with occlusion and invalid masks.

    training/clean/alley_1/frame_0001.png     training/final/…
    training/flow/alley_1/frame_0001.flo      training/occlusions/…png      training/invalid/…png
    test/clean/ambush_1/frame_0001.png        test/final/…

Subsets: "training-clean", "training-final" (1,041 pairs each), "test-clean", "test-final" (552 each, without flow).
"""

import re
from collections import defaultdict

from datasets_etl.sources.layout import finished, matches, one_prefix, require, require_unbroken
from datasets_etl.sources.ref import SampleRef, SourceTree

_TITLE = "MPI-Sintel"
_IMAGE = r"(?P<pass>clean|final)/(?P<scene>[^/.]+)/frame_(?P<number>\d{4})\.png"
_FRAME = re.compile(r"(?P<prefix>(?:.*/)?)(?P<part>training|test)/" + _IMAGE)
_BARE_FRAME = re.compile(_IMAGE)
_MASK = re.compile(r"(?P<folder>(?:.*/)?)(?P<kind>occlusions|invalid)/[^/.]+/frame_\d{4}\.png")
_FLOW = re.compile(r"(?P<folder>(?:.*/)?)flow/(?P<scene>[^/.]+)/frame_(?P<number>\d{4})\.flo")

_Frames = dict[tuple[str, str, str], set[int]]  # (part, pass, scene) → frame numbers


def index(tree: SourceTree) -> list[SampleRef]:
    """Every pair of the parts and passes that exist, with masks if the dataset has them.

    The root may also be the "training" folder itself, which is recognised by its "flow" folder.

    Raises:
        DataError: there are no frames, a sequence has a gap, a pair lacks flow or mask, or a flow has no frames.
    """
    folders, frames = _frames(tree)
    files = frozenset(tree.files)
    masks = {match["kind"] for match in matches(tree, _MASK) if match["folder"] == folders["training"]}
    labels = ["flow", *sorted(masks)]
    refs = []
    for (part, pass_name, scene), numbers in sorted(frames.items()):
        images = f"{folders[part]}{pass_name}/{scene}/"
        require_unbroken(tree, numbers, images + "frame_{:04d}.png")
        for number in sorted(numbers - {max(numbers)}):
            frame = f"frame_{number:04d}"
            image0 = f"{images}{frame}.png"
            truth = {
                kind: require(
                    tree, files, f"{folders[part]}{kind}/{scene}/{frame}.{'flo' if kind == 'flow' else 'png'}", image0
                )
                for kind in (labels if part == "training" else ())
            }
            refs.append(
                SampleRef(
                    dataset="sintel",
                    subset=f"{part}-{pass_name}",
                    key=f"{part}-{pass_name}_{scene}_{frame}",
                    scene=scene,
                    frame=frame,
                    image0=image0,
                    image1=f"{images}frame_{number + 1:04d}.png",
                    flow=truth.get("flow"),
                    occlusion=truth.get("occlusions"),
                    invalid=truth.get("invalid"),
                )
            )
    _require_frames(tree, files, folders["training"], frames)
    return finished(tree, refs, _TITLE)


def _frames(tree: SourceTree) -> tuple[dict[str, str], _Frames]:
    """The folder of each part, and the frame numbers found."""
    frames: _Frames = defaultdict(set)
    if found := matches(tree, _FRAME):
        prefix = one_prefix(tree, (match["prefix"] for match in found), _TITLE, "", "")
        for match in found:
            frames[match["part"], match["pass"], match["scene"]].add(int(match["number"]))
        return {"training": f"{prefix}training/", "test": f"{prefix}test/"}, frames
    found = matches(tree, _BARE_FRAME)
    has_flow = any(path.startswith("flow/") for path in tree.files)
    one_prefix(
        tree,
        [""] if found and has_flow else [],
        _TITLE,
        "training/clean/alley_1/frame_0001.png and training/flow/alley_1/frame_0001.flo",
        "give the folder that holds training and test",
    )
    for match in found:
        frames["training", match["pass"], match["scene"]].add(int(match["number"]))
    return {"training": "", "test": "test/"}, frames


def _require_frames(tree: SourceTree, files: frozenset[str], folder: str, frames: _Frames) -> None:
    """Checks that each flow has its two frames in every pass."""
    passes = sorted({pass_name for part, pass_name, _ in frames if part == "training"}) or ["clean"]
    for match in matches(tree, _FLOW):
        if match["folder"] != folder:
            continue
        for pass_name in passes:
            for number in (int(match["number"]), int(match["number"]) + 1):
                require(tree, files, f"{folder}{pass_name}/{match['scene']}/frame_{number:04d}.png", match[0])
