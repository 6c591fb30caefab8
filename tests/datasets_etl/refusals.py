"""What a wrong input gets: a DataError of one line."""

from collections.abc import Callable

import pytest

from datasets_etl.errors import DataError


def refusal(read: Callable[[], object]) -> str:
    """The message with which `read` is refused."""
    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    return message
