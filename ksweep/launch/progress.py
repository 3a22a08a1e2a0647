"""Display of jobs' progress from the heartbeats of their ranks: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ksweep.launch.rank_records import Heartbeat
from ksweep.launch.status import JobStatus
from ksweep.utils.console import console as console_of
from ksweep.utils.console import remark
from ksweep.utils.text import visible

PROGRESS_LINE_SECONDS = 15.0
"""Away from a terminal a line is printed at each new phase and then at most this often."""


class ProgressDisplay:
    """Displays (phase, done, total) as it changes; on a terminal as a bar for each phase."""

    def __init__(self, console: Console | None = None) -> None:
        """Use this console, by default standard error, so that tables on standard output can be piped."""
        self.console = console or console_of(stderr=True)
        self._bars: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        self._line = ("", 0.0)

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}", markup=False),
            )  # fmt: skip
            self._progress = Progress(*columns, console=self.console)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, phase: str, done: int, total: int, **numbers: float) -> None:
        """Display the progress of one phase."""
        phase = visible(phase)  # before the bar is laid out
        text = " ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in numbers.items())
        if self._progress is not None:
            if phase not in self._bars:
                self._bars[phase] = self._progress.add_task(phase, total=total or None, numbers=text)
            self._progress.update(self._bars[phase], completed=done, total=total or None, numbers=text)
        elif phase != self._line[0] or time.monotonic() - self._line[1] >= PROGRESS_LINE_SECONDS:
            self._line = (phase, time.monotonic())
            counted = f" {done}/{total}" if total else ""
            remark(f"{time.strftime('%H:%M:%S')} {phase}{counted} {text}".rstrip())

    def show_ranks(self, heartbeats: Iterable[Heartbeat]) -> None:
        """Display the phase of rank 0, with the work of all ranks in that phase summed."""
        beats = sorted(heartbeats, key=lambda h: h.rank)
        if not beats:
            return
        phase = beats[0].phase
        same = [b for b in beats if b.phase == phase]
        done = sum(b.done for b in same) if beats[0].total else 0
        # Rates add up; an FVE is each rank's own estimate of the same number.
        rates = {
            name: value if name.startswith("fve") else sum(b.numbers.get(name, 0.0) for b in same)
            for name, value in beats[0].numbers.items()
        }
        self.show(phase, min(done, beats[0].total), beats[0].total, **rates)

    def show_jobs(self, statuses: Mapping[str, JobStatus], beats: Mapping[str, Sequence[Heartbeat]]) -> None:
        """Display several jobs: how many are in which state, and the summed work of those that run."""
        counts = Counter(v.state for v in statuses.values())
        phases = [max(b, key=lambda h: h.time) for b in beats.values() if b]
        total, done = sum(b.total for b in phases), 0
        for ranks in beats.values():
            done += min(sum(b.done for b in ranks), max((b.total for b in ranks), default=0))
        words = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
        self.show(f"jobs: {words}" if words else "jobs: all ended", done, total)
