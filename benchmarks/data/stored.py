"""Compare the bytes of shards with those of the raw files in them."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from benchmarks.data.raw import Raw
from datasets_etl.manifest import Manifest
from datasets_etl.shards import raw_files


def compare_stored(raws: Sequence[Raw], manifests: Mapping[str, Manifest]) -> Table:
    table = Table(title="Bytes on storage")
    for name in ("dataset", "pairs", "raw files, MiB", "shards, MiB", "stored / raw"):
        table.add_column(name, justify="left" if name == "dataset" else "right")
    for raw in raws:
        paths = {path for ref in raw.refs for path in raw_files(ref)}
        before = sum((raw.root / path).stat().st_size for path in paths) / 2**20
        after = sum(shard.bytes for shard in manifests[raw.name].shards) / 2**20
        table.add_row(raw.name, str(len(raw.refs)), f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}")
    return table
