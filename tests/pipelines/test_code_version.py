"""What runs, models and checkpoints say about the code that made them."""

import subprocess
from pathlib import Path

import pytest

from pipelines.training import code_version


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit."""
    monkeypatch.setattr(code_version, "_ROOT", tmp_path)
    (tmp_path / "gmflow").mkdir()
    (tmp_path / "gmflow" / "model.py").write_text("one = 1\n")
    who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    return tmp_path


def told() -> list[str]:
    """Anew, as in another process."""
    return code_version.code_version.__wrapped__().split()


def test_a_checkout_tells_its_commit_and_that_its_sources_were_changed(checkout: Path):
    commit, sources = told()
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert commit == f"git:{head.stdout[:12]}"
    (checkout / "gmflow" / "model.py").write_text("one = 2\n")
    assert told()[0] == commit
    assert told()[1] != sources


def test_sources_alone_are_told_where_there_is_no_git(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    """A container with the checkout mounted into it."""
    _, sources = told()
    monkeypatch.setenv("PATH", str(checkout))
    assert told() == [sources]
