"""The index of one finished version of a dataset: every shard with its hash, every sample with its position.

A manifest is immutable and named by its content: `manifest-<first 16 hex digits of its SHA-256>.json`. It holds no
time, no host and no absolute path, so the same source gives the same manifest wherever it is made.
"""

import fnmatch
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from datasets_etl.errors import DataError, NotFoundError
from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store, split_url

FORMAT_VERSION = 2

_NAME = re.compile(r"manifest-([0-9a-f]{16})\.json")


@dataclass(frozen=True)
class SampleEntry:
    """Where a sample lies: its tar members are the `length` bytes at `offset` of a shard, with the CRC-32 `crc32`.

    `invalid_pixels` counts the pixels without usable flow; it is None for a sample without any ground truth.
    """

    key: str
    subset: str
    offset: int
    length: int
    crc32: int
    height: int
    width: int
    invalid_pixels: int | None

    @property
    def name(self) -> str:
        """The key without its subset, such as "alley_1_frame_0001": Sintel's passes have the same names."""
        return self.key.removeprefix(f"{self.subset}_")


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its object's name relative to the manifest, size, SHA-256, and samples in order."""

    name: str
    bytes: int
    sha256: str
    samples: tuple[SampleEntry, ...]

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "ShardEntry":
        return cls(**{**entry, "samples": tuple(SampleEntry(**sample) for sample in entry["samples"])})


