"""`pipelines/predict.py` as its user meets it: files, going on, and what a wrong input gets."""

import errno
import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import pipelines.curriculum
import pipelines.etl
import pipelines.evaluate
import pipelines.predict
import pipelines.registry
import pipelines.sweep
from datasets_etl import formats
from datasets_etl.storage import open_store
from datasets_etl.synthetic import synthetic_pair
from gmflow import GMFlow, GMFlowConfig, Tiling, error_to_image, flow_to_image, load_model, predict_batch, save_weights
from pipelines.continuation import any_frame
from pipelines.errors import PipelineError
from pipelines.flow_files import FLOW_FORMATS
from pipelines.frames import find_clips
from pipelines.predict import options_of, parse_arguments, predict_clip
from pipelines.prediction_files import PredictionOptions, inputs_of
from tests.conftest import ROOT
from tests.pipelines.commands import TINY, assert_one_line, write_video


class TestPredict:
    def test_every_pair_gives_a_flow_and_a_picture(self, call, weights, frames, tmp_path):
        output = tmp_path / "flow"
        code, out, _ = call(pipelines.predict, "--model", weights, "--output", output, *frames)
        assert code == 0
        assert out.splitlines()[-1] == output.as_uri()
        assert sorted(path.name for path in output.iterdir()) == [
            "frame_0000.flo",
            "frame_0000.png",
            "frame_0001.flo",
            "frame_0001.png",
            "made_by.json",
        ]
        flow = formats.decode_flo((output / "frame_0000.flo").read_bytes(), "x")
        assert flow.shape == (45, 70, 2)
        assert cv2.imread(str(output / "frame_0000.png")).shape == (45, 70, 3)

    def test_a_folder_and_a_video_are_frames_too(self, call, weights, frames, tmp_path):
        folder = tmp_path / "frames"
        folder.mkdir()
        for path in frames:
            Path(path).rename(folder / Path(path).name)
        assert call(pipelines.predict, "--model", weights, "--output", tmp_path / "a", folder)[0] == 0
        assert len(list((tmp_path / "a").glob("*.flo"))) == 2

        write_video(tmp_path / "v.avi")
        assert call(pipelines.predict, "--model", weights, "--output", tmp_path / "b", tmp_path / "v.avi")[0] == 0
        assert sorted(path.name for path in (tmp_path / "b").glob("*.flo")) == ["v_000000.flo", "v_000001.flo"]

    def test_frames_with_one_name_in_two_folders_keep_both_outputs(self, call, weights, frames, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        moved = [shutil.copy(path, other / Path(path).name) for path in frames[:2]]
        assert call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames[:2], *moved)[0] == 0
        found = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*.flo")}
        assert found == {"frame_0000.flo", "frame_0001.flo", "other/frame_0000.flo"}
        again = call(pipelines.predict, "--model", weights, "--output", tmp_path / "p", frames[0], frames[1], frames[0])
        assert again[0] == 0
        assert len(list((tmp_path / "p").rglob("*.flo"))) == 2

    def test_folders_are_clips_of_their_own(self, call, weights, frames, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for path in frames:
                shutil.copy(path, tmp_path / name)
        arguments = ("--formats", "flo,video", tmp_path / "a", tmp_path / "b")
        assert call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *arguments)[0] == 0
        found = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*.flo")}
        assert found == {f"{clip}/frame_000{n}.flo" for clip in "ab" for n in (0, 1)}  # none from a to b
        assert len(list((tmp_path / "o").glob("*_flow.mp4"))) == 2

    def test_clips_of_one_title_have_each_a_video(self, call, weights, frames, tmp_path):
        folders = [tmp_path / name for name in ("x/a", "y/a", "a_2")]
        for folder in folders:
            folder.mkdir(parents=True)
            for path in frames[:2]:
                shutil.copy(path, folder)
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--formats", "video")
        assert call(*command, *folders)[0] == 0
        assert len(list((tmp_path / "o").glob("*_flow.mp4"))) == 3

    def test_outputs_of_one_name_are_refused_before_anything_is_computed(self, call, weights, frames, tmp_path):
        named = [shutil.copy(frames[0], tmp_path / f"{name}.png") for name in ("f", "f_arrows", "g")]
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--formats")
        assert_one_line(call(*command, "color,arrows", *named), "f.png and", "f_arrows.png would both give")
        (tmp_path / "ext").mkdir()
        for number in range(2):
            shutil.copy(frames[0], tmp_path / "ext" / f"clip_{number:06d}.png")
        write_video(tmp_path / "clip.avi")
        result = call(*command, "flo", tmp_path / "ext", tmp_path / "clip.avi")
        assert_one_line(result, "clip.avi and", "clip_000000.png would both give clip_000000.flo")
        assert not (tmp_path / "o").exists()
        assert call(*command, "color", *named)[0] == 0

    def test_a_video_that_was_cut_short_says_so(self, call, weights, tmp_path, caplog):
        video = tmp_path / "v.avi"
        write_video(video, frames=12)
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--formats", "flo")
        assert call(*command, video)[0] == 0
        assert "could be read" not in caplog.text
        content = video.read_bytes()
        video.write_bytes(content[: len(content) // 2])
        assert call(*command, "--overwrite", video)[0] == 0
        (told,) = [record.getMessage() for record in caplog.records]
        assert told.startswith(f"{video}: ")
        assert "of 12 frames could be read" in told

    def test_a_matroska_videos_length_is_not_taken_for_a_number_of_frames(self, tmp_path, caplog):
        """One frame may last as long as it likes: OpenCV tells 37 of these 12."""
        video = tmp_path / "v.mkv"
        write_video(video, frames=12, codec="mp4v", rate=25)
        milliseconds = [struct.pack(">d", length) for length in (480.0, 1480.0)]
        video.write_bytes(video.read_bytes().replace(*milliseconds))
        assert cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT) == 37
        (clip,) = find_clips([str(video)])
        assert len(list(clip.pairs())) == 11
        assert not caplog.records

    def test_other_truth_is_not_taken_for_this_one(self, call, weights, frames, tmp_path):
        truth = tmp_path / "truth"
        truth.mkdir()
        write_video(tmp_path / "v.avi")
        for name in ("frame_0000", "v_000000", "v_000001"):
            shape = (48, 64, 2) if name.startswith("v") else (45, 70, 2)
            (truth / f"{name}.flo").write_bytes(formats.encode_flo(np.zeros(shape, np.float32)))
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--formats", "flo,error,video")
        inputs = (*frames[:2], tmp_path / "v.avi")
        assert call(*command, "--truth", truth, *inputs)[0] == 0
        moved = truth.rename(tmp_path / "moved")
        assert call(*command, "--truth", moved, *inputs)[0] == 0, "it is the same truth"
        for name, stale in (("v_000001", "v_000000_error.png"), ("frame_0000", "frame_0000_error.png")):
            path = moved / f"{name}.flo"
            before = path.read_bytes()
            path.write_bytes(before[:-1] + b"\x01")
            assert_one_line(call(*command, "--truth", moved, *inputs), f"{stale} is there already")
            path.write_bytes(before)

    def test_every_format_reads_back(self, call, weights, frames, tmp_path):
        (tmp_path / "truth").mkdir()
        truth = synthetic_pair(3, 45, 70).flow
        (tmp_path / "truth" / "frame_0000.flo").write_bytes(formats.encode_flo(truth))
        names = ",".join((*FLOW_FORMATS, "video"))
        output = tmp_path / "o"
        arguments = ("--formats", names, "--truth", tmp_path / "truth", "--batch", 2)
        code, _, err = call(pipelines.predict, "--model", weights, "--output", output, *arguments, *frames)
        assert code == 2  # frame_0001 has no truth, and an error map was asked for
        assert "frame_0001" in err
        (tmp_path / "truth" / "frame_0001.flo").write_bytes(formats.encode_flo(truth))
        assert call(pipelines.predict, "--model", weights, "--output", output, *arguments, *frames)[0] == 0

        flow = formats.decode_flo((output / "frame_0000.flo").read_bytes(), "x")
        with np.load(output / "frame_0000.npz") as stored:
            assert set(stored) == {"flow", "backward_flow", "occluded", "backward_occluded"}
            np.testing.assert_array_equal(stored["flow"], flow)
            backward = formats.decode_flo((output / "frame_0000_backward.flo").read_bytes(), "x")
            np.testing.assert_array_equal(stored["backward_flow"], backward)
            occluded = formats.decode_mask((output / "frame_0000_occlusion.png").read_bytes(), "x")
            np.testing.assert_array_equal(stored["occluded"], occluded)
        kitti, valid = formats.decode_kitti_flow((output / "frame_0000_kitti.png").read_bytes(), "x")
        assert valid.all()
        np.testing.assert_allclose(kitti, np.clip(flow, -512, 511.98), atol=1 / 128 + 1e-3)
        error = cv2.cvtColor(cv2.imread(str(output / "frame_0000_error.png")), cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(error, error_to_image(flow, truth))
        video = cv2.VideoCapture(str(output / "frames_flow.mp4"))
        shapes = []
        while (read := video.read())[0]:
            shapes.append(read[1].shape)
        assert shapes == [(2 * (45 + 14), 140, 3)] * 2

    def test_the_same_command_again_computes_only_what_is_missing(self, call, weights, frames, tmp_path, monkeypatch):
        output = tmp_path / "o"
        command = (pipelines.predict, "--model", weights, "--output", output)
        assert call(*command, *frames)[0] == 0
        whole = (output / "frame_0001.flo").read_bytes()
        computed = []
        real = pipelines.predict.predict_batch
        monkeypatch.setattr(
            pipelines.predict,
            "predict_batch",
            lambda model, pairs, **how: computed.append(len(pairs)) or real(model, pairs, **how),
        )
        (output / "frame_0001.flo").unlink()
        assert call(*command, *frames)[0] == 0
        assert computed == [1]
        assert (output / "frame_0001.flo").read_bytes() == whole
        assert call(*command, "--formats", "arrows", *frames)[0] == 0
        assert computed == [1]  # other pictures of flow that is there
        assert (output / "frame_0000_arrows.png").exists()
        assert call(*command, "--overwrite", *frames)[0] == 0
        assert computed == [1, 1, 1]

    def test_another_models_output_is_not_taken_for_this_ones(self, call, weights, frames, tmp_path):
        assert call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames)[0] == 0
        before = (tmp_path / "o" / "frame_0000.flo").read_bytes()
        other = tmp_path / "other.safetensors"
        torch.manual_seed(99)
        save_weights(GMFlow(TINY), other)
        command = (pipelines.predict, "--model", other, "--output", tmp_path / "o")
        assert_one_line(call(*command, *frames), "another run's files", "weights", "--overwrite")
        assert (tmp_path / "o" / "frame_0000.flo").read_bytes() == before
        assert call(*command, "--overwrite", *frames)[0] == 0
        assert (tmp_path / "o" / "frame_0000.flo").read_bytes() != before

    def test_an_interrupted_overwriting_keeps_nothing_of_the_earlier_model(
        self, call, weights, frames, tmp_path, monkeypatch
    ):
        output = tmp_path / "o"
        command = (pipelines.predict, "--model", weights, "--output", output)
        assert call(*command, "--formats", "flo,color,arrows", *frames)[0] == 0
        other = tmp_path / "other.safetensors"
        torch.manual_seed(99)
        save_weights(GMFlow(TINY), other)
        assert call(pipelines.predict, "--model", other, "--output", tmp_path / "p", *frames)[0] == 0
        real, computed = pipelines.predict.predict_batch, []

        def interrupted(*arguments: object, **how: object) -> object:
            computed.append(1)
            if len(computed) == 2:
                raise KeyboardInterrupt
            return real(*arguments, **how)

        monkeypatch.setattr(pipelines.predict, "predict_batch", interrupted)
        command = (pipelines.predict, "--model", other, "--output", output)
        assert call(*command, "--overwrite", *frames)[0] == 130
        made = (output / "frame_0000.flo").stat().st_mtime_ns
        assert call(*command, *frames)[0] == 0
        assert len(computed) == 3, "what was made before the interruption is kept"
        assert (output / "frame_0000.flo").stat().st_mtime_ns == made
        for path in (tmp_path / "p").glob("frame*"):
            assert (output / path.name).read_bytes() == path.read_bytes()
        # Nor does a format that the overwriting command did not ask for pass for the new model's.
        assert_one_line(call(*command, "--formats", "arrows", *frames), "frame_0000_arrows.png is there already")

    def test_other_frames_of_the_same_names_are_not_taken_for_these(self, call, weights, frames, tmp_path):
        scenes = [tmp_path / name for name in ("one", "two")]
        for scene, chosen in zip(scenes, (frames[:2], frames[1:]), strict=True):
            scene.mkdir()
            for number, path in enumerate(chosen):
                shutil.copy(path, scene / f"frame_{number}.png")
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o")
        assert call(*command, scenes[0])[0] == 0
        before = (tmp_path / "o" / "frame_0.flo").read_bytes()
        assert_one_line(call(*command, scenes[1]), "frame_0.", "is there already", "--overwrite")
        assert (tmp_path / "o" / "frame_0.flo").read_bytes() == before
        shutil.copy(scenes[1] / "frame_1.png", scenes[0] / "frame_2.png")
        assert call(*command, scenes[0])[0] == 0  # a further frame
        assert sorted(path.name for path in (tmp_path / "o").glob("*.flo")) == ["frame_0.flo", "frame_1.flo"]
        assert call(*command, "--overwrite", scenes[1])[0] == 0
        assert (tmp_path / "o" / "frame_0.flo").read_bytes() != before

    @pytest.mark.parametrize("name", ["v", "VID_20240131_120000"])  # one like what frames are numbered by
    def test_another_videos_frames_are_not_taken_for_this_ones(self, call, weights, tmp_path, name):
        videos = [tmp_path / folder / f"{name}.avi" for folder in ("one", "two")]
        for level, path in enumerate(videos, start=1):
            path.parent.mkdir()
            video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
            for number in range(2):
                video.write(np.full((48, 64, 3), 50 * number * level, np.uint8))
            video.release()
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--formats", "flo,video")
        assert call(*command, videos[0])[0] == 0
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").glob(f"{name}_*")}
        assert len(made) == 2
        assert call(*command, videos[0])[0] == 0
        assert {path: path.stat().st_mtime_ns for path in made} == made
        assert_one_line(call(*command, videos[1]), "is there already")

    def test_a_folders_frames_go_by_their_numbers(self, frames, tmp_path):
        folder = tmp_path / "clip"
        folder.mkdir()
        names = ["1.png", "2.png", "02.png", "10.png", "11.png", "a.png", "a2b9.png", "a2b10.png", "a10b1.png"]
        for name in reversed(names):
            shutil.copy(frames[0], folder / name)
        (clip,) = find_clips([str(folder)])
        names[1:3] = ["02.png", "2.png"]  # of one number: by text
        assert [file.name for file in clip.files] == names

    def test_a_phones_jpegs_are_frames(self, call, weights, frames, tmp_path):
        paths = [tmp_path / f"{number}.jpg" for number in range(2)]
        for path, frame in zip(paths, frames, strict=False):
            path.write_bytes(cv2.imencode(".jpg", cv2.imread(frame))[1].tobytes() + b"appended by the camera")
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o")
        assert call(*command, *paths)[0] == 0
        paths[1].write_bytes(paths[1].read_bytes()[:400])
        assert_one_line(call(*command, "--overwrite", *paths), "1.jpg is a truncated JPEG")

    def test_what_cannot_write_videos_says_so_before_it_computes(self, call, weights, frames, tmp_path, monkeypatch):
        monkeypatch.setattr(pipelines.predict, "predict_batch", lambda *_, **__: pytest.fail("computed"))
        monkeypatch.setattr("pipelines.side_by_side._CODEC", "none")
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--formats", "flo,video")
        assert_one_line(call(*command, *frames), "OpenCV here cannot write none video")

    def test_ground_truth_in_the_output_folder_stays(self, call, weights, frames, tmp_path):
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "frame_0001.flo").write_bytes(b"truth")
        assert_one_line(
            call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames), "frame_0001.flo"
        )
        assert (tmp_path / "o" / "frame_0001.flo").read_bytes() == b"truth"

    def test_the_folder_of_the_truth_is_no_place_for_predictions(self, call, weights, frames, tmp_path):
        """They would replace the truth, or be taken for it by the next command: an error of zero."""
        truth = tmp_path / "truth"
        truth.mkdir()
        (truth / "frame_0000.pfm").write_bytes(formats.encode_pfm(np.zeros((45, 70, 2), np.float32)))
        command = (pipelines.predict, "--model", weights, "--truth", truth, "--output", truth, "--overwrite")
        assert_one_line(call(*command, "--formats", "flo", *frames), "frame_0000.flo would be taken for ground truth")
        assert_one_line(call(*command, "--formats", "color", *frames), "frame_0000.png would be taken for ground truth")
        assert [path.name for path in truth.iterdir()] == ["frame_0000.pfm"]
        assert call(*command, "--formats", "error", *frames[:2])[0] == 0

    def test_a_gpu_without_enough_memory_says_what_helps(self, call, weights, frames, manifests, tmp_path, monkeypatch):
        def full(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        monkeypatch.setattr(pipelines.predict, "predict_batch", full)
        said = call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames)
        assert_one_line(said, "frame frame_0000: the GPU's memory does not suffice; try --tile")
        monkeypatch.setattr("gmflow.model.GMFlow.forward", full)
        said = call(pipelines.evaluate, "--model", weights, "--data", f"{manifests['chairs']}#val")
        assert_one_line(said, "set chairs/val: the GPU's memory does not suffice; try --precision bf16")

    def test_a_machine_without_enough_memory_says_what_helps(self, call, weights, frames, tmp_path, monkeypatch):
        monkeypatch.setattr(pipelines.predict, "predict_batch", lambda *_, **__: torch.empty(1 << 46))
        said = call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames)
        assert_one_line(said, "frame frame_0000: this machine's memory does not suffice; try --tile")

    def test_frames_are_never_replaced_by_pictures(self, call, weights, frames, tmp_path):
        before = Path(frames[0]).read_bytes()
        result = call(pipelines.predict, "--model", weights, "--output", tmp_path, *frames)
        assert_one_line(result, "frame_0000.png would replace a frame")
        assert Path(frames[0]).read_bytes() == before

    def test_pictures_among_a_folders_frames_are_not_to_be_taken_for_frames(self, call, weights, frames, tmp_path):
        command = (pipelines.predict, "--model", weights, "--output", tmp_path, "--formats")
        assert_one_line(call(*command, "flo,arrows", tmp_path), "frame_0000_arrows.png would be taken for a frame")
        assert sorted(path.name for path in tmp_path.iterdir()) == [Path(frame).name for frame in frames]
        assert call(*command, "flo,warp", tmp_path)[0] == 0
        assert call(*command, "arrows", *frames)[0] == 0  # of frames that are named nothing is taken for one

    def test_a_folder_with_a_link_to_nothing_says_so_and_folders_in_it_are_no_frames(self, frames, tmp_path):
        (tmp_path / "x.png").mkdir()
        (clip,) = find_clips([str(tmp_path)])
        assert [str(file) for file in clip.files] == frames
        (tmp_path / "gone.png").symlink_to("nowhere.png")
        with pytest.raises(PipelineError, match=r"gone\.png: a link to nowhere\.png, which is not there"):
            find_clips([str(tmp_path)])

    def test_hidden_files_are_no_frames(self, frames, tmp_path):
        for frame in frames:
            Path(frame).with_name(f"._{Path(frame).name}").write_bytes(b"\0\5\x16\7, as macOS writes beside a file")
        (clip,) = find_clips([str(tmp_path)])
        assert [str(file) for file in clip.files] == frames

    def test_a_folder_of_folders_says_which_of_them_to_give(self, frames, tmp_path):
        names = ["clip10", "clip2", "clip1", "clip3", "one frame", "none"]
        for name, count in zip(names, (2, 2, 3, 2, 1, 0), strict=True):
            (tmp_path / "all" / name).mkdir(parents=True)
            for frame in frames[:count]:
                shutil.copy(frame, tmp_path / "all" / name)
        meant = [str(tmp_path / "all" / name) for name in ("clip1", "clip2", "clip3")]
        with pytest.raises(PipelineError, match=r"no frames in it; two or more of .* needed; give ") as caught:
            find_clips([str(tmp_path / "all")])
        assert str(caught.value).endswith(f"; give {' or '.join(meant)}")
        shutil.copy(frames[0], tmp_path / "all")
        with pytest.raises(PipelineError, match="1 frame in it"):
            find_clips([str(tmp_path / "all")])
        with pytest.raises(PipelineError, match=r"needed$"):
            find_clips([str(tmp_path / "all" / "none")])

    def test_what_differs_from_the_output_is_named_as_on_the_command_line(self, call, weights, frames, tmp_path):
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o")
        assert call(*command, "--bidirectional", "--tile", "64x96", "--overlap", 16, *frames)[0] == 0
        told = "(--bidirectional on, not off, --tile and --overlap [64, 96, 16], not none)"
        assert_one_line(call(*command, *frames), "another run's files", told)

    def test_nothing_is_left_in_the_temporary_folder_where_no_video_is_asked_for(
        self, call, weights, frames, tmp_path, monkeypatch
    ):
        """Not even of a run that is killed: then nobody tidies up."""
        monkeypatch.setattr(pipelines.predict.tempfile, "TemporaryDirectory", lambda **_: pytest.fail("made a folder"))
        monkeypatch.setattr(pipelines.predict, "resolve_model", lambda _: load_model(weights))
        assert call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames)[0] == 0

    @pytest.mark.parametrize(
        ("arguments", "fragments"),
        [
            (("--formats", "flo,gif"), ("'gif'", "flo, color")),
            (("--formats", "error"), ("--truth",)),
            (("--truth", "nowhere"), ("nowhere", "no such folder")),
            (("--tile", "64x64", "--overlap", "60"), ("64×64",)),
            (("--batch", "0"), ("--batch", "0 is not positive")),
            (("--max-flow", "-1"), ("--max-flow", "-1 is not positive")),
        ],
    )
    def test_wrong_options_are_said_before_anything_is_computed(
        self, call, weights, frames, tmp_path, arguments, fragments
    ):
        result = call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *arguments, *frames)
        assert_one_line(result, *fragments)
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize("device", ["mps", "meta", "cpu:1", "cuda:01", "gpu", "cuda:400"])
    def test_other_devices_than_cpu_and_cuda_are_refused(self, call, weights, frames, tmp_path, device):
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--device", device)
        code, _, err = call(*command, *frames)
        assert (code, f"argument --device: '{device}' is no device" in err) == (2, True)

    def test_what_cannot_be_read_is_said_in_a_line(self, call, weights, frames, tmp_path, monkeypatch):
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o")
        assert_one_line(call(*command, "x" * 300 + ".png", *frames), "File name too long")

        def refused(path):  # as for a user who may not; a test may run as root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr("pipelines.frames.file_sha256", refused)
        assert_one_line(call(*command, *frames), f"{frames[0]}: cannot be read (Permission denied)")
        monkeypatch.setattr(Path, "iterdir", refused)
        assert_one_line(call(*command, tmp_path), f"{tmp_path}: cannot be read (Permission denied)")

    def test_a_colon_in_a_videos_name_is_no_protocol(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_video(tmp_path / "12:30.avi")
        (clip,) = find_clips(["12:30.avi"])
        assert (clip.count(), len(list(clip.pairs()))) == (2, 2)

    def test_one_frame_makes_no_pair(self, call, weights, frames, tmp_path):
        result = call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", frames[0])
        assert_one_line(result, frames[0], "two frames")

    @pytest.mark.parametrize("suffix", [".png", ".jpg"])
    def test_frames_of_different_size_are_refused_before_any_is_computed(self, call, weights, frames, tmp_path, suffix):
        other = Path(frames[2]).with_suffix(suffix)
        other.write_bytes(cv2.imencode(suffix, np.zeros((45, 71, 3), np.uint8))[1].tobytes())
        result = call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames[:2], other)
        assert_one_line(result, "frame_0001 (70x45)", "71x45")
        assert not (tmp_path / "o").exists()

    def test_missing_or_misshapen_truth_is_refused_before_anything_is_computed(self, call, weights, frames, tmp_path):
        truth = tmp_path / "truth"
        truth.mkdir()
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--truth", truth)
        (truth / "frame_0000.flo").write_bytes(formats.encode_flo(np.zeros((45, 70, 2), np.float32)))
        assert_one_line(call(*command, "--formats", "error", *frames), "frame_0001 has no ground truth")
        (truth / "frame_0001.pfm").write_bytes(formats.encode_pfm(np.zeros((45, 71, 2), np.float32)))
        assert_one_line(call(*command, "--formats", "video", *frames), "frame_0001 is 70x45", "71x45")
        write_video(tmp_path / "v.avi")
        assert_one_line(call(*command, "--formats", "error", tmp_path / "v.avi"), "v_000000 has no ground truth")
        assert not (tmp_path / "o").exists()
        (truth / "frame_0001.pfm").unlink()
        assert call(*command, "--formats", "video", *frames)[0] == 0, "it shows what truth there is"

    def test_a_file_that_is_no_picture(self, call, weights, frames, tmp_path):
        Path(frames[1]).write_bytes(b"not a picture")
        result = call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames[:2])
        assert_one_line(result, frames[1])
        assert not (tmp_path / "o").exists()
        Path(frames[1]).write_bytes(Path(frames[0]).read_bytes()[:-20])
        result = call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames[:2])
        assert_one_line(result, f"{frames[1]} is a truncated PNG")
        assert not list((tmp_path / "o").rglob("frame*"))
        # What it had noted of itself keeps nobody out.
        command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--precision", "bf16")
        assert call(*command, frames[0], frames[2])[0] == 0


