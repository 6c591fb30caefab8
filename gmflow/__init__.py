"""GMFlow: optical flow by global matching (Xu et al., CVPR 2022), exact to the published weights.

```python
from gmflow import load_model, predict_flow, flow_to_image

model = load_model("gmflow_refine.safetensors")   # or a published .pth
flow = predict_flow(model, frame0, frame1)        # uint8 [H, W, 3] RGB → float32 [H, W, 2] pixels
picture = flow_to_image(flow)                     # uint8 [H, W, 3] RGB
```
"""

from gmflow.config import GMFlowConfig
from gmflow.errors import GMFlowError
from gmflow.model import FlowOutput, GMFlow
from gmflow.predict import Prediction, predict_batch, predict_flow
from gmflow.tiling import Tiling
from gmflow.visualize import error_to_image, flow_to_image
from gmflow.weights import load_model, load_weights, save_published, save_weights

__all__ = [
    "FlowOutput",
    "GMFlow",
    "GMFlowConfig",
    "GMFlowError",
    "Prediction",
    "Tiling",
    "error_to_image",
    "flow_to_image",
    "load_model",
    "load_weights",
    "predict_batch",
    "predict_flow",
    "save_published",
    "save_weights",
]
