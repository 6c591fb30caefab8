"""Ranges over TLS, as every bucket outside of this machine is read: whom it trusts, and whom not."""

import contextlib
import datetime
import http.server
import ipaddress
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from datasets_etl.range_reads import RangeReader

CONTENT = bytes(range(256)) * 40


class _Ranges(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    connections: set[tuple[str, int]]

    def do_GET(self) -> None:
        type(self).connections.add(self.client_address)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        data = CONTENT[first : last + 1]
        self.send_response(206 if self.path == "/shard?signed=1" else 403)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
    paths[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


@pytest.fixture
def url(certificate: tuple[Path, Path]) -> Iterator[str]:
    """Of an object on a server with that certificate."""
    _Ranges.connections = set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Ranges)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}/shard?signed=1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_trusted_server_is_read_over_one_connection(url: str, certificate: tuple[Path, Path]):
    reader = RangeReader(str(certificate[0]), connect_timeout_s=5, read_timeout_s=5)
    assert [reader.read(url, offset, 1000) for offset in (0, 1, 5000)] == [
        CONTENT[offset : offset + 1000] for offset in (0, 1, 5000)
    ]
    assert len(_Ranges.connections) == 1
    assert reader.read(url, len(CONTENT) - 10, 1000) == CONTENT[-10:]
    assert reader.read(url.replace("signed", "unsigned"), 0, 10) is None


def test_an_unknown_server_is_told_nothing(url: str):
    reader = RangeReader(None, connect_timeout_s=5, read_timeout_s=5)
    with pytest.raises(ConnectionError, match=r"https://127\.0\.0\.1:\d+: .*certificate"):
        reader.read(url, 0, 1000)
    assert not _Ranges.connections


class _Server(_Ranges):
    """Does to one request after the other what `faults` says: answer it, or not as a server should."""

    faults: list[str]

    def do_GET(self) -> None:
        fault = type(self).faults.pop(0)
        self.close_connection = fault in ("drops", "resets", "talks")
        if fault == "talks":
            self.wfile.write(b"Please log in to this network.\r\n\r\n")
        elif fault == "knows no ranges":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)
        elif fault == "closes":
            self.send_response(206)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(CONTENT[:10])
        elif fault == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        elif fault != "drops":
            time.sleep(1.0 if fault == "is slow" else 0.0)
            super().do_GET()


@contextlib.contextmanager
def _serving(handler: type[_Ranges]) -> Iterator[str]:
    """The URL of an object on a server without TLS."""
    handler.connections = set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/shard?signed=1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def plain_url() -> Iterator[str]:
    with _serving(_Server) as url:
        yield url


@pytest.fixture
def reader() -> RangeReader:
    return RangeReader(None, connect_timeout_s=0.5, read_timeout_s=60)


@pytest.mark.parametrize("ends", ["drops", "resets"])
def test_only_a_connection_that_lay_idle_is_made_again_without_a_word(ends: str, plain_url: str, reader: RangeReader):
    """Servers close those. Where one closes a fresh connection, the caller decides how often it is asked."""
    _Server.faults = [ends, "answers", ends, "answers", ends, ends, "answers"]
    with pytest.raises(ConnectionError, match=r"^http://127\.0\.0\.1:\d+: .*(without response|reset by peer)"):
        reader.read(plain_url, 0, 10)
    assert len(_Server.faults) == 6
    assert reader.read(plain_url, 0, 10) == CONTENT[:10]
    assert reader.read(plain_url, 5, 10) == CONTENT[5:15]
    with pytest.raises(ConnectionError, match=r"without response|reset by peer"):
        reader.read(plain_url, 0, 10)
    assert reader.read(plain_url, 0, 10) == CONTENT[:10]


def test_a_connection_that_gave_no_sound_answer_is_not_used_again(plain_url: str, reader: RangeReader):
    _Server.faults = ["answers", "talks", "answers"]
    assert reader.read(plain_url, 0, 10) == CONTENT[:10]
    with pytest.raises(ConnectionError, match=r"^http://127\.0\.0\.1:\d+: Please log in"):
        reader.read(plain_url, 0, 10)
    assert reader.read(plain_url, 0, 10) == CONTENT[:10]


def test_a_server_without_ranges_is_not_taken_at_its_word(plain_url: str, reader: RangeReader):
    _Server.faults = ["knows no ranges", "answers"]
    assert reader.read(plain_url, 0, 10) is None
    assert reader.read(plain_url, 0, 10) == CONTENT[:10]


def test_a_connection_that_is_made_again_gives_the_server_as_long_to_answer(plain_url: str, reader: RangeReader):
    """Whether it ended with an answer, as some servers have it, or while it lay idle."""
    _Server.faults = ["closes", "is slow", "drops", "is slow"]
    for _ in range(3):
        assert reader.read(plain_url, 0, 10) == CONTENT[:10]


def test_each_server_is_asked_for_what_is_its_own(plain_url: str, reader: RangeReader):
    class Other(_Ranges):
        pass

    _Server.faults = ["answers"] * 3
    with _serving(Other) as other:
        for url in (plain_url, other, other):
            assert reader.read(url, 0, 10) == CONTENT[:10]
    assert len(_Server.faults) == 2
    assert len(Other.connections) == 1


def test_each_thread_keeps_a_connection_of_its_own(plain_url: str, reader: RangeReader):
    _Server.faults = ["answers"] * 4
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as another:
        for thread in (one, another, one, another):
            assert thread.submit(reader.read, plain_url, 0, 10).result() == CONTENT[:10]
    assert len(_Server.connections) == 2
