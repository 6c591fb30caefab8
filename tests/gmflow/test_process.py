"""What is set for a whole process."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap

import pytest


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
