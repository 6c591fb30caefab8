"""What the benchmarks' servers take, written from test sets without flow, and read back."""

import io
import sys
import zipfile

import numpy as np
import pytest
import torch

import pipelines.submission
from datasets_etl import formats
from datasets_etl.etl import run_etl
from datasets_etl.manifest import Manifest
from datasets_etl.synthetic import synthetic_pair
from gmflow import GMFlow, load_model, predict_flow, save_weights
from pipelines.errors import PipelineError
from pipelines.flow_files import require_finite
from tests.pipelines.commands import TINY

FRAMES = [synthetic_pair(number, 45, 70) for number in range(2)]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> dict[str, str]:
    """Test sets as the benchmarks hand them out: three frames of a Sintel scene in two passes, two KITTI pairs."""
    root = tmp_path_factory.mktemp("tests")
    images = [FRAMES[0].image0, FRAMES[0].image1, FRAMES[1].image0]
    for pass_name in ("clean", "final"):
        folder = root / "sintel" / "test" / pass_name / "ambush_1"
        folder.mkdir(parents=True)
        for number, image in enumerate(images, start=1):
            (folder / f"frame_{number:04d}.png").write_bytes(formats.encode_frame_png(image))
    folder = root / "kitti" / "testing" / "image_2"
    folder.mkdir(parents=True)
    for scene, pair in enumerate(FRAMES):
        for name, image in (("10", pair.image0), ("11", pair.image1)):
            (folder / f"{scene:06d}_{name}.png").write_bytes(formats.encode_frame_png(image))
    return {name: run_etl(name, str(root / name), str(root / "shards")).manifest_url for name in ("sintel", "kitti")}


def submit(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["submission.py", *map(str, arguments)])
    pipelines.submission.main()


def test_sintels_bundler_gets_every_frames_flow_under_its_official_name(
    weights, manifests, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "mine [b] too"
    submit(monkeypatch, "--model", weights, "--data", manifests["sintel"], "--output", folder)
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(folder)]
    assert f"bundler '{folder}/clean' '{folder}/final' '{folder}.lzma'" in told.err
    assert not folder.with_name("mine [b] too.zip").exists(), "the server takes no ZIP file"
    assert "4 pairs, the whole test set has 1104" in " ".join(told.err.split())
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.flo")) == [
        f"{pass_name}/ambush_1/frame{number:04d}.flo" for pass_name in ("clean", "final") for number in (1, 2)
    ]
    flow = formats.decode_flo((folder / "final/ambush_1/frame0001.flo").read_bytes(), "x")
    wanted = predict_flow(load_model(weights), FRAMES[0].image0, FRAMES[0].image1)
    np.testing.assert_array_equal(flow, wanted)


def test_kittis_archive_holds_16_bit_pngs_valid_everywhere(weights, manifests, tmp_path, monkeypatch):
    submit(monkeypatch, "--model", weights, "--data", manifests["kitti"], "--output", tmp_path / "mine")
    with zipfile.ZipFile(tmp_path / "mine.zip") as file:
        assert file.namelist() == ["flow/000000_10.png", "flow/000001_10.png"]
        data = file.read("flow/000001_10.png")
    assert (data[24], data[25]) == (16, 2)  # bits a channel, RGB
    flow, valid = formats.decode_kitti_flow(data, "x")
    assert valid.all()
    wanted = predict_flow(load_model(weights), FRAMES[1].image0, FRAMES[1].image1, padding="kitti")
    np.testing.assert_allclose(flow, np.clip(wanted, -512, 511.98), atol=1 / 128 + 1e-3)


def test_a_second_run_computes_what_is_missing_and_gives_the_same_archive(weights, manifests, tmp_path, monkeypatch):
    command = ("--model", weights, "--data", manifests["kitti"], "--output", tmp_path / "mine")
    submit(monkeypatch, *command)
    archive = (tmp_path / "mine.zip").read_bytes()
    (tmp_path / "mine" / "flow" / "000001_10.png").unlink()
    (tmp_path / "mine" / "notes.txt").write_text("mine, not the server's")
    before = (tmp_path / "mine" / "flow" / "000000_10.png").stat().st_mtime_ns
    submit(monkeypatch, *command)
    assert (tmp_path / "mine.zip").read_bytes() == archive
    assert (tmp_path / "mine" / "flow" / "000000_10.png").stat().st_mtime_ns == before
    assert zipfile.ZipFile(io.BytesIO(archive)).namelist() == ["flow/000000_10.png", "flow/000001_10.png"]


