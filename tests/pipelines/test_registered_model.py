"""A registered model as an application uses it: loaded in a process that allows no pickle, and served over HTTP."""

import base64
import json
import os
import signal
import struct
import subprocess
import sys
import traceback
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mlflow
import numpy as np
import pandas
import pytest
import torch

from datasets_etl import formats
from datasets_etl.synthetic import synthetic_pair
from gmflow import GMFlow, predict_flow, save_weights
from infra.local_stack.settings import free_ports
from pipelines.training import mlflow_client, registration, tracking
from tests.pipelines.commands import TINY
from tests.waiting import WAIT_SECONDS, answers, wait_until


@dataclass(frozen=True)
class Registered:
    model: GMFlow
    tracking_uri: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """No pickle, no project on the path but what MLflow carries along."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {
            **inherited,
            # `mlflow models serve` looks for uvicorn on the path: in an activated environment it is there.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    folder = tmp_path_factory.mktemp("served")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = mlflow_client.connect(uri)
    run = tracking.start_run(client, "served", "chairs", {}).info
    model = GMFlow(TINY).eval()
    save_weights(model, folder / "model.safetensors")
    lineage = registration.Lineage("chairs", "random", {}, "h", "sources:x", {"val/c/val/epe": 1.0})
    registration.register(client, "gmflow", run.run_id, folder / "model.safetensors", lineage, None)
    return Registered(model, uri, folder)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    pair = synthetic_pair(3, 45, 70)
    return [pair.image0, pair.image1]


@pytest.fixture(scope="module")
def loaded(registered: Registered) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        mlflow.set_tracking_uri(registered.tracking_uri)
        return mlflow.pyfunc.load_model("models:/gmflow@champion")


def png(frame: np.ndarray) -> bytes:
    return formats.encode_frame_png(frame)


@pytest.mark.parametrize(
    "encode",
    [
        lambda frame: frame,
        png,
        lambda frame: base64.b64encode(png(frame)).decode(),
        lambda frame: base64.encodebytes(png(frame)).decode(),
        lambda frame: frame.tolist(),
    ],
    ids=["array", "PNG bytes", "base64", "base64 in lines", "nested lists"],
)
def test_three_lines_give_flow_for_every_way_to_hand_over_an_image(registered, loaded, frames, encode):
    (flow,) = loaded.predict([{"image0": encode(frames[0]), "image1": encode(frames[1])}])
    np.testing.assert_array_equal(flow, predict_flow(registered.model, *frames))


def test_a_jpeg_is_read_as_it_is_stored(registered, loaded, frames):
    """Not turned as its camera was, which truth and the other frame are not either."""
    tag = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # orientation: turned by a quarter
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + tag + struct.pack("<I", 0)
    turned = b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif
    jpegs = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in frames]
    files = [jpeg[:2] + turned + jpeg[2:] + b"appended by the camera" for jpeg in jpegs]
    (flow,) = loaded.predict([dict(zip(("image0", "image1"), files, strict=True))])
    read = [formats.decode_frame(file, "x", allow_trailer=True) for file in files]
    np.testing.assert_array_equal(flow, predict_flow(registered.model, *read))


def test_pairs_may_differ_in_size_and_come_back_as_flo(registered, loaded, frames):
    small = [frame[:32, :48] for frame in frames]
    rows = [dict(zip(("image0", "image1"), map(png, pair), strict=True)) for pair in (frames, small)]
    answers = loaded.predict(rows, params={"encoding": "flo"})
    for answer, pair in zip(answers, (frames, small), strict=True):
        flow = formats.decode_flo(base64.b64decode(answer), "answer")
        np.testing.assert_array_equal(flow, predict_flow(registered.model, *pair))


def test_rows_may_be_those_of_a_table_and_an_unknown_encoding_is_refused(loaded, frames):
    rows = [{"image0": png(frames[0]), "image1": png(frames[1])}, {"image0": png(frames[1]), "image1": png(frames[0])}]
    for flow, expected in zip(loaded.predict(pandas.DataFrame(rows)), loaded.predict(rows), strict=True):
        np.testing.assert_array_equal(flow, expected)
    with pytest.raises(mlflow.exceptions.MlflowException, match="encoding must be array or flo, not 'png'"):
        loaded.predict(rows, params={"encoding": "png"})


def encoded(suffix: str, dtype: type = np.uint8) -> bytes:
    content: bytes = cv2.imencode(suffix, np.zeros((45, 70, 3), dtype))[1].tobytes()
    return content


def huge() -> bytes:
    """A PNG whose header tells of more pixels than OpenCV takes."""
    whole = encoded(".png")
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"nothing", "no PNG or JPEG"),
        (b"", "no PNG or JPEG"),
        (np.zeros((4, 4), np.uint8), "RGB image"),
        (np.full((45, 70, 3), 256), "RGB image"),
        (np.full((45, 70, 3), -1).tolist(), "RGB image"),
        ("abc", "a text that is no base64"),
        (encoded(".bmp"), "no PNG or JPEG"),
        (encoded(".webp"), "no PNG or JPEG"),
        (encoded(".png", np.uint16), "16 bits a channel"),
        (encoded(".png")[:-9], "without its end"),
        (encoded(".jpg")[:-9], "without its end"),
        (encoded(".png")[:20], "without its end"),
        (huge(), "no PNG or JPEG"),
    ],
    ids=[
        "no image",
        "nothing",
        "grey",
        "too bright",
        "too dark",
        "text",
        "BMP",
        "WebP",
        "16 bits",
        "cut PNG",
        "cut JPEG",
        "cut header",
        "huge",
    ],
)
def test_what_is_no_image_is_said_with_the_pairs_number(loaded, frames, image, message):
    good = {"image0": frames[0], "image1": frames[1]}
    with pytest.raises(mlflow.exceptions.MlflowException, match=f"pair 1: .*{message}"):
        loaded.predict([good, {"image0": image, "image1": frames[1]}])


def test_a_process_that_loads_it_is_told_nothing_but_the_flow(registered):
    program = """
