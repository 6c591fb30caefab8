"""One sample of a manifest, as it is stored: from its shard on storage, or from this machine's cache."""

import functools

from datasets_etl.cache import SampleCache
from datasets_etl.manifest import Manifest
from datasets_etl.samples import FlowSample, decode_sample
from datasets_etl.shards import read_sample_bytes


def read_sample(
    manifest: Manifest, index: int, *, occlusion: bool = True, cache: SampleCache | None = None
) -> FlowSample:
    """Read sample number `index` of a manifest, with or without its occlusion mask.

    This takes one ranged read, unless the sample is cached. Raises DataError with the names of shard and sample.
    """
    return decoded(stored_sample(manifest, index, cache), occlusion=occlusion)


def stored_sample(manifest: Manifest, index: int, cache: SampleCache | None) -> tuple[bytes, str]:
    """A sample's bytes, and its name for error messages."""
    shard, entry = manifest.place(index)
    store = manifest.store()
    fetch = functools.partial(read_sample_bytes, store, shard, entry)
    data = fetch() if cache is None else cache.read(shard, entry, fetch)
    return data, f"{store.url}/{shard.name}: sample {entry.key}"


def decoded(stored: tuple[bytes, str], *, occlusion: bool) -> FlowSample:
    """The sample in what `stored_sample` returned. Raises DataError if it is damaged."""
    data, where = stored
    return decode_sample(data, where, occlusion=occlusion)
