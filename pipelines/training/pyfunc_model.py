"""The registered model as MLflow loads it: code and safetensors, no pickle (MLflow's "models from code")."""

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext

from gmflow import load_model, predict_flow


class GMFlowPyfunc(PythonModel):
    """Frame pairs → flow."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model = load_model(context.artifacts["weights"]).eval()

    # MLflow reads hints on model_input as a schema of its own, which knows no arrays: the signature says what goes in.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """RGB pairs, uint8 [B, 2, H, W, 3] → flow in pixels, float32 [B, H, W, 2]; any size."""
        return np.stack([predict_flow(self.model, frame0, frame1) for frame0, frame1 in model_input])


mlflow.models.set_model(GMFlowPyfunc())
