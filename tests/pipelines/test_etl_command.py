"""`pipelines/etl.py` as its user meets it: what it prints, where, and what a wrong input gets."""

import shutil
from pathlib import Path

import cv2
import pytest

import pipelines.curriculum
import pipelines.etl
import pipelines.evaluate
import pipelines.predict
import pipelines.registry
import pipelines.sweep
from datasets_etl.manifest import Manifest
from datasets_etl.synthetic import write_dataset
from tests.pipelines.commands import assert_one_line


@pytest.mark.usefixtures("local_ray")
class TestEtl:
    def test_the_last_line_is_the_manifests_url(self, call, samples, tmp_path):
        code, out, err = call(
            pipelines.etl, "--dataset", "kitti", "--source", samples / "KITTI", "--target", tmp_path / "out"
        )
        assert code == 0
        (manifest,) = (tmp_path / "out" / "kitti").glob("manifest-*.json")
        assert out.splitlines()[-1] == manifest.as_uri()
        assert "training" in err
        assert "200: not complete" in err

    def test_a_missing_folder(self, call, tmp_path):
        result = call(pipelines.etl, "--dataset", "kitti", "--source", tmp_path / "no", "--target", tmp_path / "out")
        assert_one_line(result, str(tmp_path / "no"), "no such folder")
        assert not (tmp_path / "out").exists()

    def test_a_wrong_layout(self, call, tmp_path):
        (tmp_path / "raw").mkdir()
        (tmp_path / "raw" / "x.png").write_bytes(b"x")
        result = call(pipelines.etl, "--dataset", "hd1k", "--source", tmp_path / "raw", "--target", tmp_path / "out")
        assert_one_line(result, str(tmp_path / "raw"), "hd1k")
        assert not (tmp_path / "out").exists()

    def test_a_damaged_pair_is_left_out_and_reported(self, call, tmp_path):
        raw = tmp_path / "raw"
        write_dataset("chairs", raw, pairs=2, held_out=1, height=48, width=64, seed=3)
        (raw / "data/00001_flow.flo").write_bytes(b"PIEH")
        arguments = ("--dataset", "chairs", "--source", raw, "--target", tmp_path / "out")
        code, out, err = call(pipelines.etl, *arguments)
        assert code == 0
        assert Manifest.load(out.splitlines()[-1]).subsets == {"train": 1, "val": 1}
        assert "1 damaged pair left out" in err
        assert "train_00001" in err
        assert_one_line(call(pipelines.etl, *arguments, "--strict"), "data/00001_flow.flo is truncated", "--strict")

    def test_a_dataset_of_ones_own_is_named_and_its_pairs_are_listed(self, call, tmp_path):
        raw, pairs = tmp_path / "raw", tmp_path / "pairs.csv"
        write_dataset("chairs", raw, pairs=2, held_out=0, height=48, width=64, seed=3)
        stems = [f"data/{number:05d}" for number in (1, 2)]
        rows = [f"val,{stem}_img1.ppm,{stem}_img2.ppm,{stem}_flow.flo" for stem in stems]
        pairs.write_text("\n".join(["subset,image0,image1,flow", *rows]), encoding="utf-8-sig")
        given = ("--source", raw, "--target", tmp_path / "out")
        code, out, err = call(pipelines.etl, "--dataset", "mine", "--list", pairs, *given)
        assert code == 0, err
        assert "not complete" not in err
        manifest = Manifest.load(out.splitlines()[-1])
        assert (manifest.dataset, manifest.subsets) == ("mine", {"val": 2})
        for named, told in (
            (("mine",), "--dataset mine: there is chairs, hd1k, kitti, sintel, things; of any other dataset give"),
            (("sintel", "--list", pairs), "--dataset sintel: its layout is known"),
            (("a/b", "--list", pairs), "--dataset a/b: letters, digits, _ and - make a name"),
            (("mine", "--list", tmp_path / "no.csv"), "no.csv: no such file"),
        ):
            assert_one_line(call(pipelines.etl, "--dataset", *named, *given), told)

    def test_chairs_without_their_list_take_one_from_elsewhere_or_split_by_hash(self, call, tmp_path):
        raw = tmp_path / "raw"
        write_dataset("chairs", raw, pairs=2, held_out=1, height=48, width=64, seed=3)
        elsewhere = tmp_path / "list.txt"
        (raw / "FlyingChairs_train_val.txt").rename(elsewhere)
        arguments = ("--dataset", "chairs", "--source", raw, "--target", tmp_path / "out")
        assert_one_line(
            call(pipelines.etl, *arguments), "FlyingChairs_train_val.txt", "--split-list", "--split-by-hash"
        )
        code, out, _ = call(pipelines.etl, *arguments, "--split-list", elsewhere)
        assert (code, Manifest.load(out.splitlines()[-1]).subsets) == (0, {"train": 2, "val": 1})
        code, out, _ = call(pipelines.etl, *arguments, "--split-by-hash")
        assert (code, sum(Manifest.load(out.splitlines()[-1]).subsets.values())) == (0, 3)
        code, _, err = call(pipelines.etl, "--dataset", "kitti", "--source", raw, "--target", raw, "--split-by-hash")
        assert (code, "--dataset chairs" in err) == (2, True)

    def test_verify_says_whole_or_names_what_is_damaged(self, call, manifests, tmp_path):
        source = Path(manifests["kitti"].removeprefix("file://"))
        folder = shutil.copytree(source.parent, tmp_path / "kitti")
        code, out, _ = call(pipelines.etl, "verify", folder / source.name)
        assert (code, out.startswith("whole: 4 pairs in 1 shard, ")) == (0, True)
        (shard,) = (folder / "shards").iterdir()
        shard.write_bytes(shard.read_bytes()[:-4000])
        assert_one_line(call(pipelines.etl, "verify", folder / source.name), shard.name, "run pipelines/etl.py again")

    def test_inspect_prints_counts_and_motion_and_draws_a_sheet(self, call, manifests, tmp_path):
        code, out, _ = call(pipelines.etl, "inspect", manifests["sintel"], "--output", tmp_path / "s.png", "--rows", 2)
        assert code == 0
        assert "training-clean" in out
        assert "160 and more" in out
        assert out.splitlines()[-1] == (tmp_path / "s.png").as_uri()
        sheet = cv2.imread(str(tmp_path / "s.png"))
        assert sheet.shape == (2 * 2 * (16 + 240), 3 * 320, 3)
        assert sheet.std() > 20

    def test_inspect_of_no_manifest(self, call, tmp_path):
        assert_one_line(call(pipelines.etl, "inspect", tmp_path / "no.json"), "no.json", "pipelines/etl.py")

    def test_where_stderr_is_no_terminal_progress_comes_as_lines(self, call, samples, tmp_path):
        arguments = ("--dataset", "kitti", "--source", samples / "KITTI", "--target", tmp_path / "out")
        lines = call(pipelines.etl, *arguments)[2].splitlines()
        assert f"kitti: listing {samples / 'KITTI'} and reading the files' sizes" in lines
        assert "kitti: writing shards: 0 of 1 pair" in lines
        assert any(line.startswith("kitti: writing shards: 1 of 1 pair, ") for line in lines)
