"""What is not a dataset's official layout is refused, naming what is there or missing."""

import pytest

from datasets_etl.sources import SOURCES, SourceTree, chairs
from tests.datasets_etl.layouts import (
    chairs_files,
    each_dataset,
    hd1k_files,
    kitti_files,
    listing,
    small_chairs,
    small_sintel,
    small_things,
    things_files,
    whole_dataset,
)
from tests.datasets_etl.refusals import refusal


@each_dataset
def test_an_empty_root_is_named_with_what_was_looked_for(dataset: str) -> None:
    message = refusal(lambda: SOURCES[dataset](listing([], root="/data/nowhere")))
    assert "/data/nowhere is empty or does not exist" in message
    assert any(word in message for word in ("img1.ppm", "frame_0001.png", "0006.png", "000000_"))


@each_dataset
def test_another_datasets_layout_is_refused_naming_what_is_there(dataset: str) -> None:
    other = whole_dataset("kitti" if dataset != "kitti" else "hd1k")
    message = refusal(lambda: SOURCES[dataset](other))
    assert "/data/set does not hold" in message
    assert ("training" if dataset != "kitti" else "hd1k_input") in message


@each_dataset
def test_two_copies_below_the_root_are_ambiguous(dataset: str) -> None:
    tree = whole_dataset(dataset)
    twice = SourceTree(tree.root, [f"{copy}/{path}" for copy in ("old", "new") for path in tree.files], tree.read)
    message = refusal(lambda: SOURCES[dataset](twice))
    assert "several copies" in message
    assert "new/" in message


@pytest.mark.parametrize(
    ("dataset", "folders", "there"),
    [
        (
            "things",
            {"frames_cleanpass": "a/", "frames_finalpass": "b/", "optical_flow": ""},
            "a/frames_cleanpass, b/frames_finalpass, optical_flow",
        ),
        (
            "things",
            {"frames_cleanpass": "frames/", "frames_finalpass": "frames/", "optical_flow": "flow/"},
            "flow/optical_flow, frames/frames_cleanpass, frames/frames_finalpass",
        ),
        ("hd1k", {"hd1k_input": "in/", "hd1k_flow_gt": "gt/"}, "gt/hd1k_flow_gt, in/hd1k_input"),
    ],
)
def test_archives_that_were_unpacked_apart_are_told_from_copies(
    dataset: str, folders: dict[str, str], there: str
) -> None:
    tree = small_things() if dataset == "things" else whole_dataset(dataset)
    moved = listing([folders.get(path.split("/")[0], "") + path for path in tree.files])
    assert f"/data/set holds {there}: unpacked apart" in refusal(lambda: SOURCES[dataset](moved))


def test_things_frames_as_webp_are_told_which_archives_to_take() -> None:
    webp = [f"{path.removesuffix('.png')}.webp" if "frames_" in path else path for path in things_files(2, 1)]
    message = refusal(lambda: SOURCES["things"](listing(webp)))
    assert "left/0006.webp" in message
    assert "archives with PNG frames" in message


@pytest.mark.parametrize("camera", ["colored_0", "image_0"])
def test_kitti_of_2012_is_called_by_its_name(camera: str) -> None:
    tree = listing([path.replace("image_2/", f"{camera}/") for path in kitti_files()])
    assert f"holds KITTI 2012 (testing/{camera}/000000_10.png)" in refusal(lambda: SOURCES["kitti"](tree))


@pytest.mark.parametrize(
    ("split", "words"), [("1\n2\n", "2 lines"), ("1\n2\n3\n", "'3'"), ("", "0 lines"), ("train\n" * 3, "'train'")]
)
def test_a_chairs_list_that_does_not_fit_is_refused(split: str, words: str) -> None:
    assert words in refusal(lambda: chairs.index(small_chairs(split)))


@pytest.mark.parametrize(
    ("dataset", "tree", "missing"),
    [
        ("chairs", small_chairs(missing="data/00002_img2.ppm"), "data/00002_img2.ppm"),
        ("chairs", small_chairs(missing="data/00003_flow.flo"), "data/00003_flow.flo"),
        ("chairs", listing(chairs_files(3)), "FlyingChairs_train_val.txt"),
        ("sintel", small_sintel("training/flow/alley_1/frame_0002.flo"), "training/flow/alley_1/frame_0002.flo"),
        ("sintel", small_sintel("training/clean/alley_1/frame_0002.png"), "training/clean/alley_1/frame_0002.png"),
        ("sintel", small_sintel("training/final/alley_1/frame_0004.png"), "training/final/alley_1/frame_0004.png"),
        (
            "sintel",
            small_sintel("training/occlusions/alley_1/frame_0001.png"),
            "training/occlusions/alley_1/frame_0001.png",
        ),
        (
            "things",
            small_things("frames_cleanpass/TEST/A/0000/left/0009.png"),
            "frames_cleanpass/TEST/A/0000/left/0009.png",
        ),
        (
            # No gap, and two pairs fewer: with them the pairs validated on would be other ones.
            "things",
            small_things("frames_cleanpass/TEST/A/0000/left/0015.png"),
            "frames_cleanpass/TEST/A/0000/left/0015.png",
        ),
        (
            "things",
            small_things("optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0015_L.pfm"),
            "optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0015_L.pfm",
        ),
        (
            "things",
            listing([path for path in things_files(2, 1) if not path.startswith("frames_finalpass/TEST/")]),
            "frames_finalpass/TEST/A/0000/left/0006.png",
        ),
        (
            "kitti",
            listing([p for p in kitti_files() if p != "training/image_2/000003_11.png"]),
            "training/image_2/000003_11.png",
        ),
        (
            "kitti",
            listing([p for p in kitti_files() if p != "training/flow_occ/000003_10.png"]),
            "training/flow_occ/000003_10.png",
        ),
        ("kitti", listing([p for p in kitti_files() if "image_2/000003" not in p]), "training/image_2/000003_10.png"),
        (
            "hd1k",
            listing([p for p in hd1k_files() if p != "hd1k_input/image_2/000002_0014.png"]),
            "hd1k_input/image_2/000002_0014.png",
        ),
        (
            "hd1k",
            listing([p for p in hd1k_files() if p != "hd1k_flow_gt/flow_occ/000002_0014.png"]),
            "hd1k_flow_gt/flow_occ/000002_0014.png",
        ),
    ],
)
def test_a_missing_partner_file_is_named(dataset: str, tree: SourceTree, missing: str) -> None:
    message = refusal(lambda: SOURCES[dataset](tree))
    assert f"/data/set lacks {missing}" in message
