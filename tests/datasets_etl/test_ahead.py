"""What is read while what was read before is in use."""

import threading
from collections.abc import Iterator

import pytest

from datasets_etl.ahead import read_ahead

PATIENCE_S = 10.0


@pytest.mark.parametrize("held", [1, 2])
def test_the_next_items_are_read_while_one_is_in_use_and_none_beyond_them(held):
    read: list[int] = []
    arrived = [threading.Event() for _ in range(6)]

    def items() -> Iterator[int]:
        for number in range(6):
            read.append(number)
            arrived[number].set()
            yield number

    for item in read_ahead(items(), held):
        newest = min(item + held, 5)
        assert arrived[newest].wait(PATIENCE_S)
        assert read == list(range(newest + 1))
    assert read == list(range(6))


def test_an_error_of_reading_comes_up_in_its_place():
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("torn")

    seen: list[int] = []
    with pytest.raises(OSError, match="torn"):
        seen.extend(read_ahead(items()))
    assert seen == [1, 2]


def test_who_leaves_early_waits_for_nothing_that_is_being_read():
    begun, left, waited = threading.Event(), threading.Event(), []

    def items() -> Iterator[int]:
        yield 1
        begun.set()
        waited.append(left.wait(PATIENCE_S))
        yield 2

    ahead = read_ahead(items(), held=2)
    assert next(ahead) == 1
    assert begun.wait(PATIENCE_S)
    ahead.close()  # type: ignore[attr-defined]  # it is a generator
    assert waited == [], "it was waited for"
    left.set()
