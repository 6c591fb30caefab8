"""What the tests share: the samples at hand, a small sharded dataset, a real S3 server, a local Ray."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from datasets_etl import s3_client
from pipelines.cluster import connected
from tests.seaweedfs import S3Server, running

ROOT = Path(__file__).parents[1]

# A shell has what it runs in the background ignore Ctrl-C, and so all programs that the tests start, some of which are
# told to end by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


class _ByFile(LoadScopeScheduling):
    """Where tests run in several processes, those of a file stay in one, and all that may need the servers' stack."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "infra" if "/infra/" in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _ByFile(config, log)


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """As they were: a model that is prepared flushes them, and other tests draw them."""
    yield
    torch.set_flush_denormal(False)


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: no samples to test with")
    return Path(value)


@pytest.fixture(scope="session")
def samples() -> Path:
    """Real FlyingChairs, Sintel and KITTI pairs."""
    return _folder("GMFLOW_SAMPLES")


@pytest.fixture(scope="session")
def format_samples() -> Path:
    """FlyingThings3D and HD1K layouts."""
    return _folder("GMFLOW_FORMAT_SAMPLES")


@pytest.fixture(scope="session")
def reference() -> Path:
    """Published weights, reference outputs and gradients."""
    return _folder("GMFLOW_REFERENCE")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS with authentication, on loopback."""
    with running(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def s3(s3_server: S3Server) -> Iterator[S3Server]:
    """The S3 server as the default of this process and of those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.settings.items():
            patch.setenv(name, value)
        yield s3_server


@pytest.fixture
def fresh_client() -> Iterator[None]:
    """S3 settings are read when a process makes its client: a test that changes them wants a client of its own."""
    kept = (s3_client._client_of_process, s3_client._signed_url, s3_client._range_reader)
    for made in kept:
        made.cache_clear()
    yield
    for made in kept:
        made.cache_clear()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that makes a file system of so many mebibytes; returns its folder."""
    place = tmp_path / "small"

    def mount(mebibytes: int) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a small file system here")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="session")
def local_ray(s3: S3Server) -> Iterator[None]:
    """One local Ray for the tests that need no cluster of their own; its workers know the S3 server."""
    with connected(2):
        yield
