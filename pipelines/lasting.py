"""Where results may lie: not in the folder that Ray unpacks a job's upload into, which is gone with the cluster, and
another one after the next change of any file.
"""

from datasets_etl.storage import ObjectStore, open_store, split_url
from pipelines.errors import PipelineError

_UPLOADS = "runtime_resources/working_dir_files"


def lasting_store(place: str, named: str) -> ObjectStore:
    """The store at a URL or path that results go to.

    Args:
        place: URL or path.
        named: what the user calls it, such as "--output".

    Raises:
        PipelineError: it lies in a job's uploaded folder.
        DataError: another scheme.
    """
    store = open_store(place)
    _require_lasting(store, place, named)
    return store


def lasting_object(place: str, named: str) -> tuple[ObjectStore, str]:
    """`lasting_store` of a single result: the store it goes to, and its key there."""
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
    """Whether an absolute path or file:// URL lies in a job's uploaded folder."""
    return _UPLOADS in place
