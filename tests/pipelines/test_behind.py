"""What is written beside a model."""

import threading

import pytest

from pipelines.behind import Behind

PATIENCE_S = 10.0


def test_all_is_done_at_the_end_and_no_more_than_the_threads_hold_is_under_way():
    under_way, most, done, lock = 0, 0, [], threading.Lock()
    full = threading.Barrier(3)

    def work(number: int) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        full.wait(PATIENCE_S)  # as many as there are threads are under way at once
        with lock:
            under_way -= 1
            done.append(number)

    given: list[int] = []
    with Behind(threads=3) as behind:
        for number in range(12):
            behind.do(work, number)
            given.append(number)
            assert len(given) - len(done) <= 3 + 1, "more is held than the threads work on"
    assert sorted(done) == list(range(12))
    assert most == 3


def test_an_error_comes_up_where_the_next_piece_is_given_or_at_the_end():
    def fail(text: str) -> None:
        raise ValueError(text)

    given: list[int] = []

    def give(pieces: int) -> None:
        with Behind(threads=1) as behind:
            for number in range(pieces):
                behind.do(fail, "disk full")
                given.append(number)

    with pytest.raises(ValueError, match="disk full"):
        give(5)
    assert given == [0], "the second is not taken any more"
    with pytest.raises(ValueError, match="disk full"):
        give(1)


def test_who_fails_breaks_off_nothing_that_is_under_way():
    begun, go_on, done = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        go_on.wait(PATIENCE_S)
        done.append("slow")

    def give() -> None:
        with Behind(threads=1) as behind:
            behind.do(slow)
            assert begun.wait(PATIENCE_S)
            threading.Timer(0.2, go_on.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        give()
    assert done == ["slow"]
