"""What a watched job says: lines in a pipe, bars on a terminal, work summed over ranks."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ksweep.launch import progress as module
from ksweep.launch.progress import ProgressDisplay
from ksweep.launch.rank_records import Heartbeat


class Clock:
    """Time that passes when told to; only the monotonic clock, which paces the lines."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, form: str) -> str:
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def beat(rank: int, phase: str = "drawing", done: int = 0, total: int = 100, **numbers: float) -> Heartbeat:
    return Heartbeat(
        rank=rank, pid=1, host="here", process_started=0.0, phase=phase, done=done, total=total, numbers=numbers, time=0.0
    )


def test_watch_in_a_pipe_prints_a_line_at_each_phase(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(pipe()) as watch:
        for phase in ("loading", "extracting", "drawing"):
            for done in range(100):
                watch.show(phase, done, 100)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"12:00:00 {phase} 0/100" for phase in ("loading", "extracting", "drawing")]
    assert captured.out == ""


def test_watch_in_a_pipe_prints_within_a_phase_at_most_every_fifteen_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressDisplay(pipe()) as watch:
        for second in range(61):
            clock.now = 1000.0 + second
            watch.show("drawing", second, 100)
    assert capsys.readouterr().err.splitlines() == [f"12:00:00 drawing {n}/100" for n in (0, 15, 30, 45, 60)]


def test_watch_of_a_phase_without_a_total_prints_no_count(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    ProgressDisplay(pipe()).show("job 7: starting", 0, 0)
    assert capsys.readouterr().err == "12:00:00 job 7: starting\n"


def test_watch_in_a_pipe_writes_numbers_readably_and_no_escape_codes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(pipe()) as watch:
        watch.show("drawing", 1, 2, tokens_per_second=1234.4, loss=0.12341)
    err = capsys.readouterr().err
    assert err == "12:00:00 drawing 1/2 tokens per second 1,234 loss 0.1234\n"
    assert "\x1b" not in err


def test_watch_sums_work_and_rates_over_ranks_in_the_phase_of_rank_zero(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [
        beat(2, done=7, tokens_per_second=100.0),
        beat(0, done=10, tokens_per_second=200.0),
        beat(1, "extracting", done=50, tokens_per_second=999.0),
        beat(3, done=3),
    ]
    ProgressDisplay(pipe()).show_ranks(ranks)
    assert capsys.readouterr().err == "12:00:00 drawing 20/100 tokens per second 300\n"


def test_watch_of_ranks_that_overlap_never_shows_more_than_the_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    ProgressDisplay(pipe()).show_ranks([beat(0, done=60), beat(1, done=60)])
    assert "drawing 100/100" in capsys.readouterr().err


def test_watch_without_heartbeats_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    ProgressDisplay(pipe()).show_ranks([])
    assert capsys.readouterr().err == ""


def test_watch_on_a_terminal_shows_one_bar_for_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    with ProgressDisplay(Console(file=screen, force_terminal=True, width=120)) as watch:
        watch.show("extracting", 40, 40)
        watch.show("drawing", 3, 320, tokens_per_second=17.0)
        watch.show("drawing", 9, 320, tokens_per_second=18.0)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()[-2:]
    assert "extracting" in last[0] and "40/40" in last[0]
    assert "drawing" in last[1] and "9/320" in last[1] and "tokens per second 18" in last[1]
    assert capsys.readouterr().err == ""