@dataclass(frozen=True)
class Manifest:
    """A dataset version.

    Attributes:
        dataset: "chairs", "things", "sintel", "kitti" or "hd1k", or the name of a dataset of one's own.
        shards: the shards in order; samples are numbered from 0 across all of them.
        quarantined: raw pairs left out because they are damaged: sample key → the reason, in one line.
        url: the absolute URL that the manifest was loaded from, so that workers in other folders find it; empty for a
            manifest that was not loaded. It is not part of the content.
    """

    dataset: str
    shards: tuple[ShardEntry, ...]
    quarantined: Mapping[str, str] = field(default_factory=dict)
    url: str = field(default="", compare=False)

    @classmethod
    def load(cls, url: str) -> "Manifest":
        """Load a manifest. Raises DataError if there is no valid one, or if its content does not match its name."""
        store, name = split_url(url)
        try:
            data = store.read(name)
        except NotFoundError as error:
            raise NotFoundError(f"no manifest: {error}; pipelines/etl.py prints the URL of the one it wrote") from error
        named = _NAME.fullmatch(name)
        if named and named[1] != hashlib.sha256(data).hexdigest()[:16]:
            raise DataError(f"{url}: damaged: its content is not what its name promises; run pipelines/etl.py again")
        try:
            content = json.loads(data)
            if content["format"] != FORMAT_VERSION:
                raise DataError(
                    f"{url}: manifest format {content['format']}, this version reads {FORMAT_VERSION}; "
                    "write the dataset again with pipelines/etl.py"
                )
            shards = tuple(ShardEntry.from_dict(entry) for entry in content["shards"])
            return cls(content["dataset"], shards, dict(content["quarantined"]), f"{store.url}/{name}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{url}: not a manifest of pipelines/etl.py ({type(error).__name__}: {error})") from error

    def to_bytes(self) -> bytes:
        """Canonical JSON, one line per shard."""
        head = json.dumps(
            {"format": FORMAT_VERSION, "dataset": self.dataset, "quarantined": dict(self.quarantined)}, sort_keys=True
        )
        shards = ",\n".join(json.dumps(asdict(shard), sort_keys=True) for shard in self.shards)
        return f'{head[:-1]}, "shards": [\n{shards}\n]}}\n'.encode()

    @property
    def has_occlusion(self) -> bool:
        """Whether the dataset says which pixels have no counterpart in the second image."""
        return self.dataset in ("sintel", "kitti")

    @functools.cached_property
    def version(self) -> str:
        """First 16 hex digits of the SHA-256 of the content."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]

    def publish(self, store: ObjectStore) -> str:
        """Write the manifest into the store of its shards, after all of them are written. Returns its URL."""
        name = f"manifest-{self.version}.json"
        store.write(name, self.to_bytes())
        return f"{store.url}/{name}"

    @functools.cached_property
    def samples(self) -> tuple[SampleEntry, ...]:
        """All samples in order."""
        return tuple(sample for shard in self.shards for sample in shard.samples)

    @functools.cached_property
    def subsets(self) -> dict[str, int]:
        """Number of samples of each subset, in order of appearance."""
        counts: dict[str, int] = {}
        for sample in self.samples:
            counts[sample.subset] = counts.get(sample.subset, 0) + 1
        return counts

    def select(
        self, subset: str | None, *, only: Sequence[str] = (), without: Sequence[str] = (), with_truth: bool = True
    ) -> npt.NDArray[np.int64]:
        """Numbers of the samples of one subset (None: all subsets), in order.

        Args:
            subset: the subset's name.
            only: patterns of samples' names (see `SampleEntry.name`), as a shell's: "alley_*". If there are any, only
                samples that match one of them are chosen.
            without: patterns of the names of samples that are left out.
            with_truth: choose only samples with ground truth.

        Raises DataError if there are none, or if a pattern matches none.
        """
        if subset is not None and subset not in self.subsets:
            raise DataError(f"{self.url}: no subset {subset!r}; it has {', '.join(self.subsets)}")
        chosen = [
            number
            for number, sample in enumerate(self.samples)
            if subset in (None, sample.subset) and not (with_truth and sample.invalid_pixels is None)
        ]
        if not chosen:
            raise DataError(
                f"{self.url}: no sample with ground truth in {subset or 'any subset'}; choose another subset"
            )
        if only or without:
            chosen = self._matching(chosen, subset, only, without)
        return np.array(chosen, dtype=np.int64)

    def which_match(self, patterns: Sequence[str], subset: str | None) -> list[str]:
        """Those of the patterns that match the name of a sample with ground truth, of one subset or (None) of any."""
        names = [self.samples[number].name for number in self.select(subset)]
        return [pattern for pattern in patterns if any(fnmatch.fnmatchcase(name, pattern) for name in names)]

    def _matching(
        self, chosen: list[int], subset: str | None, only: Sequence[str], without: Sequence[str]
    ) -> list[int]:
        """Those of the chosen samples that the patterns let through."""
        names = {number: self.samples[number].name for number in chosen}
        matched = {
            pattern: {number for number, name in names.items() if fnmatch.fnmatchcase(name, pattern)}
            for pattern in (*only, *without)
        }
        for pattern, those in matched.items():
            if not those:
                example = names[chosen[0]]
                raise DataError(
                    f"{self.url}: no sample of {subset or 'any subset'} matches {pattern!r}; "
                    f"names are such as {example}"
                )
        wanted = set().union(*(matched[pattern] for pattern in only)) if only else set(chosen)
        left = wanted.difference(*(matched[pattern] for pattern in without))
        if not left:
            raise DataError(f"{self.url}: {', '.join(without)} leaves no sample of {subset or 'any subset'}")
        return sorted(left)

    def place(self, index: int) -> tuple[ShardEntry, SampleEntry]:
        """The shard and the entry of sample number `index`."""
        shard = self.shards[int(np.searchsorted(self._ends, index, side="right"))]
        return shard, self.samples[index]

    @functools.cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum([len(shard.samples) for shard in self.shards])

    def store(self) -> ObjectStore:
        """The store that contains the shards."""
        return open_store(self.url.rpartition("/")[0])


def patterns_label(only: Sequence[str], without: Sequence[str]) -> str:
    """The patterns of a choice among samples for people, such as "only alley_*"; empty if there are none."""
    parts = [f"{word} {', '.join(chosen)}" for word, chosen in (("only", only), ("without", without)) if chosen]
    return "; ".join(parts)


def build(dataset: str, shards: Sequence[ShardEntry], quarantined: Mapping[str, str]) -> Manifest:
    """The manifest of finished shards, in the given order, and of the pairs that were left out of them."""
    keys = [sample.key for shard in shards for sample in shard.samples]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{dataset}: sample keys are not unique")
    return Manifest(dataset, tuple(shards), quarantined)
