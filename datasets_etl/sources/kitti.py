"""KITTI 2015 scene flow (Menze & Geiger, CVPR 2015): sparse flow from a laser scanner.

    training/image_2/000000_10.png  000000_11.png     training/flow_occ/000000_10.png     training/flow_noc/…
    testing/image_2/…

Subsets: "training" (200 pairs) and "testing" (200, without flow). The multi-view extension is not used.
"""

import re

from datasets_etl.errors import DataError
from datasets_etl.sources.layout import finished, matches, one_prefix, require
from datasets_etl.sources.ref import SampleRef, SourceTree

_TITLE = "KITTI 2015"
_FRAME = re.compile(r"(?P<prefix>(?:.*/)?)(?P<part>training|testing)/image_2/(?P<scene>\d{6})_1[01]\.png")
_FRAME_2012 = re.compile(r"(?:.*/)?(?:colored_0|image_0)/\d{6}_1[01]\.png")
_FLOW = re.compile(r"\d{6}_10\.png")
_BARE_FRAME = re.compile(r"image_2/(?P<scene>\d{6})_1[01]\.png")


def index(tree: SourceTree) -> list[SampleRef]:
    """Every pair: first "testing", then "training"; with flow_noc if the dataset has it.

    The root may also be the "training" folder itself, which is recognised by its "flow_occ" folder.

    Raises:
        DataError: there are no frames, a frame lacks its partner or its flow, or a flow has no frames.
    """
    folders, scenes = _scenes(tree)
    files = frozenset(tree.files)
    flow_occ = f"{folders['training']}flow_occ/"
    flow_noc = f"{folders['training']}flow_noc/"
    for path in tree.files:
        if path.startswith(flow_occ) and _FLOW.fullmatch(name := path.removeprefix(flow_occ)):
            require(tree, files, f"{folders['training']}image_2/{name}", path)
    has_noc = any(path.startswith(flow_noc) and _FLOW.fullmatch(path.removeprefix(flow_noc)) for path in tree.files)
    refs = []
    for part, scene in sorted(scenes):
        images = f"{folders[part]}image_2/{scene}"
        pair, labelled = f"pair {part}/{scene}", part == "training"
        refs.append(
            SampleRef(
                dataset="kitti",
                subset=part,
                key=f"{part}_{scene}_10",
                scene=scene,
                frame="10",
                image0=require(tree, files, f"{images}_10.png", pair),
                image1=require(tree, files, f"{images}_11.png", pair),
                flow=require(tree, files, f"{flow_occ}{scene}_10.png", pair) if labelled else None,
                flow_noc=require(tree, files, f"{flow_noc}{scene}_10.png", pair) if labelled and has_noc else None,
            )
        )
    return finished(tree, refs, _TITLE)


def _scenes(tree: SourceTree) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """The folder of each part, and every (part, scene)."""
    if found := matches(tree, _FRAME):
        prefix = one_prefix(tree, (match["prefix"] for match in found), _TITLE, "", "")
        folders = {"training": f"{prefix}training/", "testing": f"{prefix}testing/"}
        return folders, {(match["part"], match["scene"]) for match in found}
    if older := matches(tree, _FRAME_2012):
        raise DataError(
            f"{tree.root} holds KITTI 2012 ({older[0][0]}), this is for {_TITLE}: unpack data_scene_flow.zip"
        )
    found = matches(tree, _BARE_FRAME)
    has_flow = any(path.startswith("flow_occ/") for path in tree.files)
    one_prefix(
        tree,
        [""] if found and has_flow else [],
        _TITLE,
        "training/image_2/000000_10.png and training/flow_occ/000000_10.png",
        "give the folder that data_scene_flow.zip unpacks to",
    )
    return {"training": "", "testing": "testing/"}, {("training", match["scene"]) for match in found}
