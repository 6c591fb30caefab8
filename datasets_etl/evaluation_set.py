"""What a model is scored on: samples of a subset in order, in full size and without augmentation."""

import copy
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from datasets_etl.cache import SampleCache
from datasets_etl.manifest import Manifest, patterns_label
from datasets_etl.reading import read_sample
from datasets_etl.samples import FlowSample


def part_label(only: Sequence[str], without: Sequence[str], limit: int | None) -> str:
    """Which part of a subset is used, for people, such as "only alley_*; first 8 pairs"; empty if it is the whole."""
    first = "" if limit is None else f"first {limit} pairs"
    return "; ".join(filter(None, [patterns_label(only, without), first]))


class EvaluationSet(Dataset[FlowSample]):
    """The samples of one subset in order, in full size and without augmentation.

    Args:
        manifest: the dataset's manifest.
        subset: the subset's name; None: all subsets.
        limit: how many samples to use, from the first on; None: all.
        cache: as for `PositionDataset`.
        only, without: choose among the samples by name, see `Manifest.select`.
    """

    def __init__(
        self,
        manifest: Manifest,
        subset: str | None,
        limit: int | None = None,
        cache: SampleCache | None = None,
        *,
        only: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> None:
        self.manifest = manifest
        self.subset = subset
        self.part = part_label(only, without, limit)
        self.indices = manifest.select(subset, only=only, without=without)[:limit]
        self._cache = cache

    @classmethod
    def by_subset(
        cls, manifest: Manifest, limit: int | None = None, *, only: Sequence[str] = (), without: Sequence[str] = ()
    ) -> list["EvaluationSet"]:
        """A set for each subset with ground truth of which the patterns leave anything, in the manifest's order.

        A pattern need not match in every one of them.
        """
        every = cls(manifest, None, only=only, without=without)
        every.part = part_label(only, without, limit)
        subsets = np.array([manifest.samples[index].subset for index in every.indices])
        sets = []
        for subset in dict.fromkeys(subsets.tolist()):
            own = copy.copy(every)
            own.subset, own.indices = subset, every.indices[subsets == subset][:limit]
            sets.append(own)
        return sets

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> FlowSample:
        return read_sample(self.manifest, int(self.indices[number]), cache=self._cache)
