"""Settings of a trained model, and which of them make sense at an image size.

Windows and radii change no parameter's shape, so the same weights run at all settings. Settings must fit the feature
map: windows must divide it evenly, and the (2r+1)² neighbourhood of a radius r must fit on it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gmflow import GMFlowConfig
from gmflow.config import GLOBAL
from pipelines.errors import PipelineError

Size = tuple[int, int]
"""Height and width, in pixels."""

_LEAST_WINDOW = 2
"""Least feature pixels on a window's side: windows shift by half their size from layer to layer, so 1 is too few."""


@dataclass(frozen=True, order=True)
class Setting:
    """What can be chosen for a trained model: one value for each scale, coarse to fine, as in `GMFlowConfig`."""

    attn_splits: tuple[int, ...]
    corr_radius: tuple[int, ...]
    prop_radius: tuple[int, ...]

    @classmethod
    def of(cls, model: GMFlowConfig) -> "Setting":
        return cls(model.attn_splits, model.corr_radius, model.prop_radius)

    def on(self, model: GMFlowConfig) -> GMFlowConfig:
        """The model's architecture at this setting."""
        return replace(model, attn_splits=self.attn_splits, corr_radius=self.corr_radius, prop_radius=self.prop_radius)

    @property
    def point(self) -> dict[str, int]:
        """Dimension → value: what may be chosen, the radii being those of the finest scale."""
        splits = {f"attn_splits_{scale}": value for scale, value in enumerate(self.attn_splits, start=1)}
        return {**splits, "corr_radius": self.corr_radius[-1], "prop_radius": self.prop_radius[-1]}

    @property
    def splits(self) -> str:
        """Windows on a side, coarse × fine, such as "2×8"."""
        return "×".join(str(value) for value in self.attn_splits)

    @property
    def name(self) -> str:
        """Windows, matching and propagation radius of the finest scale, such as "2x8-r4-p1"; g means global."""
        corr, prop = ("g" if value == GLOBAL else str(value) for value in (self.corr_radius[-1], self.prop_radius[-1]))
        return f"{'x'.join(str(value) for value in self.attn_splits)}-r{corr}-p{prop}"


def grid_settings(
    reference: Setting,
    attn_splits: Sequence[Sequence[int]] | None,
    corr_radius: Sequence[int] | None,
    prop_radius: Sequence[int] | None,
) -> list[Setting]:
    """Every combination, in order; an argument that is None keeps `reference`. Radii are of the finest scale."""
    splits = itertools.product(*(attn_splits or [(value,) for value in reference.attn_splits]))
    radii = itertools.product(corr_radius or reference.corr_radius[-1:], prop_radius or reference.prop_radius[-1:])
    return [
        Setting(tuple(chosen), (*reference.corr_radius[:-1], corr), (*reference.prop_radius[:-1], prop))
        for chosen, (corr, prop) in itertools.product(splits, list(radii))
    ]


def padded_size(model: GMFlowConfig, size: Size) -> Size:
    """The size to which images are padded for a model: multiples of its `size_multiple`."""
    height, width = (length + -length % model.size_multiple for length in size)
    return height, width


def check_crop(model: GMFlowConfig, crop: Size, where: str) -> None:
    """Check that each scale's windows divide the feature map of a training crop, which is not padded.

    Raises PipelineError, which lists the valid values for this crop.
    """
    for scale, stride in enumerate(model.strides):
        if crop[0] % stride or crop[1] % stride:
            raise PipelineError(f"{where}: crop {crop[0]}×{crop[1]} must be divisible by {stride} for this model")
        feature = crop[0] // stride, crop[1] // stride
        valid = [k for k in range(1, min(feature) // _LEAST_WINDOW + 1) if not (feature[0] % k or feature[1] % k)]
        if model.attn_splits[scale] not in valid:
            raise PipelineError(
                f"{where}: attn_splits {model.attn_splits[scale]} at scale {scale + 1} does not divide the feature map "
                f"{feature[0]}×{feature[1]} of crop {crop[0]}×{crop[1]} into windows of at least "
                f"{_LEAST_WINDOW}×{_LEAST_WINDOW}; valid are {_listed(valid)}"
            )
    _check_radii(model, crop, f"{where}: crop {crop[0]}×{crop[1]}")


def check_size(model: GMFlowConfig, size: Size, where: str) -> None:
    """Check that no window of an evaluated image, padded to the setting's `size_multiple`, is all padding or too small.

    Raises PipelineError, which lists the valid values for this size.
    """
    for scale in range(model.num_scales):
        if not _windows_fit(model, size, scale):
            valid = [k for k in range(1, min(size)) if _windows_fit(_with_splits(model, scale, k), size, scale)]
            others = [str(k) for at, k in enumerate(model.attn_splits) if at != scale]
            beside = f" beside {', '.join(others)} at the other scale" if others else ""
            padded = padded_size(model, size)
            raise PipelineError(
                f"{where}: attn_splits {model.attn_splits[scale]} at scale {scale + 1} cuts images of "
                f"{size[0]}×{size[1]}, padded to {padded[0]}×{padded[1]}, into windows that are all padding or smaller "
                f"than {_LEAST_WINDOW}×{_LEAST_WINDOW} feature pixels; valid{beside} are {_listed(valid)}"
            )
    _check_radii(model, padded_size(model, size), f"{where}: images of {size[0]}×{size[1]}")


def _windows_fit(model: GMFlowConfig, size: Size, scale: int) -> bool:
    padded = padded_size(model, size)
    windows = [length // model.attn_splits[scale] for length in padded]  # image pixels
    enough = min(windows) >= _LEAST_WINDOW * model.strides[scale]
    return enough and all(p - s < window for p, s, window in zip(padded, size, windows, strict=True))


def _with_splits(model: GMFlowConfig, scale: int, value: int) -> GMFlowConfig:
    splits = list(model.attn_splits)
    splits[scale] = value
    return replace(model, attn_splits=tuple(splits))


def _check_radii(model: GMFlowConfig, size: Size, where: str) -> None:
    """Check that finest-scale radii are local in a model of two scales, and that each (2r+1)² area fits on the map."""
    most = (min(size) // model.strides[-1] - 1) // 2
    for name in ("corr_radius", "prop_radius"):
        value = getattr(model, name)[-1]
        if model.num_scales == 1 and value == GLOBAL:
            continue
        if not 1 <= value <= most:
            valid = f"1 to {most}" + (", and -1 (global)" if model.num_scales == 1 else "")
            raise PipelineError(
                f"{where}: {name} {value} makes no sense at scale {model.num_scales}; valid are {valid}"
            )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values) or "none"
