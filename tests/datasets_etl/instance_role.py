"""EC2's metadata service as it hands out the credentials of a machine's role, which may be slow or away."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PATH = "/latest/meta-data/iam/security-credentials/"


@dataclass
class Role:
    """The credentials that are handed out, for ten hours; how many answers are late, and whether all fail."""

    key: str
    secret: str
    stalls: int = 0
    is_away: bool = False
    url: str = ""

    def credentials(self) -> str:
        ends = datetime.now(UTC) + timedelta(hours=10)
        content = {"Code": "Success", "AccessKeyId": self.key, "SecretAccessKey": self.secret, "Token": ""}
        return json.dumps(content | {"Expiration": f"{ends:%Y-%m-%dT%H:%M:%SZ}"})


@contextlib.contextmanager
def serving(role: Role) -> Iterator[Role]:
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer("the-token")

        def do_GET(self) -> None:
            self._answer("the-role" if self.path == _PATH else role.credentials())

        def _answer(self, text: str) -> None:
            if role.is_away:
                self.send_error(503)
                return
            if self.path == f"{_PATH}the-role" and role.stalls:
                role.stalls -= 1
                time.sleep(3)
            with contextlib.suppress(OSError):  # nobody waits any more
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    role.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield role
    finally:
        server.shutdown()
        server.server_close()
