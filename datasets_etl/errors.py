"""The exceptions of the data plane that a user can cause."""


class DataError(Exception):
    """Something is wrong with the data or where it lies: one line saying what, where and what to do."""


class DamagedError(DataError):
    """The content of one file is not what it should be; another file, or the same one read again, is another matter.

    A DataError that is none of these (storage out of reach, access denied) says nothing about the data.
    """
