"""The library as a package: what it needs, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys


def test_the_library_works_where_nothing_but_its_own_requirements_is_installed() -> None:
    """`pip install .` brings torch, numpy, OpenCV and safetensors: everything else is blocked here."""
    code = """
import importlib.abc, sys, time

class Blocked(importlib.abc.MetaPathFinder):
    names = {"ray", "mlflow", "boto3", "botocore", "webdataset", "pydantic", "yaml", "rich", "matplotlib", "pandas",
             "datasets_etl", "pipelines", "onnxscript", "onnxruntime", "zstandard", "tenacity"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is none of the library's requirements")

sys.meta_path.insert(0, Blocked())
import numpy, gmflow
assert "cv2" not in sys.modules  # loaded by gmflow.drawing alone: it takes a while
import gmflow.drawing, gmflow.export, gmflow.execution
small = gmflow.GMFlowConfig(backbone_channels=(4, 6, 8), feature_channels=8, num_layers=1)
flow = gmflow.predict_flow(gmflow.GMFlow(small), *numpy.zeros((2, 20, 30, 3), numpy.uint8))
print(flow.shape, gmflow.flow_to_image(flow).shape)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "(20, 30, 2) (20, 30, 3)", out.stderr


def test_importing_the_library_loads_hardly_more_than_torch() -> None:
    """Not the compiler, which takes as long as PyTorch itself, nor OpenCV."""
    heavy = ("torch._dynamo", "sympy", "cv2")
    code = f"import sys, gmflow; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
