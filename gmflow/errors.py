"""The one exception of this library that a user can cause."""


class GMFlowError(ValueError):
    """A configuration, weight file or input that the model cannot work with.

    The message is one line that names the thing, the value found and the values that would do.
    """
