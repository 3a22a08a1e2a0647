"""ksweep watch, logs, why, cancel, retry: on job directories as jobs write them, through the command itself."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ksweep import jobs
from ksweep.cli import app
from ksweep.errors import RequestError
from ksweep.launch.job import Ending, Heartbeat, Job, create


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    folder = tmp_path / "registry"
    folder.mkdir()
    return folder


def job(registry: Path, sweep: str = "tiny", label: str = "temperature=0.7", ranks: int = 1, **origin: Any) -> Job:
    argument = {"sweep": sweep, "cells": [], "registry": str(registry), "origin": origin}
    return create(registry.parent / "logs", "a:b", argument, ranks, cells=[(f"key of {label}", label)])


def me(rank: int = 0, pid: int | None = None, **changes: Any) -> Heartbeat:
    """A heartbeat of this process (or another) as a rank."""
    process = psutil.Process(pid)
    return Heartbeat(rank=rank, pid=process.pid, host=socket.gethostname(), process_started=process.create_time(), **changes)


def ksweep(registry: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*words, "--registry", str(registry)])
    if isinstance(done.exception, RequestError):
        return 2, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_jobs_are_found_by_prefix_by_number_and_by_sweep(registry: Path) -> None:
    first, second = job(registry, "one"), job(registry, "two")
    second.note("slurm", {"id": "41_2", "folder": str(registry), "tag": "x"})
    assert jobs.find(registry, first.id) == [first] and jobs.find(registry, first.id[:-2]) == [first]
    assert jobs.find(registry, "41_2") == [second]
    assert jobs.find(registry, "two") == [second] and jobs.find(registry, "tw") == [second]
    with pytest.raises(RequestError, match="write more of it"):
        jobs.find(registry, first.id[:6])
    with pytest.raises(RequestError, match="there are one, two"):
        jobs.find(registry, "three")


def test_progress_is_summed_over_ranks_and_gives_the_time_that_is_left(registry: Path) -> None:
    running = job(registry, ranks=2)
    for rank, done in enumerate((30, 50)):
        running.beat(me(rank, phase="drawing", done=done, total=200, rate=2.0))
    code, out = ksweep(registry, "watch", "--json")
    [line] = [json.loads(text) for text in out.splitlines()]
    # 200 - 80 left at 4 a second
    assert code == 0 and (line["done"], line["total"], line["per_second"], line["seconds_left"]) == (80, 200, 4.0, 30.0)
    assert line["state"] == "running" and line["cells"] == "temperature=0.7"


def test_watch_fits_eighty_columns_and_tells_the_fve_so_far(registry: Path) -> None:
    running = job(registry)
    running.beat(me(phase="drawing", done=5, total=10, numbers={"fve": 0.51, "fve_low": 0.49, "fve_high": 0.53}))
    console = Console(file=io.StringIO(), width=80)
    console.print(jobs.table(jobs.lines([running]), 80))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "0.510" in text and "5/10" in text


def test_watch_in_a_pipe_says_each_change_once_and_ends_with_the_last_job(
    registry: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "REFRESH_SECONDS", 0.0)
    running = job(registry)
    running.beat(me(phase="drawing", done=1, total=2))
    updates = jobs.watch(registry, "tiny")
    seen = [next(updates), next(updates)]
    running.end(Ending(rank=0, status="finished"))
    seen += list(updates)
    assert [lines[0].state for lines in seen] == ["running", "running", "finished"]
    jobs.show(iter(seen), Console(file=io.StringIO()))
    assert [line.split(": ")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == ["running", "finished"]


def failed_job(registry: Path) -> Job:
    failed = job(registry, ranks=2)
    for rank in (0, 1):
        failed.beat(me(rank, device="H100", phase="drawing", done=3, total=8))
        ending = Ending(
            rank=rank, status="failed", kind="out of memory", message=f"rank {rank} is full", traceback=f"Traceback of {rank}"
        )
        failed.end(ending)
        (failed.path / f"7_{rank}_log.err").write_text(f"line of rank {rank}\n")
    failed.note("code", {"path": "/x", "commit": "abcdef" * 7, "diff": "/x.diff"})
    return failed


def test_why_tells_class_ranks_tracebacks_device_code_and_log(registry: Path) -> None:
    failed = failed_job(registry)
    code, out = ksweep(registry, "why", failed.id[:-1])
    assert code == 0
    for words in ("out of memory: rank 0 is full", "Traceback of 0", "Traceback of 1", "(H100)", "line of rank 1", "abcdefabcdef",
                  " + /x.diff", "ksweep retry tiny"):  # fmt: skip
        assert words in out, words
    told = json.loads(ksweep(registry, "why", failed.id, "--json")[1])
    assert (told["class"], [e["traceback"] for e in told["endings"]]) == ("out of memory", ["Traceback of 0", "Traceback of 1"])


def test_logs_are_those_of_a_rank_where_one_is_named(registry: Path) -> None:
    failed = failed_job(registry)
    assert ksweep(registry, "logs", failed.id)[1] == "line of rank 0\nline of rank 1\n"
    assert ksweep(registry, "logs", failed.id, "--rank", "1")[1] == "line of rank 1\n"


def test_following_logs_ends_with_the_job(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "REFRESH_SECONDS", 0.0)
    running = job(registry)
    running.beat(me())
    log = running.path / "7_0_log.err"
    log.write_text("first\n")
    texts = jobs.read_logs(running, None, follow=True)
    assert next(texts) == "first\n"
    with log.open("a") as file:
        file.write("second\n")
    assert next(texts) == "second\n"
    running.end(Ending(rank=0, status="finished"))
    assert list(texts) == []


def test_cancel_asks_the_ranks_of_a_sweep_to_stop(registry: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    running, done = job(registry), job(registry)
    running.beat(me(pid=process.pid))
    done.end(Ending(rank=0, status="finished"))
    code, out = ksweep(registry, "cancel", "tiny")
    assert code == 0 and running.id in out and done.id not in out
    assert process.wait(10) == -signal.SIGTERM and running.asked_to_end()
    assert "nothing of tiny is under way" in ksweep(registry, "cancel", "tiny")[1]


def test_retry_runs_the_sweeps_own_command_with_retry(registry: Path, tmp_path: Path) -> None:
    (tmp_path / "experiment.py").write_text("import sys, pathlib; pathlib.Path('said').write_text(' '.join(sys.argv[1:]))\n")
    job(registry, argv=["experiment.py", "sampling.seed=1"], directory=str(tmp_path))
    assert ksweep(registry, "retry", "tiny")[0] == 0
    assert (tmp_path / "said").read_text() == "sampling.seed=1 --retry"
    os.unlink(tmp_path / "experiment.py")
    done = CliRunner().invoke(app, ["retry", "tiny", "--registry", str(registry)])
    assert "not there any more" in str(done.exception)


def test_a_second_watcher_and_a_dead_launcher_change_nothing(registry: Path) -> None:
    running = job(registry)
    running.beat(me(phase="drawing", done=1, total=2, time=time.time()))
    before = {p: p.stat().st_mtime_ns for p in running.path.rglob("*")}
    first, second = ksweep(registry, "watch", "--json"), ksweep(registry, "watch", "tiny", "--once")
    assert first[0] == second[0] == 0 and "running" in second[1]
    assert {p: p.stat().st_mtime_ns for p in running.path.rglob("*")} == before