def test_who_predicts_does_not_wait_for_mlflow_and_ray():
    """They take as long to load as all the rest, and a model's file needs neither."""
    heavy = ("mlflow", "ray")
    code = "import sys, pipelines.predict, pipelines.export, pipelines.submission; "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_what_is_asked_for_on_the_command_line_is_what_is_computed(tmp_path):
    asked = ["--bidirectional", "--tile", "64x96", "--overlap", "16", "--padding", "kitti", "--max-flow", "7"]
    asked += ["--batch", "3", "--precision", "bf16", "--truth", str(tmp_path), "--formats", "npz,flo,npz"]
    options = options_of(parse_arguments(["--model", "m", "--output", "o", *asked, "a.png", "b.png"]))
    assert options == PredictionOptions(("npz", "flo"), 3, True, "bf16", "kitti", Tiling(64, 96, 16), tmp_path, 7.0)
    assert options.both_ways
    assert not replace(options, bidirectional=False).both_ways


def test_options_reach_the_flow_and_its_pictures(call, weights, frames, tmp_path):
    model = load_model(weights).eval()
    pair = [formats.decode_frame(Path(path).read_bytes(), path) for path in frames[:2]]
    ways: dict[str, tuple[list[str], dict[str, Any]]] = {
        "kitti": (["--padding", "kitti"], {"padding": "kitti"}),
        "tiled": (["--tile", "32x64", "--overlap", "16"], {"tiling": Tiling(32, 64, 16)}),
        # Some processors round the products of both directions otherwise than those of one.
        "usual": (["--max-flow", "2.5", "--bidirectional", "--formats", "flo,color,npz"], {"bidirectional": True}),
    }
    found = {}
    for name, (arguments, how) in ways.items():
        output = tmp_path / name
        assert call(pipelines.predict, "--model", weights, "--output", output, *arguments, *frames[:2])[0] == 0
        found[name] = formats.decode_flo((output / "frame_0000.flo").read_bytes(), name)
        (wanted,) = predict_batch(model, [tuple(pair)], **how)
        np.testing.assert_array_equal(found[name], wanted.flow)
    assert not np.array_equal(found["usual"], found["kitti"])
    assert not np.array_equal(found["usual"], found["tiled"])
    picture = cv2.cvtColor(cv2.imread(str(tmp_path / "usual" / "frame_0000.png")), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(picture, flow_to_image(found["usual"], 2.5))
    with np.load(tmp_path / "usual" / "frame_0000.npz") as stored:
        assert "backward_flow" in stored


def test_whatever_changes_the_files_is_another_job():
    model = GMFlow(GMFlowConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1))
    usual = PredictionOptions()
    others = [{"padding": "kitti"}, {"tiling": Tiling(64, 96, 16)}, {"max_flow": 3.0}, {"precision": "bf16"}]
    others += [{"bidirectional": True}, {"tiling": Tiling(96, 64, 16)}]
    jobs = [usual.job(model), *(replace(usual, **other).job(model) for other in others)]
    assert len({json.dumps(job, sort_keys=True) for job in jobs}) == len(jobs)
    assert replace(usual, formats=("npz",), batch=4).job(model) == jobs[0]


