"""A model in another form: `python pipelines/export.py --model REF model.onnx [model.pt2 …]`.

    .safetensors    our weights, the configuration inside
    .pth            the published layout, for the reference code
    .pt2            torch.export: runs in PyTorch without this project
    .onnx           runs in onnxruntime and others

The last two take float32 [B, 3, H, W] in 0..255, of all sizes the model takes, see `gmflow.export`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gmflow import GMFlow, save_published, save_weights
from gmflow.export import ExportedModel, export_model
from pipelines.errors import PipelineError, command
from pipelines.training.registry import resolve_model

console = Console(stderr=True)

WEIGHTS: dict[str, Callable[[GMFlow, Path], None]] = {".safetensors": save_weights, ".pth": save_published}
PROGRAMS: dict[str, Callable[[ExportedModel, Path], None]] = {
    ".pt2": ExportedModel.save_program,
    ".onnx": ExportedModel.save_onnx,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a model as other programs read it.")
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS or /VERSION, .pth, .safetensors, checkpoint")
    parser.add_argument(
        "outputs", nargs="+", type=Path, metavar="FILE", help=f"the suffix decides: {', '.join((*WEIGHTS, *PROGRAMS))}"
    )
    return parser.parse_args(argv)


@command
def main() -> None:
    arguments = parse_arguments()
    for path in arguments.outputs:
        if path.suffix not in (*WEIGHTS, *PROGRAMS):
            raise PipelineError(f"{path}: unknown suffix; a model is written as {', '.join((*WEIGHTS, *PROGRAMS))}")
    model = resolve_model(arguments.model)
    for path in arguments.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    exported = None
    for path in arguments.outputs:
        if path.suffix in WEIGHTS:
            WEIGHTS[path.suffix](model, path)
        else:
            with console.status(f"{path}: tracing and writing, some minutes"):
                exported = exported or export_model(model)
                PROGRAMS[path.suffix](exported, path)
        print(path.absolute())


if __name__ == "__main__":
    main()
