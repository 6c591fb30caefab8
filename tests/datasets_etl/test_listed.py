"""A dataset of one's own, whose pairs a list names."""

from pathlib import Path

import numpy as np
import pytest

from datasets_etl import formats
from datasets_etl.errors import DataError
from datasets_etl.etl import run_etl
from datasets_etl.inspection import verify_manifest
from datasets_etl.manifest import Manifest
from datasets_etl.reading import read_sample
from datasets_etl.sources import SampleRef, listed
from datasets_etl.synthetic import synthetic_pair
from tests.datasets_etl.layouts import listing

HEADER = "subset,image0,image1,flow\n"
FILES = ["a/1.png", "a/2.png", "a/3.png", "a/1.flo", "a/2.PNG", "b.v2/x y.jpg", "b.v2/z.jpg", "b.v2/flow.png", "c.npy"]


def refs_of(text: str) -> list[SampleRef]:
    return listed.index(listing(FILES), dataset="mine", text=text, where="pairs.csv")


def test_every_row_is_a_pair_named_by_its_first_frame_or_as_it_says():
    rows = ["val,a/2.png,a/3.png,,second", "", "train, ./a/1.png ,a/2.png,a/1.flo,"]
    rows.append('train,"b.v2/x y.jpg",b.v2/z.jpg,b.v2/flow.png,')
    refs = refs_of("\n".join(["subset,image0,image1,flow,name", *rows]))
    assert [(ref.key, ref.scene, ref.frame) for ref in refs] == [
        ("train_a_1", "a", "1"),
        ("train_b_v2_x_y", "b_v2", "x y"),
        ("val_second", "a", "2"),
    ]
    assert {(ref.dataset, ref.subset) for ref in refs} == {("mine", "train"), ("mine", "val")}
    assert [(ref.image0, ref.image1, ref.flow) for ref in refs] == [
        ("a/1.png", "a/2.png", "a/1.flo"),
        ("b.v2/x y.jpg", "b.v2/z.jpg", "b.v2/flow.png"),
        ("a/2.png", "a/3.png", None),
    ]
    assert [ref.is_sparse for ref in refs] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "pairs.csv: no column 'subset': its first line names the columns subset, image0, image1, flow"),
        ("subset,image0,image1\n", "no column 'flow'"),
        ("subset;image0;image1;flow\n", "column 'subset;image0;image1;flow' is unknown"),
        ("subset,image0,image1,flow,flow\n", "column 'flow' is unknown, or there twice"),
        (HEADER, "pairs.csv lists no pairs"),
        (HEADER + 'train,"a/1.png,a/2.png,a/1.flo\n', "line 2 of pairs.csv is no CSV (unexpected end of data)"),
        (HEADER + "\ntrain,a/1.png\n", "line 3 of pairs.csv: 2 values for 4 columns"),
        (HEADER + "train,a/1.png,a/9.png,a/1.flo\n", "lacks a/9.png, which line 2 of pairs.csv needs"),
        (HEADER + "train,a/1.png,,a/1.flo\n", "line 2 of pairs.csv: no image1"),
        (HEADER + "train,a/1.png,a/2.png,a/9.flo\n", "lacks a/9.flo, which line 2"),
        (HEADER + "train,../a/1.png,a/2.png,a/1.flo\n", "lacks ../a/1.png"),
        (HEADER + "train,a/1.png,a/2.png,c.npy\n", "line 2 of pairs.csv: c.npy: flow is a file with the suffix .flo"),
        (HEADER + "a/b,a/1.png,a/2.png,a/1.flo\n", "subset 'a/b': letters, digits, _ and - make"),
        (HEADER + 2 * "train,a/1.png,a/2.png,a/1.flo\n", "lines 2 and 3 of pairs.csv both name their pair train_a_1"),
    ],
)
def test_a_list_that_cannot_be_used_is_told_with_its_line(text, told):
    with pytest.raises(DataError) as error:
        refs_of(text)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("local_ray")
def test_dense_and_sparse_pairs_and_those_without_truth_come_back_as_they_were(tmp_path: Path):
    dense, sparse = synthetic_pair(3, 40, 56), synthetic_pair(4, 40, 56)
    assert dense.flow is not None
    assert sparse.flow is not None
    valid = np.random.default_rng(0).random((40, 56)) < 0.3
    folder = "deep" * 30  # a longer name than a tar's header holds
    raw = tmp_path / "raw"
    (raw / folder).mkdir(parents=True)
    for name, pair in (("dense", dense), (f"{folder}/sparse", sparse)):
        (raw / f"{name}_0.png").write_bytes(formats.encode_frame_png(pair.image0))
        (raw / f"{name}_1.ppm").write_bytes(formats.encode_frame_ppm(pair.image1))
    (raw / "dense.pfm").write_bytes(formats.encode_pfm(dense.flow))
    (raw / folder / "flow.png").write_bytes(formats.encode_kitti_flow(sparse.flow, valid))
    rows = ["val,dense_0.png,dense_1.ppm,dense.pfm", "test,dense_1.ppm,dense_0.png,"]
    rows.append(f"train,{folder}/sparse_0.png,{folder}/sparse_1.ppm,{folder}/flow.png")

    def index(tree):
        return listed.index(tree, dataset="mine", text=HEADER + "\n".join(rows), where="pairs.csv")

    result = run_etl("mine", str(raw), str(tmp_path / "out"), index=index)
    manifest = Manifest.load(result.manifest_url)
    assert verify_manifest(manifest) == []
    assert (manifest.dataset, manifest.subsets) == ("mine", {"test": 1, "train": 1, "val": 1})
    bare, of_train, of_val = (read_sample(manifest, number) for number in range(3))
    assert (bare.flow, bare.sparse, of_train.sparse, of_val.sparse) == (None, False, True, False)
    np.testing.assert_array_equal(of_val.flow, dense.flow)
    np.testing.assert_array_equal(of_val.image1, dense.image1)
    np.testing.assert_array_equal(of_train.valid, valid)
    np.testing.assert_allclose(of_train.flow[valid], sparse.flow[valid], atol=1 / 128)
    np.testing.assert_array_equal(manifest.select(None), [1, 2])
