"""What commands say of how far they are: lines in a log, which can show no bar, and bars on a terminal."""

import io
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

import pipelines.evaluate
import pipelines.predict
import pipelines.progress
from pipelines.progress import Pace, Progress


@pytest.fixture
def clock(monkeypatch):
    """The time that `pipelines.progress` reads, to be set."""
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(pipelines.progress, "time", SimpleNamespace(monotonic=lambda: now.value))
    return now


def log() -> Console:
    return Console(file=io.StringIO(), width=40, force_terminal=False)


def shown_on(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_of(console: Console) -> list[str]:
    return shown_on(console).splitlines()


def test_a_log_gets_a_line_every_30_seconds_and_one_at_the_end(clock):
    console = log()
    with Progress(console) as progress:
        task = progress.task("kitti: verifying", at_first="kitti: indexing")
        for done, clock.value in enumerate((0.0, 10.0, 29.0, 31.0, 60.0)):
            task.show(done, 9)
        assert lines_of(console) == [
            "kitti: verifying: 0 of 9 pairs",
            "kitti: verifying: 3 of 9 pairs, 10.3 s a pair, 0:01:02 left",
        ]
    assert lines_of(console)[2:] == ["kitti: verifying: 4 of 9 pairs, 15.0 s a pair, 0:01:15 left"]


def test_many_short_tasks_share_the_30_seconds(clock):
    console = log()
    with Progress(console) as progress:
        for number in range(10):
            task = progress.counting(f"clip {number}", 2)
            for _ in range(2):
                clock.value += 2.0
                task.advance()
    assert lines_of(console) == [
        "clip 0: 0 of 2 pairs",
        "clip 7: 1 of 2 pairs, 2.0 s a pair, 0:00:02 left",
        "clip 9: 2 of 2 pairs, 2.0 s a pair",
    ]


def test_a_line_is_printed_once_and_none_follows_a_failure(clock):
    console = log()
    with Progress(console) as progress:
        progress.counting("a video", None)
    assert lines_of(console) == ["a video: 0 pairs"]

    def fail() -> None:
        with Progress(console) as progress:
            progress.counting("[red]", 5).advance()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert lines_of(console)[1:] == ["[red]: 0 of 5 pairs"]


def test_a_terminal_gets_a_bar_and_no_lines():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Progress(console) as progress:
        task = progress.counting("a [clip]", 2)
        task.advance()
        task.advance()
    shown = shown_on(console)
    assert "a [clip] " in shown
    assert "2/2" in shown
    assert "of 2 pairs" not in shown


def test_threads_lose_no_pair():
    console = log()
    with Progress(console) as progress:
        task = progress.counting("predicting", 4000)
        threads = [threading.Thread(target=lambda: [task.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert lines_of(console)[-1].startswith("predicting: 4,000 of 4,000 pairs")


def test_pace_counts_what_this_run_did():
    pace = Pace()
    assert pace.say(100, 400, 10.0) == ""
    assert pace.say(200, 400, 20.0) == "10.0 pairs/s, 0:00:20 left"
    assert pace.say(400, 400, 30.0) == "15.0 pairs/s"
    assert pace.say(500, None, 40.0) == "13.3 pairs/s"


def test_evaluate_and_predict_say_how_far_they_are_in_a_log(call, weights, manifests, frames, tmp_path):
    err = call(pipelines.evaluate, "--model", weights, "--data", f"{manifests['chairs']}#val")[2].splitlines()
    assert "evaluating: 0 of 3 pairs" in err
    assert any(line.startswith("evaluating: 3 of 3 pairs, ") for line in err)
    err = call(pipelines.predict, "--model", weights, "--output", tmp_path / "flow", *frames)[2].splitlines()
    assert f"frames: 0 of {len(frames) - 1} pairs" in err
    assert any(line.startswith(f"frames: {len(frames) - 1} of {len(frames) - 1} pairs, ") for line in err)