def test_every_pair_counts_as_done_and_is_computed_only_where_its_files_are_missing(
    weights, frames, tmp_path, monkeypatch
):
    (clip,) = find_clips([str(path) for path in frames])
    output, options = open_store(str(tmp_path)), PredictionOptions(("color",))
    computed, done = [], []
    monkeypatch.setattr(
        pipelines.predict,
        "predict_batch",
        lambda model, pairs, **how: computed.append(len(pairs)) or predict_batch(model, pairs, **how),
    )
    for kept in (set(), {"frame_0000.png"}, {"frame_0000.png", "frame_0001.png"}):
        predict_clip(load_model(weights), clip, output, options, kept, lambda: done.append(1))
    assert computed == [1, 1, 1]
    assert len(done) == 3 * clip.count() == 3 * 2


def test_a_videos_colours_and_rate_are_the_frames(call, weights, tmp_path):
    """Red and blue changed places would still give some flow."""
    pair = synthetic_pair(3, 48, 64)
    path = tmp_path / "v.avi"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12, (64, 48))
    for image in (pair.image0, pair.image1):
        video.write(cv2.cvtColor(np.full_like(image, [250, 120, 10]), cv2.COLOR_RGB2BGR))
    video.release()
    (clip,) = find_clips([str(path)])
    (found,) = clip.pairs()
    assert (found.name, clip.count()) == ("v_000000", 1)
    for frame in (found.frame0, found.frame1):
        np.testing.assert_allclose(frame.reshape(-1, 3).mean(0), [250, 120, 10], atol=6)
    assert call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--formats", "video", path)[0] == 0
    assert cv2.VideoCapture(str(tmp_path / "o" / "v_flow.mp4")).get(cv2.CAP_PROP_FPS) == pytest.approx(12)


