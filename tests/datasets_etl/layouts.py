"""Listings of raw datasets: whole ones, as their authors publish them, and small ones with gaps."""

import pytest

from datasets_etl.sources import SOURCES, SourceTree

each_dataset = pytest.mark.parametrize("dataset", list(SOURCES))


def listing(files: list[str], contents: dict[str, bytes] | None = None, root: str = "/data/set") -> SourceTree:
    held = contents or {}
    return SourceTree(root, sorted([*files, *held]), lambda path: held[path])


def chairs_files(pairs: int = 22872) -> list[str]:
    kinds = ("img1.ppm", "img2.ppm", "flow.flo")
    return [f"data/{number:05d}_{kind}" for number in range(1, pairs + 1) for kind in kinds] + ["README.txt"]


def chairs_split(pairs: int = 22872, val: int = 640) -> str:
    return "".join("2\n" if number * val // pairs != (number + 1) * val // pairs else "1\n" for number in range(pairs))


def things_files(train_scenes: int = 2239, test_scenes: int = 437) -> list[str]:
    files = []
    for part, count in (("TRAIN", train_scenes), ("TEST", test_scenes)):
        for i in range(count):
            scene = f"{part}/{'ABC'[i * 3 // count]}/{i:04d}"
            for number in range(6, 16):
                for pass_name in ("clean", "final"):
                    images = f"frames_{pass_name}pass/{scene}"
                    files += [f"{images}/{camera}/{number:04d}.png" for camera in ("left", "right")]
                for way, camera in (("Future", "left"), ("Future", "right"), ("Past", "left"), ("Past", "right")):
                    flow = f"OpticalFlowInto{way}_{number:04d}_{camera[0].upper()}.pfm"
                    files.append(f"optical_flow/{scene}/into_{way.lower()}/{camera}/{flow}")
    return files


def sintel_files() -> list[str]:
    files = []
    lengths = [50] * 20 + [33, 20, 11]  # 23 scenes, 1,064 frames
    for i, length in enumerate(lengths):
        for number in range(1, length + 1):
            stem = f"scene_{i}/frame_{number:04d}"
            files += [f"training/{pass_name}/{stem}.png" for pass_name in ("albedo", "clean", "final")]
            files.append(f"training/invalid/{stem}.png")
            if number < length:
                files += [
                    f"training/flow/{stem}.flo",
                    f"training/occlusions/{stem}.png",
                    f"training/flow_viz/{stem}.png",
                ]
    for i in range(12):  # 564 frames
        for number in range(1, 48):
            files += [f"test/{pass_name}/shot_{i}/frame_{number:04d}.png" for pass_name in ("clean", "final")]
    return files


def kitti_files() -> list[str]:
    files = []
    for scene in range(200):
        for part in ("training", "testing"):
            for camera in ("image_2", "image_3"):
                files += [f"{part}/{camera}/{scene:06d}_{frame}.png" for frame in ("10", "11")]
        for kind in ("flow_occ", "flow_noc", "disp_occ_0"):
            files.append(f"training/{kind}/{scene:06d}_10.png")
    return files


def hd1k_files() -> list[str]:
    files = []
    for scene in range(36):
        for i in range(31 if scene < 3 else 30):  # 36 sequences, 1,083 frames
            name = f"{scene:06d}_{10 + i:04d}.png"
            files += [
                f"hd1k_input/image_2/{name}",
                f"hd1k_flow_gt/flow_occ/{name}",
                f"hd1k_flow_uncertainty/flow_unc/{name}",
            ]
    return [*files, "hd1k_challenge/image_2/000000_0000.png"]


def whole_dataset(dataset: str) -> SourceTree:
    if dataset == "chairs":
        return listing(chairs_files(), {"FlyingChairs_train_val.txt": chairs_split().encode()})
    return listing(
        {"things": things_files, "sintel": sintel_files, "kitti": kitti_files, "hd1k": hd1k_files}[dataset]()
    )


def small_sintel(*missing: str) -> SourceTree:
    stems = [f"alley_1/frame_{number:04d}" for number in (1, 2, 3, 4)]
    files = [f"training/{pass_name}/{stem}.png" for pass_name in ("clean", "final") for stem in stems]
    files += [f"training/flow/{stem}.flo" for stem in stems[:3]]
    files += [f"training/occlusions/{stem}.png" for stem in stems[:3]] + [
        f"training/invalid/{stem}.png" for stem in stems
    ]
    return listing([path for path in files if path not in missing])


def small_things(*missing: str) -> SourceTree:
    return listing([path for path in things_files(2, 1) if path not in missing])


def small_chairs(split: str = "1\n2\n1\n", missing: str = "") -> SourceTree:
    files = [path for path in chairs_files(3) if path != missing]
    return listing(files, {"FlyingChairs_train_val.txt": split.encode()})
