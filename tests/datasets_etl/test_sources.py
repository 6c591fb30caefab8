"""The official layouts of the five datasets, on listings alone."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from datasets_etl.sources import EXPECTED_COUNTS, SOURCES, SampleRef, SourceTree, chairs
from tests.datasets_etl.layouts import (
    chairs_files,
    chairs_split,
    each_dataset,
    listing,
    small_sintel,
    small_things,
    things_files,
    whole_dataset,
)


def tree_of(root: Path) -> SourceTree:
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return SourceTree(str(root), files, lambda path: (root / path).read_bytes())


@each_dataset
def test_a_whole_dataset_gives_its_published_counts(dataset: str) -> None:
    refs = SOURCES[dataset](whole_dataset(dataset))
    assert Counter(ref.subset for ref in refs) == EXPECTED_COUNTS[dataset]


def test_expected_counts_add_up_to_the_published_ones() -> None:
    assert EXPECTED_COUNTS["chairs"] == {"train": 22232, "val": 640}
    things = EXPECTED_COUNTS["things"]
    assert things["train-clean"] == things["train-final"] == 40302
    assert things["val-clean"] == 1024
    assert things["val-clean"] + things["test-clean"] == things["val-final"] + things["test-final"] == 7866
    assert EXPECTED_COUNTS["sintel"]["training-clean"] == EXPECTED_COUNTS["sintel"]["training-final"] == 1041
    assert EXPECTED_COUNTS["kitti"]["training"] == 200
    assert EXPECTED_COUNTS["hd1k"] == {"training": 1047}


@each_dataset
def test_keys_are_unique_in_order_and_fit_for_a_tar(dataset: str) -> None:
    refs = SOURCES[dataset](whole_dataset(dataset))
    keys = [ref.key for ref in refs]
    assert keys == sorted(set(keys))
    assert not any("." in key or "/" in key for key in keys)
    assert {ref.dataset for ref in refs} == {dataset}


@each_dataset
def test_every_path_of_a_ref_is_in_the_listing(dataset: str) -> None:
    tree = whole_dataset(dataset)
    files = set(tree.files)
    for ref in SOURCES[dataset](tree):
        paths = (ref.image0, ref.image1, ref.flow, ref.occlusion, ref.invalid, ref.flow_noc)
        assert {path for path in paths if path is not None} <= files
        assert (ref.flow is None) == (ref.subset in ("test-clean", "test-final", "testing") and dataset != "things")


@each_dataset
def test_indexing_does_not_depend_on_where_below_the_root_the_layout_lies(dataset: str) -> None:
    tree = whole_dataset(dataset)
    prefix = "mirror_flow_occ/of.2020/"
    moved = SourceTree(
        tree.root, [prefix + path for path in tree.files], lambda path: tree.read(path.removeprefix(prefix))
    )
    paths = ("image0", "image1", "flow", "occlusion", "invalid", "flow_noc")

    def strip(ref: SampleRef) -> SampleRef:
        held = {name: getattr(ref, name) for name in paths}
        return dataclasses.replace(ref, **{name: path and path.removeprefix(prefix) for name, path in held.items()})

    assert [strip(ref) for ref in SOURCES[dataset](moved)] == SOURCES[dataset](tree)


@each_dataset
def test_litter_in_the_tree_changes_nothing(dataset: str) -> None:
    tree = whole_dataset(dataset)
    litter = [".DS_Store"]
    for head, tail in {head: tail for head, _, tail in (path.rpartition("/") for path in tree.files) if head}.items():
        litter += [f"{head}/.DS_Store", f"{head}/._{tail}", f"__MACOSX/{head}/._{tail}", f"{head}/Thumbs.db"]
    littered = SourceTree(tree.root, sorted([*tree.files, *litter]), tree.read)
    assert SOURCES[dataset](littered) == SOURCES[dataset](tree)


def test_chairs_follow_the_official_list_by_number_even_in_an_excerpt() -> None:
    tree = listing(chairs_files(3)[3:], {"FlyingChairs_train_val.txt": b"1\n2\n1\n"})
    assert [(ref.key, ref.flow) for ref in chairs.index(tree)] == [
        ("train_00003", "data/00003_flow.flo"),
        ("val_00002", "data/00002_flow.flo"),
    ]


def test_chairs_take_the_list_from_elsewhere_or_split_by_hash() -> None:
    tree = listing(chairs_files())
    given_list = chairs.index(tree, split_list=chairs_split())
    assert Counter(ref.subset for ref in given_list) == EXPECTED_COUNTS["chairs"]
    hashed = chairs.index_by_hash(tree)
    val = sum(ref.subset == "val" for ref in hashed)
    assert abs(val - 640) < 4 * 640**0.5
    excerpt = {ref.scene: ref.subset for ref in chairs.index_by_hash(listing(chairs_files(2000)))}
    assert excerpt == {ref.scene: ref.subset for ref in hashed if ref.scene in excerpt}


def test_a_chairs_list_may_begin_with_a_byte_order_mark() -> None:
    tree = listing(chairs_files(3), {"FlyingChairs_train_val.txt": b"\xef\xbb\xbf1\r\n2\r\n1\r\n"})
    assert [ref.key for ref in chairs.index(tree)] == ["train_00001", "train_00003", "val_00002"]


def test_things_pairs_into_the_past_are_frame_t_and_the_one_before() -> None:
    refs = {ref.key: ref for ref in SOURCES["things"](small_things())}
    past = refs["train-final_into_past_A_0000_0007"]
    assert past.image0 == "frames_finalpass/TRAIN/A/0000/left/0007.png"
    assert past.image1 == "frames_finalpass/TRAIN/A/0000/left/0006.png"
    assert past.flow == "optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0007_L.pfm"
    future = refs["train-final_into_future_A_0000_0006"]
    assert (future.image0, future.image1) == (past.image1, past.image0)
    assert future.flow == "optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm"


def test_things_validation_subset_is_every_7th_of_the_first_7168_test_pairs() -> None:
    # As GMFlow lists the test set: direction outermost, then scenes, then frames.
    tree = listing(things_files(0, 437))
    scenes = sorted(
        {path.split("/left/")[0] for path in tree.files if path.startswith("frames_cleanpass") and "/left/" in path}
    )
    flows = []
    for way, numbers in (("Future", range(6, 15)), ("Past", range(7, 16))):
        for scene in scenes:
            place = scene.replace("frames_cleanpass", "optical_flow")
            flows += [f"{place}/into_{way.lower()}/left/OpticalFlowInto{way}_{number:04d}_L.pfm" for number in numbers]
    assert len(flows) == 7866
    expected = flows[:-698][::7]
    refs = SOURCES["things"](tree)
    assert [ref.flow for ref in refs if ref.subset == "val-clean"] == expected
    assert [ref.flow for ref in refs if ref.subset == "val-final"] == expected
    assert sorted([*expected, *(str(ref.flow) for ref in refs if ref.subset == "test-clean")]) == sorted(flows)


def test_sintel_pairs_have_flow_and_masks_of_their_first_frame() -> None:
    refs = SOURCES["sintel"](small_sintel())
    assert [ref.key for ref in refs][:3] == [f"training-clean_alley_1_frame_000{n}" for n in (1, 2, 3)]
    ref = refs[-1]
    assert ref.image0 == "training/final/alley_1/frame_0003.png"
    assert ref.image1 == "training/final/alley_1/frame_0004.png"
    assert ref.flow == "training/flow/alley_1/frame_0003.flo"
    assert ref.occlusion == "training/occlusions/alley_1/frame_0003.png"
    assert ref.invalid == "training/invalid/alley_1/frame_0003.png"


def test_sintel_without_masks_or_with_one_pass_is_what_it_is() -> None:
    full = small_sintel()
    kept = [path for path in full.files if "/clean/" in path or "/flow/" in path]
    refs = SOURCES["sintel"](listing(kept))
    assert {(ref.subset, ref.occlusion, ref.invalid) for ref in refs} == {("training-clean", None, None)}


def test_a_folder_with_nothing_but_litter_is_no_ground_truth() -> None:
    full = whole_dataset("kitti")
    kept = [path for path in full.files if "/flow_noc/" not in path]
    assert {ref.flow_noc for ref in SOURCES["kitti"](listing([*kept, "training/flow_noc/.DS_Store"]))} == {None}
    kept = [path for path in small_sintel().files if "/invalid/" not in path]
    refs = SOURCES["sintel"](listing([*kept, "training/invalid/.DS_Store"]))
    assert {(ref.occlusion is None, ref.invalid) for ref in refs} == {(False, None)}


@pytest.mark.parametrize("dataset", ["sintel", "kitti"])
def test_the_training_folder_itself_will_do(dataset: str) -> None:
    inner = [path.removeprefix("training/") for path in whole_dataset(dataset).files if path.startswith("training/")]
    refs = SOURCES[dataset](listing(inner))
    kept = {subset: count for subset, count in EXPECTED_COUNTS[dataset].items() if subset.startswith("training")}
    assert Counter(ref.subset for ref in refs) == kept


def test_kitti_pairs_carry_both_ground_truths() -> None:
    ref = next(ref for ref in SOURCES["kitti"](whole_dataset("kitti")) if ref.key == "training_000007_10")
    assert (ref.image0, ref.image1) == ("training/image_2/000007_10.png", "training/image_2/000007_11.png")
    assert (ref.flow, ref.flow_noc) == ("training/flow_occ/000007_10.png", "training/flow_noc/000007_10.png")


def test_hd1k_pairs_are_neighbours_and_never_cross_sequences() -> None:
    refs = SOURCES["hd1k"](whole_dataset("hd1k"))
    assert [ref.image1 for ref in refs if ref.scene == "000000"][:2] == [
        "hd1k_input/image_2/000000_0011.png",
        "hd1k_input/image_2/000000_0012.png",
    ]
    assert all(f"/{ref.scene}_" in ref.image0 and f"/{ref.scene}_" in ref.image1 for ref in refs)


@pytest.mark.parametrize("step", [1, 10])
def test_hd1k_frames_around_a_gap_are_no_pair(step: int) -> None:
    """The flow of the frame before it leads to the one that is missing."""
    numbers = [step * number for number in (1, 2, 4, 5)]
    stems = [f"{scene:06d}_{number:04d}.png" for scene in (0, 1) for number in numbers]
    refs = SOURCES["hd1k"](
        listing([f"{kind}/{stem}" for kind in ("hd1k_input/image_2", "hd1k_flow_gt/flow_occ") for stem in stems])
    )
    assert [(ref.scene, int(ref.frame) // step) for ref in refs] == [
        (scene, number) for scene in ("000000", "000001") for number in (1, 4)
    ]


@each_dataset
def test_the_flow_of_kitti_and_hd1k_alone_is_sparse(dataset: str) -> None:
    refs = [ref for ref in SOURCES[dataset](whole_dataset(dataset)) if ref.flow is not None]
    assert {ref.is_sparse for ref in refs} == {dataset in ("kitti", "hd1k")}


@pytest.mark.parametrize(
    ("dataset", "fixture", "place", "counts"),
    [
        ("chairs", "samples", "FlyingChairs_release", {"train": 4, "val": 2}),
        ("sintel", "samples", "Sintel", {"training-clean": 2, "training-final": 2}),
        ("kitti", "samples", "KITTI", {"training": 1}),
        ("things", "format_samples", "FlyingThings3D", {"train-clean": 2, "train-final": 2}),
        ("hd1k", "format_samples", "HD1K", {"training": 1}),
    ],
)
def test_real_samples_are_indexed(
    dataset: str, fixture: str, place: str, counts: dict[str, int], request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(fixture)
    assert Counter(ref.subset for ref in SOURCES[dataset](tree_of(root / place))) == counts