def test_clips_of_one_name_keep_a_video_each(frames, tmp_path):
    folders = [tmp_path / name / "clip" for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        for path in frames:
            (folder / Path(path).name).write_bytes(Path(path).read_bytes())
    clips = find_clips([str(folder) for folder in folders])
    assert [clip.title for clip in clips] == ["clip_1", "clip_2"]
    assert [clip.names[0] for clip in clips] == ["a/clip/frame_0000", "b/clip/frame_0000"]


@pytest.mark.parametrize("note", ["{", "[]", '{"inputs": null}'])
def test_a_note_that_is_none_makes_the_output_of_unknown_origin(call, weights, frames, tmp_path, note):
    command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o")
    assert call(*command, *frames)[0] == 0
    (tmp_path / "o/made_by.json").write_text(note)
    assert_one_line(call(*command, *frames), "is there already, of other input or not by this command")


def test_other_frames_of_one_folder_are_added_and_known_again(call, weights, frames, tmp_path, monkeypatch):
    command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o")
    assert call(*command, *frames[:2])[0] == call(*command, *frames[1:])[0] == 0
    monkeypatch.setattr(pipelines.predict, "predict_batch", lambda *_, **__: pytest.fail("computed again"))
    assert call(*command, *frames[:2])[0] == 0


def test_a_frame_that_was_replaced_along_with_its_flow_is_known_again(call, weights, frames, tmp_path, monkeypatch):
    command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames)
    assert call(*command)[0] == 0
    shutil.copy(frames[1], frames[2])
    for path in (tmp_path / "o").glob("frame_0001*"):
        path.unlink()
    assert call(*command)[0] == 0
    monkeypatch.setattr(pipelines.predict, "predict_batch", lambda *_, **__: pytest.fail("computed again"))
    assert call(*command)[0] == 0


