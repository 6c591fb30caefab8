"""The five raw datasets in their official layouts, and lists of pairs (`listed`) for any other."""

from datasets_etl.sources import chairs, hd1k, kitti, sintel, things
from datasets_etl.sources.ref import SampleRef, Source, SourceTree

SOURCES: dict[str, Source] = {
    "chairs": chairs.index,
    "things": things.index,
    "sintel": sintel.index,
    "kitti": kitti.index,
    "hd1k": hd1k.index,
}

EXPECTED_COUNTS: dict[str, dict[str, int]] = {
    "chairs": {"train": 22232, "val": 640},
    "things": {
        "train-clean": 40302,
        "train-final": 40302,
        "val-clean": 1024,
        "val-final": 1024,
        "test-clean": 6842,
        "test-final": 6842,
    },
    "sintel": {"training-clean": 1041, "training-final": 1041, "test-clean": 552, "test-final": 552},
    "kitti": {"training": 200, "testing": 200},
    "hd1k": {"training": 1047},
}
"""Pairs in each subset of a complete download. Any other count deserves a message: an excerpt, or a broken copy."""

__all__ = ["EXPECTED_COUNTS", "SOURCES", "SampleRef", "Source", "SourceTree"]
