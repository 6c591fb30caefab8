"""What a person sees of a curriculum that runs: the live table, and the same as lines."""

import pytest
from rich.console import Console

from pipelines.training.display import LOG_WIDTH, Display
from pipelines.training.feed import Record

STAGES = [("chairs", 100), ("things", 2000)]


def rows(display: Display) -> list[list[str]]:
    """The table's cells, as they are drawn."""
    console = Console(width=LOG_WIDTH, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(display._table())
    lines = [line for line in console.export_text().splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]


def test_the_table_tells_state_figures_and_the_time_left():
    display = Display("curriculum small", STAGES, ["sintel/training-final"])
    assert rows(display) == [
        ["stage", "state", "step", "loss", "EPE", "EPE sintel/training-final", "samples/s", "ETA"],
        ["chairs", "waiting", "0/100", "", "", "", "", ""],
        ["things", "waiting", "0/2,000", "", "", "", "", ""],
    ]
    display.state("chairs", "finished")
    display.record("things", Record(500, {"train/loss": 2.5, "train/epe": 1.25, "time/samples_per_s": 16.0}))
    display.record("things", Record(1000, {"time/step_s": 0.5}))
    display.record("things", Record(1000, {"val/sintel/training-final/epe": 3.75}))
    assert rows(display)[1:] == [
        ["chairs", "finished", "100/100", "", "", "", "", ""],
        ["things", "training", "1,000/2,000", "2.500", "1.250", "3.750", "16.0", "0:08:20"],
    ]


def test_workers_that_are_waited_for_do_not_train(capsys: pytest.CaptureFixture[str]):
    """A machine is lost, and there is none instead: the step stays, and no time is promised."""
    display = Display("curriculum small", STAGES, [])
    display.record("chairs", Record(40, {"time/step_s": 0.5}))
    display.record("chairs", Record(0, line="stage=chairs waits for room: 2 workers need a GPU each", waiting=True))
    assert rows(display)[1] == ["chairs", "waiting for workers", "40/100", "", "", "", ""]
    assert "waits for room: 2 workers need a GPU each" in capsys.readouterr().out
    display.record("chairs", Record(41))
    assert rows(display)[1] == ["chairs", "training", "41/100", "", "", "", "0:00:30"]
