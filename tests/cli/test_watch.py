"""ksweep watch: on a terminal of 80 x 24, in a pipe, as JSON, while files vanish: on job directories as jobs write them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ksweep.cli.jobs import watch as watching
from ksweep.cli.jobs.rows import JobRow, job_rows
from ksweep.cli.jobs.watch import jobs_table, poll_job_rows, prioritize, render_screen, show_updates
from ksweep.launch.job import Job
from ksweep.launch.rank_records import Outcome
from tests.job_directories import LABEL, ended, job, ksweep, me

ROOT = Path(__file__).parents[2]


def running(registry: Path, *labels: str, sweep: str = "tiny", phase: str = "drawing", done: int = 5, total: int = 10) -> Job:
    made = job(registry, sweep, *labels)
    made.write_heartbeat(me(phase=phase, done=done, total=total, numbers={"fve": 0.51, "fve_low": 0.49, "fve_high": 0.53}))
    return made


def printed(found: list[JobRow], width: int, height: int = 24) -> list[str]:
    out = Console(file=io.StringIO(), width=width, height=height)
    out.print(render_screen(found, width, height))
    return out.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def start(registry: Path, *words: str, stdout: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from ksweep.cli import main; main()", "watch", *words, "--registry", str(registry)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)


def test_progress_is_summed_over_ranks_and_gives_the_time_that_is_left(registry: Path) -> None:
    made = job(registry, ranks=2)
    for rank, done in enumerate((30, 50)):
        made.write_heartbeat(me(rank, phase="drawing", done=done, total=200, rate=2.0))
    code, out = ksweep(registry, "watch", "--json", "--once")
    [line] = [json.loads(text) for text in out.splitlines()]
    # 200 - 80 left at 4 a second
    assert code == 0 and (line["done"], line["total"], line["per_second"], line["seconds_left"]) == (80, 200, 4.0, 30.0)
    assert line["state"] == "running" and line["cells"] == LABEL


def test_a_row_fits_eighty_columns_and_tells_percent_and_the_fve_so_far(registry: Path) -> None:
    out = Console(file=io.StringIO(), width=80)
    out.print(
        jobs_table(job_rows([running(registry, "a label that is far longer than there is room for on a screen of eighty")]), 80)
    )
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "FVE 0.510" in text and "drawing 50%" in text and "running" in text


def test_a_long_reason_takes_no_room_from_the_other_columns(registry: Path) -> None:
    bad = ended(registry, "failed", kind="bug", message="word " * 100)
    [_, _, row] = printed(job_rows([bad]), 80)
    assert row.startswith(bad.id[-6:]) and LABEL in row and "failed" in row and "bug: word" in row and len(row) <= 80


def test_a_wide_terminal_shows_counts_rate_and_interval(registry: Path) -> None:
    text = "\n".join(printed(job_rows([running(registry)]), 180))
    assert "5/10" in text and "[0.49, 0.53] so far (K=1)" in text


def test_a_job_of_several_cells_shows_the_one_it_is_at(registry: Path) -> None:
    text = "\n".join(printed(job_rows([running(registry, "a", "b", "c", phase="b: drawing")]), 80))
    assert "2/3 b" in text and "drawing 50%" in text and "b: drawing" not in text


@pytest.mark.parametrize("height", [6, 10, 24])
def test_a_screen_has_no_more_lines_than_the_terminal_and_leaves_nothing_uncounted(registry: Path, height: int) -> None:
    [one] = job_rows([running(registry)])
    states = ["finished"] * 20 + ["waiting"] * 9 + ["failed"] * 4 + ["running"] * 30
    found = [replace(one, job=f"j-{i:06}", state=state, reason="why") for i, state in enumerate(states)]
    shown = printed(found, 80, height)
    assert len(shown) <= height - 1  # the cursor has a line of its own
    assert "63 jobs: 30 running, 4 failed, 9 waiting, 20 finished" in shown[0]
    listed = sum(bool(re.match(r"\d{6} ", line)) for line in shown)
    assert listed + sum(map(int, re.findall(r"(\d+) [a-z]+", shown[-1].removeprefix("and ")))) == 63
    if height > 6:
        assert any(" failed " in line for line in shown[1:-1]), "failures are shown however many jobs run"


def test_prioritize_keeps_the_order_of_interest(registry: Path) -> None:
    [one] = job_rows([running(registry)])
    found = [replace(one, job=str(i), state=s) for i, s in enumerate(["finished", "waiting", "failed", "running"])]
    assert [line.state for line in prioritize(found, 4)] == ["running", "failed", "waiting", "finished"]
    assert [line.state for line in prioritize(found, 2)] == ["running", "failed"]


class Screen:
    """A terminal that knows what a changing table needs: lines, cursor up, erase a line."""

    def __init__(self, height: int) -> None:
        self.rows, self.row, self.column, self.height = [""] * height, 0, 0, height
        self.lost: list[str] = []

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            self._one(part)

    def _one(self, part: str) -> None:
        if part == "\n":
            if self.row == self.height - 1:
                self.lost.append(self.rows.pop(0))
                self.rows.append("")
            else:
                self.row += 1
        elif part == "\r":
            self.column = 0
        elif part.startswith("\x1b"):
            count = int(re.sub(r"\D", "", part) or 1)
            if part.endswith("A"):
                self.row = max(0, self.row - count)
            elif part.endswith("K"):
                self.rows[self.row] = ""
        else:
            line = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = line[: self.column] + part + line[self.column + len(part) :]
            self.column += len(part)


def read_until(master: int, seen: Screen, *wanted: str, times: int = 1) -> None:
    """Reads until each is on the screen in so many rows: a screen comes in pieces, its headline first."""
    deadline = time.monotonic() + 240
    while any(sum(one in row for row in seen.rows) < times for one in wanted):
        assert time.monotonic() < deadline, "\n".join(seen.rows)
        seen.write(os.read(master, 65_536).decode())


@pytest.mark.slow
def test_watch_on_a_terminal_of_80_by_24_stays_on_it_until_the_last_job_has_ended(registry: Path) -> None:
    at_work = [running(registry, f"T={i}", phase=f"T={i}: drawing") for i in range(12)]
    for i in range(25):
        ended(registry, "finished", f"done {i}")
    ended(registry, "failed", "broken", kind="bug", message="KeyError: 'x'")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = start(registry, "tiny", stdout=slave)
    os.close(slave)
    seen = Screen(24)
    try:
        read_until(master, seen, "12 running, 1 failed, 25 finished", "bug: KeyError", "and ")
        read_until(master, seen, "drawing 50%", times=12)
        assert any(row.startswith("and ") and row.rstrip().endswith("finished") for row in seen.rows)
        assert max(map(len, seen.rows)) <= 80
        for one in at_work[:11]:
            one.write_outcome(Outcome(rank=0, status="finished"))
        read_until(master, seen, "1 running, 1 failed, 36 finished")
        at_work[11].write_outcome(Outcome(rank=0, status="finished"))
        read_until(master, seen, "tiny, 38 jobs: 1 failed, 37 finished")
        assert process.wait(240) == 1, "a job of the sweep failed"
    finally:
        process.kill()
    assert not any("jobs:" in row for row in seen.lost), "nothing of an older state has scrolled out of the screen"
    assert sum("jobs:" in row for row in seen.rows) == 1


@pytest.mark.slow
def test_watch_ends_quietly_when_its_reader_goes(registry: Path) -> None:
    running(registry)
    reading, writing = os.pipe()
    process = start(registry, stdout=writing)
    os.close(writing)
    assert b": running drawing 5/10" in os.read(reading, 4096)
    os.close(reading)
    assert process.wait(240) == 0 and process.stderr is not None and process.stderr.read() == ""


@pytest.mark.slow
def test_watch_that_is_interrupted_says_that_the_jobs_go_on(registry: Path) -> None:
    """Ctrl-C as a terminal sends it: to the process group in its foreground."""
    one = running(registry)
    master, slave = pty.openpty()
    command = [sys.executable, "-c", "from ksweep.cli import main; main()", "watch", "--registry", str(registry)]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        preexec_fn=lambda: (signal.signal(signal.SIGINT, signal.default_int_handler), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    os.close(slave)
    try:
        read_until(master, Screen(24), "1 running")
        os.write(master, b"\x03")
        assert process.wait(240) == 130
    finally:
        process.kill()
    assert process.stderr is not None
    assert process.stderr.read() == "no longer watching: the jobs go on\n" and not one.cancel_requested()


def test_watch_in_a_pipe_says_each_change_once_and_ends_with_the_last_job(
    registry: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REFRESH_SECONDS", 0.0)
    one = running(registry)
    updates = poll_job_rows(registry, "tiny")
    seen = [next(updates), next(updates)]
    one.write_outcome(Outcome(rank=0, status="finished"))
    seen += list(updates)
    assert [found[0].state for found in seen] == ["running", "running", "finished"]
    show_updates(iter(seen), Console(file=io.StringIO()))
    assert [line.split(": ")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == ["running", "finished"]


def test_watch_as_json_is_an_object_at_each_change(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [one] = job_rows([running(registry)])
    seen = [[one], [replace(one, done=6)], [replace(one, state="finished")]]
    watching.print_changes(iter(seen), as_json=True)
    assert [json.loads(text)["state"] for text in capsys.readouterr().out.splitlines()] == ["running", "finished"]


def test_watch_of_a_sweep_takes_the_newest_job_of_each_cell(registry: Path) -> None:
    jobs = []
    for day, labels in (("20", ["a", "b"]), ("21", ["a"]), ("22", ["c"]), ("23", ["c"])):
        made = ended(registry, "finished", *labels)
        jobs.append(Job(made.path.rename(made.path.with_name(f"202611{day}-000000-{made.id[-6:]}"))))
    found = next(poll_job_rows(registry, "tiny"))
    assert [(line.job, line.labels) for line in found] == [(jobs[0].id, ("b",)), (jobs[1].id, ("a",)), (jobs[3].id, ("c",))]


def test_watch_without_a_name_leaves_out_what_ended_long_ago(registry: Path) -> None:
    unseen, finalized, recent = (ended(registry, "finished") for _ in range(3))
    live = running(registry)
    for one in (finalized, recent):
        one.write_note("settled", {"state": "finished", "reason": "every rank finished", "kind": ""})
    two_hours_ago = time.time() - 7200
    for path in [*unseen.path.rglob("*.json"), *finalized.path.rglob("*.json")]:
        os.utime(path, (two_hours_ago, two_hours_ago))
    assert {line.job for line in next(poll_job_rows(registry, None))} == {recent.id, live.id}


def test_watch_survives_a_torn_record_and_a_directory_that_vanishes(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "REFRESH_SECONDS", 0.0)
    torn, gone, fine = running(registry, "torn"), running(registry, "gone"), running(registry, "fine")
    for name in ("tiny", None):
        updates = poll_job_rows(registry, name)
        assert len(next(updates)) == 3
        whole = (torn.path / "attempt-000" / "rank-0.json").read_text()
        (torn.path / "attempt-000" / "rank-0.json").write_text(whole[:20])
        found = {line.job: line.state for line in next(updates)}
        assert found == {torn.id: "unknown", gone.id: "running", fine.id: "running"}
        (torn.path / "attempt-000" / "rank-0.json").write_text(whole)
        aside = gone.path.rename(registry / "aside")
        assert {line.job for line in next(updates)} == {torn.id, fine.id}
        aside.rename(gone.path)
    shutil.rmtree(registry.parent / "logs")
    assert list(updates) in ([], [[]])


def test_a_second_watcher_and_a_dead_launcher_change_nothing(registry: Path) -> None:
    one = running(registry)
    before = {p: p.stat().st_mtime_ns for p in one.path.rglob("*")}
    first, second = ksweep(registry, "watch", "--json", "--once"), ksweep(registry, "watch", "tiny", "--once")
    assert first[0] == second[0] == 0 and "running" in second[1]
    assert {p: p.stat().st_mtime_ns for p in one.path.rglob("*")} == before


def test_watch_with_nothing_to_see_says_so(registry: Path) -> None:
    assert ksweep(registry, "watch") == (0, "no jobs are running or waiting, and none has ended within the last hour\n")


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("failed", 1), ("stopped", 1)])
def test_watch_of_a_sweep_ends_with_one_where_a_job_failed(registry: Path, status: str, code: int) -> None:
    ended(registry, status)
    assert ksweep(registry, "watch", "tiny")[0] == code and ksweep(registry, "watch")[0] == 0
