"""The one exception of the data plane that a user can cause."""


class DataError(Exception):
    """Something is wrong with the data or where it lies: one line saying what, where and what to do."""
