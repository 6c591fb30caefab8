"""What is measured by hand breaks without anybody seeing it: at least, every benchmark starts."""

import pkgutil
import re
import subprocess
import sys

import pytest

import benchmarks
from tests.conftest import ROOT

NAMES = sorted(found.name for found in pkgutil.iter_modules(benchmarks.__path__) if found.name != "turns")


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_what_it_measures(name: str):
    asked = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert re.match(rf"usage: (python -m benchmarks\.)?{name}\b", said.stdout)
