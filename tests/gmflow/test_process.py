"""What is set for a whole process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gmflow.process import sum_in_order


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is set up, no other")
@pytest.mark.parametrize("keep", [True, False])
def test_a_prepared_model_gets_memory_that_was_freed_not_fresh_pages_unless_told_otherwise(keep: bool) -> None:
    script = f"""
        import resource
        import torch
        from gmflow import GMFlow, GMFlowConfig
        from gmflow.execution import ExecutionConfig, prepare_model

        prepare_model(GMFlow(GMFlowConfig(num_layers=1)), ExecutionConfig(), keep_freed_memory={keep})
        faults = []
        for _ in range(12):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.zeros(2**24)  # 64 MiB, 16,384 pages
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(*faults)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    faults = list(map(int, run.stdout.split()))
    assert max(faults) > 1000
    assert (sum(faults) < 4 * max(faults)) == keep  # some other tensor may have taken a corner of what was freed


def test_a_prepared_model_flushes_denormals_on_every_thread_that_computes_for_it() -> None:
    """Also on those that PyTorch had started before."""
    script = """
        import torch
        from gmflow import GMFlow, GMFlowConfig
        from gmflow.execution import ExecutionConfig, prepare_model

        torch.set_num_threads(2)

        def flushed():
            return (torch.full((2**20,), 1.2e-38) * 0.5 == 0).float().mean().item()

        before = flushed()
        prepare_model(GMFlow(GMFlowConfig(num_layers=1)), ExecutionConfig())
        print(before, flushed(), torch.get_num_threads())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0.0", "1.0", "2"]


deterministic: Any = torch.utils.deterministic  # its setting is a property of the module, which mypy does not see


@pytest.fixture
def deterministic_settings() -> Iterator[None]:
    """Of the process, and afterwards as they were before."""
    filled, on = deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    yield
    deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(on)


@pytest.mark.usefixtures("deterministic_settings")
@pytest.mark.parametrize("named", [None, ":16:8"])
def test_sums_in_order_need_a_workspace_of_cublas_which_the_user_may_choose(
    named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, PyTorch refuses the first product on a GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", named or "")  # so that it is as it was afterwards
    if named is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    sum_in_order()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (named or ":4096:8")
    assert torch.are_deterministic_algorithms_enabled()
    assert not deterministic.fill_uninitialized_memory
