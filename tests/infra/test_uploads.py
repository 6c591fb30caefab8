"""What `ray job submit --working-dir .` uploads, packed by Ray itself: the project, no secrets, no results."""

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

from tests.conftest import ROOT

SECRETS = ("infra/.env", "infra/kuberay/secrets.yaml")
RESULTS = ("runs/scores/report.html", "runs/champion.onnx", "runs/mlflow.db", "mlartifacts/1/model.safetensors")
TOOLS = (".venv/bin/python", ".git/config", "gmflow/__pycache__/model.cpython-311.pyc")


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job would carry from a checkout in which somebody has worked by the README."""
    folder = tmp_path_factory.mktemp("uploads")
    checkout, archive = folder / "checkout", folder / "package.zip"
    for name in git("ls-files"):
        if (ROOT / name).exists():  # else it was deleted, and that is not yet committed
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    for name in (*SECRETS, *RESULTS, *TOOLS):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(bytes(2_000_000))

    def upload(directory: str, excludes: list[str], is_file: bool = False) -> None:
        create_package(directory, archive, include_gitignore=True, excludes=excludes)

    upload_working_dir_if_needed({"working_dir": str(checkout)}, include_gitignore=True, upload_fn=upload)
    return archive


def test_a_job_carries_the_project_and_nothing_else(packed: Path):
    files = {name for name in zipfile.ZipFile(packed).namelist() if not name.endswith("/")}
    assert files == {name for name in git("ls-files") if (ROOT / name).exists()}


def test_it_is_as_large_as_the_guide_says(packed: Path):
    guide = (ROOT / "docs/cluster.md").read_text()
    (stated,) = re.findall(r"the checkout, which is uploaded, about ([\d.]+) MB", guide)
    assert packed.stat().st_size / 1e6 == pytest.approx(float(stated), abs=0.5)


@pytest.mark.parametrize("name", [*SECRETS, *RESULTS])
def test_git_commits_neither_secrets_nor_results(name: str):
    assert git("check-ignore", "--no-index", name) == [name]