def test_what_an_overwriting_did_not_replace_is_not_taken_for_its_own(call, weights, frames, tmp_path):
    assert call(pipelines.predict, "--model", weights, "--output", tmp_path / "o", *frames)[0] == 0
    other = tmp_path / "other.safetensors"
    torch.manual_seed(99)
    save_weights(GMFlow(TINY), other)
    command = (pipelines.predict, "--model", other, "--output", tmp_path / "o")
    assert call(*command, "--overwrite", *frames[:2])[0] == 0
    assert_one_line(call(*command, *frames), "frame_0001.flo is there already")


def test_frames_and_truth_are_safe_whatever_way_leads_to_them(call, weights, frames, tmp_path):
    (tmp_path / "way").symlink_to(tmp_path)
    linked = [str(tmp_path / "way" / Path(path).name) for path in frames]
    truth = tmp_path / "truth"
    truth.mkdir()
    command = (pipelines.predict, "--model", weights, "--output")
    for way, other in ((tmp_path, tmp_path / "way"), (tmp_path / "way", tmp_path)):
        given = frames if other == tmp_path else linked
        assert_one_line(call(*command, way, "--formats", "color", *given), "frame_0000.png would replace a frame")
        assert_one_line(call(*command, way, "--formats", "arrows", other), "would be taken for a frame of")
        told = "frame_0000.flo would be taken for ground truth"
        assert_one_line(call(*command, way / "truth", "--formats", "flo", "--truth", other / "truth", *frames), told)
    assert not list(truth.iterdir())


