"""The configuration of a GMFlow, validated once, when it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import lcm
from typing import Any

from gmflow.errors import GMFlowError

GLOBAL = -1
"""The radius that stands for "the whole image" in `corr_radius` and `prop_radius`."""


@dataclass(frozen=True)
class GMFlowConfig:
    """Architecture and matching settings of a `GMFlow`.

    The last three fields hold one value for each scale, coarse to fine. They change no parameter's shape, so any
    of them can be changed on trained weights; the others fix the weights' layout.

    Attributes:
        num_scales: 1 (features at stride 8) or 2 (stride 8, then stride 4).
        backbone_channels: widths of the three backbone stages; the stem has the first.
        feature_channels: channels C of the matched features, a multiple of 4.
        num_layers: transformer blocks, shared by all scales.
        ffn_expansion: hidden width of the feed-forward over its input width (2C).
        attn_splits: attention windows on each side of the feature map; 1 is attention over the whole map.
        corr_radius: matching radius in feature pixels; -1 is global matching.
        prop_radius: propagation radius in feature pixels; -1 is global propagation.

    Raises:
        GMFlowError: a value is out of range; the message names the field, the value and the valid values.
    """

    num_scales: int = 1
    backbone_channels: tuple[int, int, int] = (64, 96, 128)
    feature_channels: int = 128
    num_layers: int = 6
    ffn_expansion: int = 4
    attn_splits: tuple[int, ...] = (2,)
    corr_radius: tuple[int, ...] = (GLOBAL,)
    prop_radius: tuple[int, ...] = (GLOBAL,)

    @classmethod
    def base(cls) -> GMFlowConfig:
        """One scale: global matching and propagation at stride 8 (4,680,288 parameters)."""
        return cls()

    @classmethod
    def refine(cls) -> GMFlowConfig:
        """Two scales: base, then local matching and propagation at stride 4 (4,716,720 parameters)."""
        return cls(num_scales=2, attn_splits=(2, 8), corr_radius=(GLOBAL, 4), prop_radius=(GLOBAL, 1))

    def __post_init__(self) -> None:
        for name in ("backbone_channels", "attn_splits", "corr_radius", "prop_radius"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        for name in ("num_scales", "feature_channels", "num_layers", "ffn_expansion"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise GMFlowError(f"{name} must be an integer of at least 1, not {value!r}")
        if self.num_scales > 2:
            raise GMFlowError(f"num_scales must be 1 or 2, not {self.num_scales}")
        if len(self.backbone_channels) != 3 or min(self.backbone_channels) < 1:
            raise GMFlowError(f"backbone_channels must be three positive widths, not {self.backbone_channels}")
        if self.feature_channels % 4:
            raise GMFlowError(f"feature_channels must be a multiple of 4, not {self.feature_channels}")
        self._check_per_scale("attn_splits", lambda value: value >= 1, "at least 1")
        self._check_per_scale("corr_radius", lambda value: value == GLOBAL or value >= 1, "-1 (global) or at least 1")
        self._check_per_scale("prop_radius", lambda value: value == GLOBAL or value >= 1, "-1 (global) or at least 1")

    def _check_per_scale(self, name: str, valid: Any, meaning: str) -> None:
        values = getattr(self, name)
        if len(values) != self.num_scales or not all(valid(value) for value in values):
            raise GMFlowError(f"{name} must hold a value for each scale ({self.num_scales}), {meaning}; not {values}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Image pixels per feature pixel, coarse to fine."""
        return (8, 4)[: self.num_scales]

    @property
    def size_multiple(self) -> int:
        """What an image's height and width must be divisible by, so that every scale divides into its windows.

        Each scale needs the coarsest stride as well: a finer map is the coarse one doubled.
        """
        return lcm(self.strides[0], *(s * k for s, k in zip(self.strides, self.attn_splits, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Plain integers and lists, as JSON and YAML hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GMFlowConfig:
        """The inverse of `to_dict`. Fields that are missing keep their default (that of `base`).

        Raises:
            GMFlowError: an unknown field, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise GMFlowError(f"unknown model setting(s) {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)


def _integers(name: str, value: object) -> tuple[int, ...]:
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    ):
        raise GMFlowError(f"{name} must be a sequence of integers, not {value!r}")
    return tuple(value)
