"""The parts of a config that name data: mixtures, validation sets, and metrics of these sets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from datasets_etl.augment import AugmentConfig
from datasets_etl.cache import SampleCache
from datasets_etl.evaluation_set import EvaluationSet, part_label
from datasets_etl.loader import MixturePart
from datasets_etl.manifest import Manifest, patterns_label
from pipelines.config_file import Frozen, spelt

DataName = Annotated[str, spelt(r"[\w.-]+", "letters, digits, _, . and -")]
"""The name of a dataset within a config. Metric names contain it."""


class SubsetConfig(Frozen):
    """Samples of a dataset.

    Attributes:
        data: name of the dataset in the config.
        subset: one of its subsets.
        only: patterns of samples' names, such as "alley_*"; samples that match none of them are left out.
        without: patterns of the names of samples that are left out, to validate on them.
    """

    data: str
    subset: str
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @pydantic.model_serializer(mode="wrap")
    def _patterns_if_any(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out empty patterns: earlier versions had none, and the hashes of their stages must stay the same."""
        content: dict[str, Any] = dump(self)
        return {name: value for name, value in content.items() if value or name not in ("only", "without")}

    @property
    def patterns(self) -> str:
        """Which part of the subset the patterns choose, such as "only alley_*"; empty if there are none."""
        return patterns_label(self.only, self.without)

    def indices(self, manifest: Manifest) -> npt.NDArray[np.int64]:
        """Numbers of its samples in the dataset's manifest. Raises DataError if there are none."""
        return manifest.select(self.subset, only=self.only, without=self.without)


class PartConfig(SubsetConfig):
    """A part of a stage's mixture: a subset of a dataset, how often an epoch repeats it, and how it is augmented.

    Attributes:
        repeats: how often an epoch contains each sample.
        min_log2_scale, max_log2_scale: images are scaled by 2 to the power of a uniform draw between them.
        hflip, vflip: probabilities of mirroring left-right and upside down.
    """

    repeats: PositiveInt = 1
    min_log2_scale: float = 0.0
    max_log2_scale: float = 0.0
    hflip: float = Field(default=0.0, ge=0, le=1)
    vflip: float = Field(default=0.0, ge=0, le=1)

    @pydantic.model_validator(mode="after")
    def _scales_in_order(self) -> Self:
        if self.min_log2_scale > self.max_log2_scale:
            raise ValueError(f"min_log2_scale {self.min_log2_scale} is above max_log2_scale {self.max_log2_scale}")
        return self

    def build(self, manifest: Manifest, crop: tuple[int, int]) -> MixturePart:
        """The part, its samples cut to `crop` (height, width)."""
        augmentation = AugmentConfig(
            crop=crop,
            min_log2_scale=self.min_log2_scale,
            max_log2_scale=self.max_log2_scale,
            hflip=self.hflip,
            vflip=self.vflip,
        )
        return MixturePart(manifest, self.subset, self.repeats, augmentation, self.only, self.without)


class SetConfig(SubsetConfig):
    """A validation set.

    Attributes:
        limit: only its first samples; None: all.
    """

    limit: PositiveInt | None = None

    @property
    def name(self) -> str:
        """The name of the set in metrics, such as "sintel/training-clean"."""
        return f"{self.data}/{self.subset}"

    @property
    def cut(self) -> str:
        """Which part of the subset this is, such as "only alley_*; first 8 pairs"; empty if it is the whole."""
        return part_label(self.only, self.without, self.limit)

    def indices(self, manifest: Manifest) -> npt.NDArray[np.int64]:
        return self.build(manifest).indices

    def build(
        self, manifest: Manifest, *, at_most: int | None = None, cache: SampleCache | None = None
    ) -> EvaluationSet:
        """Its samples, or the first `at_most` of them."""
        limits = [limit for limit in (self.limit, at_most) if limit is not None]
        return EvaluationSet(
            manifest, self.subset, min(limits, default=None), cache, only=self.only, without=self.without
        )


def check_given(data: Mapping[str, str | None], reads: Iterable[SubsetConfig]) -> None:
    """Raises ValueError that names every dataset that is read and has no manifest, so that one more try gives all."""
    missing = [f"data.{name}" for name in dict.fromkeys(used.data for used in reads) if data.get(name, "") is None]
    if missing:
        are, whose = ("is", "manifest's URL") if len(missing) == 1 else ("are", "manifests' URLs")
        given = " ".join(f"{name}=URL" for name in missing)
        raise ValueError(f"{', '.join(missing)} {are} not set; give the {whose}: {given}")


def check_named_once(sets: Sequence[SetConfig], whose: str) -> None:
    """Raises ValueError if a validation names a set twice, even with another limit: metrics are named by the set."""
    names = [chosen.name for chosen in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{whose}: validation names {twice[0]} twice; metrics are named by the set")


class MetricConfig(Frozen):
    """A metric of a validation set; lower is better.

    Attributes:
        data, subset: the set, which the stage must validate on.
        metric: EPE (px) of all pixels ("epe"), by speed ("s0_10", "s10_40", "s40_plus"), or of pixels that both frames
            show and the others ("matched", "unmatched": Sintel and KITTI alone); percent of pixels with an error above
            1, 3 or 5 px ("px1", "px3", "px5"), or of KITTI's outliers ("f1_all").
    """

    data: str
    subset: str
    metric: Literal["epe", "px1", "px3", "px5", "s0_10", "s10_40", "s40_plus", "matched", "unmatched", "f1_all"] = "epe"

    @property
    def set_name(self) -> str:
        return f"{self.data}/{self.subset}"

    @property
    def name(self) -> str:
        """The name it is tracked under, such as "val/sintel/training-clean/epe"."""
        return f"val/{self.set_name}/{self.metric}"


class GateConfig(MetricConfig):
    """An accuracy that a stage must reach, or the curriculum stops there.

    Attributes:
        below: the metric at the stage's end must be lower than this.
    """

    below: PositiveFloat