def test_a_videos_pictures_replace_no_frame_that_is_numbered_as_they_are(call, weights, frames, tmp_path):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "v.avi")
    last = shutil.copy(frames[1], tmp_path / "v_000001.png")  # begins no pair, so no output has its name
    command = (pipelines.predict, "--model", weights, "--output", tmp_path, "--formats", "color")
    assert_one_line(call(*command, frames[0], last, tmp_path / "in" / "v.avi"), "v_*.png would replace a frame")


def test_a_video_is_no_place_for_another_ones_flow(call, weights, tmp_path):
    for name, codec in (("v.avi", "MJPG"), ("v_flow.mp4", "mp4v")):
        write_video(tmp_path / name, codec=codec)
    before = (tmp_path / "v_flow.mp4").read_bytes()
    command = (pipelines.predict, "--model", weights, "--output", tmp_path, "--formats", "video")
    told = "v_flow.mp4 would replace a frame"
    assert_one_line(call(*command, tmp_path / "v.avi", tmp_path / "v_flow.mp4"), told)
    assert (tmp_path / "v_flow.mp4").read_bytes() == before


def test_a_videos_truth_is_what_is_named_as_its_frames_are(tmp_path, monkeypatch):
    write_video(tmp_path / "v[1].avi")
    truth = tmp_path / "truth"
    truth.mkdir()
    clips = find_clips([str(tmp_path / "v[1].avi")])
    options = PredictionOptions(("flo", "error", "video"), truth=truth)
    found = [inputs_of(clips, options)]
    for name in ("v[1]_000000.txt", "v[1]_old.flo", "v1_000000.flo", "v[1]_000000.flo"):
        (truth / name).write_bytes(b"")
        found.append(inputs_of(clips, options))
    assert found[:4] == [found[0]] * 4
    assert {key for key in found[4] if found[4][key] != found[0][key]} == {
        "v[1]_*_error.png",
        "v[1]_flow.mp4",
    }

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pipelines.prediction_files.file_sha256", refused)
    with pytest.raises(PipelineError, match=r"v\[1\]_000000\.flo: cannot be read"):
        inputs_of(clips, options)


