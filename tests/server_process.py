"""A server of the tests: a process in a folder of its own, killed and started again at will."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class ServerProcess:
    """What servers share: `server.log` in their folder, and an end as sudden as a machine's."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    @property
    def said(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        """SIGKILL, as a machine that fails."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
