"""An HTTP proxy that breaks what passes through it, on demand: what networks and busy servers do to S3 clients."""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

Fault = str | Callable[[], None] | None
"""One of "503", "500", "drop" (no answer), "cut" (connection breaks in the middle of the body), "short" (a body whose
length agrees with its headers, but half of it is missing), "stall" (no answer for seconds), or something to call
before the request goes on, None to let it pass."""

_STALL_S = 3.0


class FaultyProxy:
    """`faults` are used up, one a request that `applies`; requests after them go through."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlparse(upstream).netloc
        self.faults: list[Fault] = []
        self.applies: Callable[[str, str], bool] = lambda method, path: True
        self.seen: list[tuple[str, str, Fault]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def next_fault(self, method: str, path: str) -> Fault:
        with self._lock:
            fault = self.faults.pop(0) if self.faults and self.applies(method, path) else None
            self.seen.append((method, path, fault))
            return fault

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def _handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            body = self._body()
            fault = proxy.next_fault(self.command, self.path)
            if fault == "stall":
                time.sleep(_STALL_S)
            if fault in ("drop", "stall"):
                self.close_connection = True
            elif fault in ("503", "500"):
                self._answer(int(fault), [], b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>")
            else:
                if callable(fault):
                    fault()
                self._relay(body, fault)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            del self.headers["Transfer-Encoding"]  # it goes on in one piece
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _relay(self, body: bytes, fault: Fault) -> None:
            upstream = http.client.HTTPConnection(proxy.upstream, timeout=30)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            try:
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                content = response.read()
            except OSError:  # nobody there: as if the client had met the server itself
                self.close_connection = True
                return
            finally:
                upstream.close()
            if self.command == "HEAD":
                self._answer(response.status, response.getheaders(), b"", response.getheader("Content-Length"))
                return
            kept = content[: len(content) // 2]
            if fault == "short":
                self._answer(response.status, response.getheaders(), kept)
            elif fault == "cut":
                self._answer(response.status, response.getheaders(), kept, str(len(content)))
                self.close_connection = True
            else:
                self._answer(response.status, response.getheaders(), content)

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = _pass_on  # noqa: N815

    return Handler