def test_frames_of_a_video_are_known_by_their_numbers_however_long_it_is():
    keys = ["a/v_000000.flo", "a/v_1000000.flo", "a/v_1000000_error.png", "a/v_12345.flo"]
    assert [any_frame(key) for key in keys] == ["a/v_*.flo", "a/v_*.flo", "a/v_*_error.png", "a/v_12345.flo"]


def test_truth_of_another_size_than_a_videos_later_frame_is_said(call, weights, tmp_path):
    write_video(tmp_path / "v.avi")
    (tmp_path / "truth").mkdir()
    for number, width in enumerate((64, 65)):
        flow = formats.encode_flo(np.zeros((48, width, 2), np.float32))
        (tmp_path / "truth" / f"v_{number:06d}.flo").write_bytes(flow)
    command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--truth", tmp_path / "truth")
    assert_one_line(call(*command, "--formats", "error", tmp_path / "v.avi"), "v_000001 is 64x48", "65x48")


def test_both_flows_are_computed_again_where_the_first_run_had_one(call, weights, frames, tmp_path):
    command = (pipelines.predict, "--model", weights, "--output", tmp_path / "o", "--bidirectional", "--formats")
    assert call(*command, "flo", *frames)[0] == call(*command, "npz", *frames)[0] == 0
    with np.load(tmp_path / "o/frame_0000.npz") as stored:
        assert "backward_flow" in stored


