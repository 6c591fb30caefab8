"""EC2's metadata service, version 2, as a server of the tests: nothing without a token, 404 until there is a notice or
credentials of a role.

`python -m tests.infra.metadata_server ADDRESS PORT FILE` answers what is in the file, once it is there.
"""

import contextlib
import json
import sys
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_ROLES = "/latest/meta-data/iam/security-credentials/"


def give_notice(file: Path, seconds: float) -> None:
    """That a machine is taken in so many seconds."""
    taken_at = datetime.now(UTC) + timedelta(seconds=seconds)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps({"action": "terminate", "time": f"{taken_at:%Y-%m-%dT%H:%M:%SZ}"}))
    beside.replace(file)


def _credentials(key: str, secret: str) -> str:
    ends = datetime.now(UTC) + timedelta(hours=10)
    content = {"Code": "Success", "AccessKeyId": key, "SecretAccessKey": secret, "Token": ""}
    return json.dumps(content | {"Expiration": f"{ends:%Y-%m-%dT%H:%M:%SZ}"})


class MetadataServer(ThreadingHTTPServer):
    """Counts the questions; `broken` refuses them. It advises to rebalance all the time, which is no notice.

    `keys` are those of the machine's role, which end in ten hours; the next `stalls` answers with them are late.
    """

    def __init__(self, address: str, port: int, notice: Path) -> None:
        super().__init__((address, port), _Handler)
        self.notice = notice
        self.asked = 0
        self.broken = False
        self.keys: tuple[str, str] | None = None
        self.stalls = 0


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self):
        # Not self.path: Python takes "//latest" for "/latest" there.
        known = (
            self.requestline.startswith("PUT /latest/api/token ")
            and int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        )
        self._answer(200 if known else 400, "the-token")

    def do_GET(self):
        if self.headers["X-aws-ec2-metadata-token"] != "the-token":
            self._answer(401, "")
        elif self.server.broken:
            self._answer(503, "")
        elif self.path == "/latest/meta-data/events/recommendations/rebalance":
            self._answer(200, '{"noticeTime": "2026-01-01T00:00:00Z"}')
        elif self.path == "/latest/meta-data/spot/instance-action" and self.server.notice.exists():
            self._answer(200, self.server.notice.read_text())
        elif self.path == _ROLES and self.server.keys is not None:
            self._answer(200, "the-role")
        elif self.path == f"{_ROLES}the-role" and self.server.keys is not None:
            if self.server.stalls:
                self.server.stalls -= 1
                time.sleep(3)
            self._answer(200, _credentials(*self.server.keys))
        else:
            self._answer(404, "")
        self.server.asked += 1

    def _answer(self, code: int, text: str) -> None:
        with contextlib.suppress(ConnectionError):  # nobody waits any more
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    MetadataServer(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])).serve_forever()
