"""Refuses to store results in the folder that Ray unpacks a job's upload into: it vanishes with the cluster, and any
change of the code makes it another one.
"""

from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store, split_url
from pipelines.errors import PipelineError

_UPLOADS = "runtime_resources/working_dir_files"


def lasting_store(place: str, named: str) -> ObjectStore:
    """The store for results at a URL or path.

    Args:
        place: URL or path.
        named: what the user calls it, such as "--output".

    Raises:
        PipelineError: the place is in a job's uploaded folder.
        DataError: the URL has an unknown scheme.
    """
    store = open_store(place)
    _require_lasting(store, place, named)
    return store


def lasting_object(place: str, named: str) -> tuple[ObjectStore, str]:
    """Like `lasting_store`, for a single result: the store it goes to, and its key there."""
    store, key = split_url(place)
    _require_lasting(store, place, named)
    return store, key


def _require_lasting(store: ObjectStore, place: str, named: str) -> None:
    if is_uploaded(store.url):
        raise PipelineError(
            f"{named} {place}: lies in the folder that this job was uploaded into, and would be lost with it; give an "
            "s3:// URL or an absolute path"
        )


def is_uploaded(place: str) -> bool:
    """Whether an absolute path or file:// URL is in a job's uploaded folder."""
    return _UPLOADS in place