import mlflow, numpy, pandas
model = mlflow.pyfunc.load_model("models:/gmflow@champion")
frame = numpy.zeros((32, 48, 3), numpy.uint8)
(flow,) = model.predict(pandas.DataFrame([{"image0": frame, "image1": frame}]))
print(flow.shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=registered.folder, env=registered.environment, capture_output=True
    )
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, "(32, 48, 2)\n", "")


def test_it_computes_on_a_gpu_if_there_is_one_or_where_it_is_told_to(registered, loaded):
    def place(model: Any) -> str:
        found: str = next(model.unwrap_python_model().model.parameters()).device.type
        return found

    assert place(loaded) == ("cuda" if torch.cuda.is_available() else "cpu")
    # A device that every machine has, without memory.
    there = mlflow.pyfunc.load_model("models:/gmflow@champion", model_config={"device": "meta"})
    assert place(there) == "meta"


def test_registering_takes_no_gpu_from_the_workers(registered, monkeypatch):
    """MLflow loads what it logs. The driver may be on the machine with the GPU, which the next stage needs whole."""
    looked: list[bool] = []

    def look() -> bool:
        looked.append(any(frame.name == "load_context" for frame in traceback.extract_stack()))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", look)
    client = mlflow_client.connect(registered.tracking_uri)
    run = tracking.start_run(client, "served", "things", {}).info
    lineage = registration.Lineage("things", "random", {}, "h", "sources:x", {})
    version = registration.register(client, "tried", run.run_id, registered.folder / "model.safetensors", lineage, None)
    assert not any(looked)
    loaded = mlflow.pyfunc.load_model(f"models:/tried/{version.version}")
    assert looked.count(True) == 1
    assert loaded.model_config == {"device": "auto"}


def test_the_model_carries_its_signature_and_an_example_of_it(loaded):
    assert loaded.metadata.signature.inputs.input_names() == ["image0", "image1"]
    example = loaded.input_example if hasattr(loaded, "input_example") else None
    assert loaded.metadata.saved_input_example_info is not None or example is not None


@pytest.fixture(scope="module")
def url(registered: Registered) -> Iterator[str]:
    """`mlflow models serve` in a process of its own."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/gmflow@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log_path = registered.folder / "serve.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=registered.folder,
            env=registered.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def ready() -> bool:
        assert process.poll() is None, log_path.read_text()
        return answers(f"http://127.0.0.1:{port}/ping")

    try:
        wait_until(ready, log_path.read_text, every_s=0.3)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def ask(url: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
        return json.load(answer)["predictions"]


@pytest.mark.slow
class TestServer:
    def test_a_pair_of_png_files_over_http(self, registered, url, frames):
        row = {
            name: base64.b64encode(png(frame)).decode()
            for name, frame in zip(("image0", "image1"), frames, strict=True)
        }
        wanted = predict_flow(registered.model, *frames)
        (flow,) = ask(url, {"dataframe_records": [row]})
        np.testing.assert_allclose(np.array(flow, np.float32), wanted, atol=1e-4)
        (flo,) = ask(url, {"inputs": [row], "params": {"encoding": "flo"}})
        np.testing.assert_allclose(formats.decode_flo(base64.b64decode(flo), "answer"), wanted, atol=1e-4)

    def test_a_wrong_input_is_the_callers_fault(self, url):
        deep = base64.b64encode(encoded(".png", np.uint16)).decode()
        for image, message in (("bm8=", "2 bytes that are no PNG or JPEG image"), (deep, "a PNG of 16 bits a channel")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(url, {"dataframe_records": [{"image0": image, "image1": image}]})
            assert refused.value.code == 400
            assert f"pair 0: {message}" in refused.value.read().decode()