def test_an_interrupted_overwriting_keeps_nothing_of_the_earlier_model(weights, manifests, tmp_path, monkeypatch):
    submit(monkeypatch, "--model", weights, "--data", manifests["kitti"], "--output", tmp_path / "mine")
    other = tmp_path / "other.safetensors"
    torch.manual_seed(99)
    save_weights(GMFlow(TINY), other)
    command = ("--model", other, "--data", manifests["kitti"], "--output")
    submit(monkeypatch, *command, tmp_path / "wanted")
    with monkeypatch.context() as patch:
        patch.setattr(pipelines.submission, "predict_batch", lambda *_, **__: sys.exit("interrupted"))
        with pytest.raises(SystemExit):
            submit(monkeypatch, *command, tmp_path / "mine", "--overwrite")
    submit(monkeypatch, *command, tmp_path / "mine")
    assert (tmp_path / "mine.zip").read_bytes() == (tmp_path / "wanted.zip").read_bytes()


def test_files_of_unknown_origin_are_not_replaced(weights, manifests, tmp_path, monkeypatch, capsys):
    others = tmp_path / "mine" / "flow" / "000000_10.png"
    others.parent.mkdir(parents=True)
    others.write_bytes(b"another program's")
    command = ("--model", weights, "--data", manifests["kitti"], "--output", tmp_path / "mine")
    with pytest.raises(SystemExit) as stop:
        submit(monkeypatch, *command)
    assert stop.value.code == 2
    assert "holds files that this command did not make" in capsys.readouterr().err
    assert others.read_bytes() == b"another program's"
    submit(monkeypatch, *command, "--overwrite")
    assert others.read_bytes().startswith(b"\x89PNG")


def test_an_output_that_cannot_be_handed_in_is_refused_before_anything_is_computed(
    weights, manifests, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines.submission, "predict_batch", lambda *_, **__: pytest.fail("computed"))
    (tmp_path / "mine.zip").mkdir()
    command = ("--model", weights, "--data", manifests["kitti"], "--output")
    for output, told in (("mine", "mine.zip: a folder where the archive goes"), ("s3://bucket/mine", "is a URL")):
        with pytest.raises(SystemExit) as stop:
            submit(monkeypatch, *command, output)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.zip"]


def test_a_set_without_a_test_split_or_a_server_is_refused(manifests):
    kitti = Manifest.load(manifests["kitti"])
    with pytest.raises(PipelineError, match="no subset test-clean and test-final, only testing"):
        pipelines.submission.benchmark_of(Manifest("sintel", kitti.shards, url=kitti.url))
    with pytest.raises(PipelineError, match="chairs has no server; sintel and kitti have"):
        pipelines.submission.benchmark_of(Manifest("chairs", kitti.shards))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_flow_that_is_not_finite_is_handed_in_nowhere(value: float):
    """A model that diverged; KITTI's format has no such value, and Sintel's server would count it somehow."""
    flow = np.zeros((4, 5, 2), np.float32)
    assert require_finite("alley_1", flow) is flow
    flow[1, 2, 0] = value
    with pytest.raises(PipelineError, match="pair alley_1: the predicted flow is not finite"):
        require_finite("alley_1", flow)


def test_a_model_that_diverged_hands_in_nothing(weights, manifests, tmp_path, monkeypatch, capsys):
    broken = GMFlow(TINY)
    with torch.no_grad():
        broken.upsampler.weights.weight.fill_(3e38)  # the softmax of infinities is no number
    save_weights(broken, tmp_path / "broken.safetensors")
    for name in ("sintel", "kitti"):
        with pytest.raises(SystemExit):
            submit(
                monkeypatch,
                "--model",
                tmp_path / "broken.safetensors",
                "--data",
                manifests[name],
                "--output",
                tmp_path / name,
            )
        assert "the predicted flow is not finite" in capsys.readouterr().err
        assert not [path for path in (tmp_path / name).rglob("*") if path.suffix in (".flo", ".png", ".zip")]


def test_other_settings_or_data_are_another_submission(weights, manifests, tmp_path, monkeypatch, capsys):
    command = ("--model", weights, "--output", tmp_path / "mine", "--data")
    submit(monkeypatch, *command, manifests["kitti"])
    for others in ((manifests["kitti"], "--precision", "bf16"), (manifests["sintel"],)):
        with pytest.raises(SystemExit):
            submit(monkeypatch, *command, *others)
        assert "holds another run's files" in capsys.readouterr().err
