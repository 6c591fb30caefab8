"""Ranges over TLS, as every bucket outside of this machine is read: whom it trusts, and whom not."""

import datetime
import http.server
import ipaddress
import re
import ssl
import threading
from collections.abc import Iterator
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
