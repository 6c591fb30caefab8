"""HD1K (Kondermann et al., CVPR Workshops 2016): driving sequences with sparse flow.

    hd1k_input/image_2/000000_0010.png        hd1k_flow_gt/flow_occ/000000_0010.png

Subset: "training" (1,047 pairs): consecutive frames of a sequence; its last frame starts no pair.
"""

import re
from collections import defaultdict
from itertools import pairwise

from datasets_etl.sources.layout import finished, matches, one_prefix, require, require_together
from datasets_etl.sources.ref import SampleRef, SourceTree

_TITLE = "HD1K"
_FILE = re.compile(
    r"(?P<prefix>(?:.*/)?)(?P<kind>hd1k_input/image_2|hd1k_flow_gt/flow_occ)/(?P<scene>\d{6})_(?P<frame>\d{4})\.png"
)


def index(tree: SourceTree) -> list[SampleRef]:
    """Every pair. Two frames are consecutive if their numbers differ by the smallest step in the listing: a frame
    before a gap starts no pair, because its flow leads to a missing frame.

    Raises:
        DataError: there are no frames, a frame has no flow, or a flow has no frame.
    """
    found = matches(tree, _FILE)
    require_together(tree, {(match["prefix"], match["kind"].partition("/")[0]) for match in found})
    prefix = one_prefix(
        tree,
        (match["prefix"] for match in found),
        _TITLE,
        "hd1k_input/image_2/000000_0010.png and hd1k_flow_gt/flow_occ/000000_0010.png",
        "give the folder that holds hd1k_input and hd1k_flow_gt",
    )
    files = frozenset(tree.files)
    images, flows = f"{prefix}hd1k_input/image_2/", f"{prefix}hd1k_flow_gt/flow_occ/"
    scenes: defaultdict[str, list[str]] = defaultdict(list)
    for match in found:
        if match["kind"] == "hd1k_input/image_2":
            scenes[match["scene"]].append(match["frame"])
        else:
            require(tree, files, f"{images}{match['scene']}_{match['frame']}.png", match[0])
    neighbours = [(scene, *pair) for scene, frames in scenes.items() for pair in pairwise(sorted(frames))]
    step = min((int(following) - int(frame) for _, frame, following in neighbours), default=0)
    refs = []
    for scene, frame, following in neighbours:
        if int(following) - int(frame) == step:
            image0 = f"{images}{scene}_{frame}.png"
            refs.append(
                SampleRef(
                    dataset="hd1k",
                    subset="training",
                    key=f"training_{scene}_{frame}",
                    scene=scene,
                    frame=frame,
                    image0=image0,
                    image1=f"{images}{scene}_{following}.png",
                    flow=require(tree, files, f"{flows}{scene}_{frame}.png", image0),
                )
            )
    return finished(tree, refs, _TITLE)
