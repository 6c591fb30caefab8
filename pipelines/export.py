"""A model in another form: `python pipelines/export.py --model REF model.onnx [model.pt2 …]`.

    .safetensors    our weights, the configuration inside
    .pth            the published layout, for the reference code
    .pt2            torch.export: runs in PyTorch without this project
    .onnx           runs in onnxruntime and others

The last two take float32 [B, 3, H, W] in 0..255, of any size that the model takes; see `gmflow.export`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

# First: see pipelines/__init__.py.
from pipelines.arguments import Parser, add_model, local_path

# isort: split
from rich.console import Console
from rich.markup import escape

from gmflow import GMFlow, GMFlowConfig, save_published, save_weights
from gmflow.export import ExportedModel, check_onnx, export_model
from pipelines.errors import PipelineError, command
from pipelines.lasting import lasting_object
from pipelines.references import resolve_model

console = Console(stderr=True)

WEIGHTS: dict[str, Callable[[GMFlow, Path], None]] = {".safetensors": save_weights, ".pth": save_published}
PROGRAMS: dict[str, Callable[[ExportedModel, Path], None]] = {
    ".pt2": ExportedModel.save_program,
    ".onnx": ExportedModel.save_onnx,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Write a model as other programs read it.")
    add_model(parser)
    parser.add_argument(
        "outputs",
        nargs="+",
        type=local_path,
        metavar="FILE",
        help=f"the suffix decides: {', '.join((*WEIGHTS, *PROGRAMS))}",
    )
    return parser.parse_args(argv)


def check_output(path: Path) -> None:
    """Find errors that would otherwise show only after minutes of tracing. Raises PipelineError or GMFlowError."""
    if path.suffix not in (*WEIGHTS, *PROGRAMS):
        raise PipelineError(f"{path}: unknown suffix; a model is written as {', '.join((*WEIGHTS, *PROGRAMS))}")
    lasting_object(str(path.absolute()), "FILE")
    if path.is_dir():
        raise PipelineError(f"{path}: a folder; name a file")
    if path.suffix == ".onnx":
        check_onnx(path)


def make_folder(path: Path) -> None:
    """Make the folder that `path` will be in. Raises PipelineError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PipelineError(f"{path}: its folder cannot be made ({error.strerror}); give another path") from error


def left_out(config: GMFlowConfig) -> str:
    """The settings of a model that the published layout loses, as arguments for `load_model`; "" if it loses none."""
    assumed = GMFlowConfig.refine() if config.num_scales == 2 else GMFlowConfig.base()
    fields = ("attn_splits", "corr_radius", "prop_radius")
    return ", ".join(f"{n}={getattr(config, n)}" for n in fields if getattr(config, n) != getattr(assumed, n))


@command
def main() -> None:
    arguments = parse_arguments()
    for path in arguments.outputs:
        check_output(path)
    model = resolve_model(arguments.model)
    for path in arguments.outputs:
        make_folder(path)
    exported = None
    for path in arguments.outputs:
        if path.suffix in WEIGHTS:
            WEIGHTS[path.suffix](model, path)
            if path.suffix == ".pth" and (lost := left_out(model.config)):
                print(f"{path}: this layout holds no windows and radii; load it with {lost}", file=sys.stderr)
        else:
            with console.status(f"{escape(str(path))}: tracing and writing, some minutes"):
                exported = exported or export_model(model)
                PROGRAMS[path.suffix](exported, path)
        print(path.absolute())


if __name__ == "__main__":
    main()
