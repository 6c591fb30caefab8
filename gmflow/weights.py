"""Weights on disk: our `.safetensors`, and the published `.pth` with its own names for everything.

Both load strictly, and neither runs code from the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gmflow.config import GMFlowConfig
from gmflow.errors import GMFlowError
from gmflow.model import GMFlow

CONFIG_KEY = "gmflow_config"
"""Metadata entry of our files: the `GMFlowConfig` as JSON."""

ARCHITECTURE = ("num_scales", "backbone_channels", "feature_channels", "num_layers", "ffn_expansion")
"""The settings that fix the weights' layout."""

# Our names → published names, applied in turn.
_PUBLISHED = (
    (r"^backbone\.stem\.", "backbone.conv1."),
    (r"^backbone\.projection\.", "backbone.conv2."),
    (r"^backbone\.shared\.", "backbone.trident_conv."),
    (r"^backbone\.stages\.(\d)\.", lambda found: f"backbone.layer{int(found[1]) + 1}."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"^transformer\.blocks\.", "transformer.layers."),
    (r"_attention\.(q|k|v)(uery|ey|alue)\.", r"_attention.\1_proj."),
    (r"_attention\.norm\.", "_attention.norm1."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".cross_attn_ffn."),
    (r"\.feed_forward\.expand\.", ".cross_attn_ffn.mlp.0."),
    (r"\.feed_forward\.contract\.", ".cross_attn_ffn.mlp.2."),
    (r"\.feed_forward\.norm\.", ".cross_attn_ffn.norm2."),
    (r"^propagation\.(q|k)(uery|ey)\.", r"feature_flow_attn.\1_proj."),
    (r"^upsampler\.hidden\.", "upsampler.0."),
    (r"^upsampler\.weights\.", "upsampler.2."),
)


def published_name(name: str) -> str:
    """What the published checkpoints call the parameter that this library calls `name`."""
    for pattern, replacement in _PUBLISHED:
        name = re.sub(pattern, replacement, name)
    return name


def load_model(
    path: str | Path,
    *,
    attn_splits: tuple[int, ...] | None = None,
    corr_radius: tuple[int, ...] | None = None,
    prop_radius: tuple[int, ...] | None = None,
) -> GMFlow:
    """The model that a weight file holds, in evaluation mode on the CPU.

    Our files carry their configuration; that of a `.pth` is read from its tensors' shapes, with the windows and radii
    of `GMFlowConfig.base()` or `refine()`.

    Args:
        path: `.safetensors` of ours, or a published `.pth`.
        attn_splits, corr_radius, prop_radius: windows and radii to use instead, one value a scale. All else decides
            the shapes of the weights.

    Raises:
        GMFlowError: the file is missing, damaged or no GMFlow, or windows or radii are out of range.
    """
    path = Path(path)
    config, tensors = _read(path)
    chosen = replace(
        config,
        attn_splits=config.attn_splits if attn_splits is None else attn_splits,
        corr_radius=config.corr_radius if corr_radius is None else corr_radius,
        prop_radius=config.prop_radius if prop_radius is None else prop_radius,
    )
    model = GMFlow(chosen)
    _fill(model, path, config, tensors)
    return model.eval()


def load_weights(model: GMFlow, path: str | Path) -> None:
    """Fill a model with the weights of a published `.pth` or of our `.safetensors`, strictly.

    The model keeps its own windows and radii.

    Raises:
        GMFlowError: the file is missing, damaged, or of another architecture; the model is then unchanged.
    """
    path = Path(path)
    config, tensors = _read(path)
    _fill(model, path, config, tensors)


def save_weights(model: GMFlow, path: str | Path) -> None:
    """Write the weights and the configuration as `.safetensors`; a file of that name is replaced whole or not at all.

    Raises:
        GMFlowError: `path` does not end in `.safetensors`, its folder does not exist, or it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise GMFlowError(f"{path}: weights are saved as .safetensors (save_published writes a .pth)")
    content = encode_weights(model)
    replace_file(path, lambda beside: Path(beside).write_bytes(content))


def encode_weights(model: GMFlow) -> bytes:
    """The content of the `.safetensors` file that `save_weights` writes: the same bytes for equal models."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # One entry of metadata, because safetensors writes several in no fixed order.
    content: bytes = save(tensors, {CONFIG_KEY: json.dumps(model.config.to_dict(), sort_keys=True)})
    return content


