"""What is read while what was read before is in use."""

import threading
from collections.abc import Iterator

import pytest

from datasets_etl.ahead import read_ahead

PATIENCE_S = 10.0


def test_the_next_item_is_read_while_one_is_in_use_and_none_beyond_it():
    read: list[int] = []
    arrived = [threading.Event() for _ in range(6)]

    def items() -> Iterator[int]:
        for number in range(6):
            read.append(number)
            arrived[number].set()
            yield number

    for item in read_ahead(items()):
        if item < 5:
            assert arrived[item + 1].wait(PATIENCE_S)
            assert read == list(range(item + 2))
    assert read == list(range(6))


def test_an_error_of_reading_comes_up_in_its_place():
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("torn")

    seen: list[int] = []
    with pytest.raises(OSError, match="torn"):
        seen.extend(read_ahead(items()))
    assert seen == [1, 2]
