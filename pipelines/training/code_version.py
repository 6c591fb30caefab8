"""Which code ran: the commit if there is one, and always a hash of the sources."""

import functools
import hashlib
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("gmflow", "datasets_etl", "pipelines")


@functools.cache
def code_version() -> str:
    """`git:COMMIT sources:HASH`; without the commit outside a checkout (a submitted job), or where git is missing."""
    hashed = f"sources:{_source_hash()}"
    # Without this check, git would name the commit of any repository the installed package happens to lie in.
    if not (_ROOT / ".git").exists():
        return hashed
    asking = ["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        git = subprocess.run(asking, capture_output=True, text=True, check=False)
    except OSError:  # a container with the checkout mounted, but without git
        return hashed
    return f"git:{git.stdout.strip()} {hashed}" if git.returncode == 0 else hashed


def _source_hash() -> str:
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