def weights_digest(model: GMFlow) -> str:
    """16 hex digits that name a configuration with its weights, whatever kind of file they came from."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        # As bytes: NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def decode_weights(content: bytes) -> GMFlow:
    """The model of `encode_weights`, in evaluation mode on the CPU. Raises GMFlowError as `load_model` does."""
    with tempfile.TemporaryDirectory(prefix="gmflow-weights-") as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(content)
        return load_model(path)


def save_published(model: GMFlow, path: str | Path) -> None:
    """Write the weights in the published layout: a `.pth` of `{"model": state dict}` under the published names.

    A file of that name is replaced whole or not at all.

    Raises:
        GMFlowError: `path` ends in `.safetensors`, its folder does not exist, or it cannot be written.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise GMFlowError(f"{path}: the published layout is saved as .pth (save_weights writes a .safetensors)")
    tensors = {published_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()  # torch.save to a path would hide in a RuntimeError that the disk is full
    torch.save({"model": tensors}, content)
    replace_file(path, lambda beside: Path(beside).write_bytes(content.getvalue()))


def replace_file(path: Path, write: Callable[[str], object]) -> None:
    """Let `write` write a file beside `path`, then rename it: nobody ever sees half a file.

    Raises:
        GMFlowError: the folder of `path` does not exist, or the file cannot be written.
    """
    if not path.parent.is_dir():
        raise GMFlowError(f"{path}: the folder {path.parent} does not exist")
    try:
        _replace(path, write)
    except OSError as error:
        raise GMFlowError(f"{path}: cannot be written ({error.strerror or error}); give another path") from error


def _replace(path: Path, write: Callable[[str], object]) -> None:
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(beside)
        with open(beside, "rb") as written:  # noqa: PTH123 (a name of tempfile's)
            os.fsync(written.fileno())  # before renaming, or a power cut may leave an empty file
        # mkstemp makes a private file; weights are shared like any other.
        umask = os.umask(0)
        os.umask(umask)
        Path(beside).chmod(0o666 & ~umask)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[GMFlowConfig, dict[str, Tensor]]:
    """Configuration and tensors of a file, the tensors under published names."""
    if not path.is_file():
        raise GMFlowError(f"{path}: no such weight file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    tensors = _read_published(path)
    return _config_from_shapes(path, tensors), tensors


def _read_safetensors(path: Path) -> tuple[GMFlowConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {published_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise GMFlowError(f"{path}: damaged, or no safetensors file ({error})") from error
    if CONFIG_KEY not in metadata:
        raise GMFlowError(f"{path}: not written by gmflow.save_weights (no {CONFIG_KEY} in its metadata)")
    try:
        return GMFlowConfig.from_dict(json.loads(metadata[CONFIG_KEY])), tensors
    except (ValueError, TypeError, AttributeError) as error:
        raise GMFlowError(f"{path}: its {CONFIG_KEY} is no model configuration ({error})") from error


def _read_published(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise GMFlowError(f"{path}: damaged, or holds more than tensors; nothing but weights is loaded") from error
    except Exception as error:  # PyTorch's unpickler fails on foreign bytes in many ways
        raise GMFlowError(f"{path}: damaged, or no PyTorch checkpoint ({type(error).__name__})") from error
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise GMFlowError(f'{path}: neither a state dict nor {{"model": state dict}}')
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _config_from_shapes(path: Path, tensors: Mapping[str, Tensor]) -> GMFlowConfig:
    """The architecture that published tensors belong to, with the windows and radii of its variant."""

    def width(name: str, axis: int = 0) -> int:
        if name not in tensors or tensors[name].dim() <= axis:
            raise GMFlowError(f"{path}: no GMFlow weights ({name} is missing)")
        return tensors[name].shape[axis]

    variant = GMFlowConfig.refine() if "backbone.trident_conv.weight" in tensors else GMFlowConfig.base()
    blocks = {found[1] for name in tensors if (found := re.match(r"transformer\.layers\.(\d+)\.", name))}
    hidden = "transformer.layers.0.cross_attn_ffn.mlp.0.weight"
    architecture: dict[str, Any] = {
        "backbone_channels": tuple(width(f"backbone.layer{stage}.0.conv1.weight") for stage in (1, 2, 3)),
        "feature_channels": width("backbone.conv2.weight"),
        "num_layers": len(blocks),
        "ffn_expansion": width(hidden) // max(width(hidden, 1), 1),
    }
    try:
        return replace(variant, **architecture)
    except GMFlowError as error:
        raise GMFlowError(f"{path}: no GMFlow weights ({error})") from error


def _fill(model: GMFlow, path: Path, config: GMFlowConfig, tensors: Mapping[str, Tensor]) -> None:
    for field in ARCHITECTURE:
        theirs, ours = getattr(config, field), getattr(model.config, field)
        if theirs != ours:
            raise GMFlowError(f"{path}: weights of another architecture: {field} is {theirs}, the model's is {ours}")
    expected = {published_name(name): name for name in model.state_dict()}
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        differences = [f"lacks {len(missing)} tensor(s) such as {missing[0]}"] if missing else []
        differences += [f"has {len(unknown)} unknown tensor(s) such as {unknown[0]}"] if unknown else []
        raise GMFlowError(f"{path}: weights of another architecture: {' and '.join(differences)}")
    state = model.state_dict()
    for theirs, ours in expected.items():
        tensor = tensors[theirs]
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            found = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise GMFlowError(f"{path}: {theirs} must hold floating-point numbers, not {found}")
        if tensor.shape != state[ours].shape:
            raise GMFlowError(
                f"{path}: weights of another architecture: {theirs} has shape {list(tensor.shape)}, "
                f"the model's {list(state[ours].shape)}"
            )
        if not tensor.isfinite().all():  # a .pth has no checksum that PyTorch looks at
            raise GMFlowError(f"{path}: damaged, or of a training that diverged: {theirs} is not finite")
    model.load_state_dict({ours: tensors[theirs] for theirs, ours in expected.items()})
