"""The exceptions of the data plane that a user can cause."""


class DataError(Exception):
    """Something is wrong with the data or its storage. The message is one line: what, where, and what to do."""


class NotFoundError(DataError):
    """Storage holds no object of this name."""


class StorageOutageError(DataError):
    """Storage does not answer, or not as it should. The same request may succeed later."""


class DamagedError(DataError):
    """The content of one file is not what it should be. Other files, or the same file read again, may be intact.

    Any other DataError (an outage of storage, access denied, a wrong layout) does not mean that a file is damaged.
    """