def test_a_video_of_flow_that_is_not_finite_is_written_all_the_same(call, frames, tmp_path):
    """As pictures of it are: it shows where the model fails."""
    broken = GMFlow(TINY)
    with torch.no_grad():
        broken.upsampler.weights.weight.fill_(3e38)  # the softmax of infinities is no number
    save_weights(broken, tmp_path / "broken.safetensors")
    command = (pipelines.predict, "--model", tmp_path / "broken.safetensors", "--output", tmp_path / "o")
    assert call(*command, "--formats", "video,occlusion", *frames)[0] == 0
    assert formats.decode_mask((tmp_path / "o/frame_0000_occlusion.png").read_bytes(), "x").all()


def test_suffixes_are_read_in_capitals_too(tmp_path):
    """As cameras write them."""
    (tmp_path / "clip").mkdir()
    for number in range(2):
        (tmp_path / f"clip/IMG_{number}.PNG").write_bytes(formats.encode_frame_png(np.zeros((8, 8, 3), np.uint8)))
    write_video(tmp_path / "v.avi")
    (tmp_path / "v.avi").rename(tmp_path / "V.AVI")
    clips = find_clips([str(tmp_path / "clip"), str(tmp_path / "V.AVI")])
    assert [(clip.title, clip.is_video) for clip in clips] == [("clip", False), ("V", True)]
