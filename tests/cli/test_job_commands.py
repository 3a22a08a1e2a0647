"""ksweep why, logs, cancel, retry, and the names that jobs answer to: on job directories as jobs write them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ksweep.cli.jobs import logs as logs_module
from ksweep.cli.jobs.find import find_jobs, select_jobs
from ksweep.cli.jobs.logs import read_logs
from ksweep.cli.jobs.retry import plan_retry, run_retry
from ksweep.launch.job import Job
from ksweep.launch.rank_records import Outcome
from ksweep.registry.run_record import write_run
from ksweep.utils.errors import RequestError
from tests.job_directories import ended, job, ksweep, me
from tests.registry.landed_runs import record_of


def test_jobs_are_found_by_prefix_by_random_part_by_number_and_by_sweep(registry: Path) -> None:
    first, second = job(registry, "one"), job(registry, "two")
    second.write_note("slurm", {"id": "41_2", "folder": str(registry), "tag": "x"})
    assert find_jobs(registry, first.id) == [first] and find_jobs(registry, first.id[:-2]) == [first]
    assert find_jobs(registry, first.id[-6:]) == [first]
    assert find_jobs(registry, "41_2") == [second] and find_jobs(registry, "41") == [second]
    assert find_jobs(registry, "two") == [second] and find_jobs(registry, "tw") == [second]
    with pytest.raises(RequestError, match="give more of it"):
        find_jobs(registry, first.id[:6])
    with pytest.raises(RequestError, match="there are one, two"):
        find_jobs(registry, "three")


def test_a_number_of_slurms_names_all_elements_of_its_array(registry: Path) -> None:
    jobs = [job(registry) for _ in range(3)]
    for index, one in enumerate(jobs[:2]):
        one.write_note("slurm", {"id": f"7_{index}", "folder": str(registry), "tag": "x"})
    jobs[2].write_note("slurm", {"id": "77", "folder": str(registry), "tag": "x"})
    assert {j.id for j in find_jobs(registry, "7")} == {j.id for j in jobs[:2]}
    assert find_jobs(registry, "77") == [jobs[2]]


def test_a_cell_names_its_newest_job_and_itself(registry: Path) -> None:
    older, newer = job(registry, "tiny", "a", "b"), job(registry, "tiny", "b", "c")
    os.rename(older.path, older.path.with_name(f"20260101-000000-{older.id[-6:]}"))
    found = select_jobs(registry, "@key of b")
    assert (found.jobs, found.kind, found.keys) == ([newer], "cell", {"key of b"})
    assert [j.id[:8] for j in find_jobs(registry, "key of a")] == ["20260101"]


def test_a_run_names_the_job_that_was_submitted_before_it_ended(registry: Path) -> None:
    jobs = []
    for day in (20, 22, 24):
        made = job(registry, "tiny", "a")
        os.rename(made.path, made.path.with_name(f"202611{day}-120000-{made.id[-6:]}"))
        jobs.append(Job(made.path.with_name(f"202611{day}-120000-{made.id[-6:]}")))
    write_run(registry, record_of("20261123T000000-abc-12345678", cell_key="key of a", minutes=12 * 60, status="failed"))
    # 2026-11-23 00:00, see landed_runs: the second job had begun by then, the third not yet.
    assert find_jobs(registry, "20261123T") == [jobs[1]]
    assert find_jobs(registry, "12345678") == [jobs[1]]


def failed_job(registry: Path) -> Job:
    failed = job(registry, ranks=2, batch_size=48, resources={"mem_gb": 96, "time": "2:00:00"})
    for rank in (0, 1):
        failed.write_heartbeat(me(rank, device="H100", phase="drawing", done=3, total=8))
        outcome = Outcome(
            rank=rank, status="failed", kind="out of memory", message=f"rank {rank} is full", traceback=f"Traceback of {rank}"
        )
        failed.write_outcome(outcome)
        (failed.path / f"7_{rank}_log.err").write_text(f"line of rank {rank}\nTraceback of {rank}\n")
    failed.write_note("code", {"path": "/x", "commit": "abcdef" * 7, "diff": "/x.diff"})
    return failed


def test_why_tells_class_ranks_tracebacks_device_code_log_and_what_to_do(registry: Path) -> None:
    failed = failed_job(registry)
    code, out = ksweep(registry, "why", failed.id[:-1])
    assert code == 0
    for words in ("out of memory: rank 0 is full", "Traceback of 0", "Traceback of 1", "(H100)", "line of rank 1", "abcdefabcdef",
                  " + /x.diff", "lower resources.batch_size (now 48)", "raise resources.mem_gb (now 96)"):  # fmt: skip
        assert words in out, words
    assert out.count("Traceback of 1") == 1, "what is in the log and in the terminal record is told once"
    assert out.splitlines()[-1].startswith("next: ")
    told = json.loads(ksweep(registry, "why", failed.id, "--json")[1])
    assert (told["class"], [e["traceback"] for e in told["endings"]]) == ("out of memory", ["Traceback of 0", "Traceback of 1"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("time limit", "raise resources.time"),
        ("bad input", "correct it"),
        ("disk full", "vector_cache= to a larger disk"),
        ("disk error", "network file system that the message names"),
        ("NaN", "autoencoder.dtype=float32"),
        ("dead rank", "resources.mem_gb"),
        ("bug", "ksweep retry tiny"),
        ("node failure", "exclude: "),
        ("a class of tomorrow", "ksweep retry tiny"),
    ],
)
def test_why_says_what_to_do_about_each_class(registry: Path, kind: str, words: str) -> None:
    told = json.loads(ksweep(registry, "why", ended(registry, "failed", kind=kind, message="x").id, "--json")[1])
    assert words in told["next"] and "{" not in told["next"].replace("extra={", "")


def test_why_tells_why_each_start_ended(registry: Path) -> None:
    back = job(registry)
    back.write_heartbeat(me(phase="drawing", done=3, total=8))
    back.write_note("requeued", {"why": "preempted", "time": 0.0, "place": []}, 0)
    back.write_heartbeat(me(phase="drawing", done=5, total=8, attempt=1))
    out = ksweep(registry, "why", back.id)[1]
    assert "start 0 was requeued: preempted" in out and "start 1, rank 0" in out and "drawing 5/8" in out


@pytest.mark.slow
def test_why_of_a_run_whose_job_is_gone_is_told_by_the_registry(registry: Path) -> None:
    record = record_of(
        "20261122T120000-k-aa11bb22",
        status="failed",
        error_type="bug",
        error_message="KeyError: 'x'",
        tracebacks=("rank 0: Trace",),
    )
    write_run(registry, record)
    code, out = ksweep(registry, "why", "aa11")
    assert code == 0 and "bug: KeyError: 'x'" in out and "rank 0: Trace" in out and "job directory is gone" in out
    assert json.loads(ksweep(registry, "why", "aa11", "--json")[1])["class"] == "bug"


def test_why_of_a_job_with_a_half_written_heartbeat_says_so(registry: Path) -> None:
    torn = job(registry)
    torn.write_heartbeat(me())
    (torn.path / "attempt-000" / "rank-0.json").write_text('{"rank": 0, "pi')
    code, out = ksweep(registry, "why", torn.id)
    assert code == 0 and "unknown" in out and "cannot be read" in out


def test_logs_are_those_of_a_rank_where_one_is_select_jobs(registry: Path) -> None:
    failed = failed_job(registry)
    both = ksweep(registry, "logs", failed.id)[1]
    assert both == ("==> 7_0_log.err <==\nline of rank 0\nTraceback of 0\n==> 7_1_log.err <==\nline of rank 1\nTraceback of 1\n")
    assert ksweep(registry, "logs", failed.id, "--rank", "1")[1] == "line of rank 1\nTraceback of 1\n"


def test_logs_of_a_rank_that_wrote_nothing_name_those_that_did(registry: Path) -> None:
    assert ksweep(registry, "logs", failed_job(registry).id, "--rank", "5")[1].endswith("ranks with logs: 0, 1")


@pytest.mark.parametrize("follow", [[], ["-f"]])
def test_logs_that_are_not_there_say_why_and_exit_with_one(registry: Path, follow: list[str]) -> None:
    done = ended(registry, "finished")
    code, out = ksweep(registry, "logs", done.id, *follow)
    assert code == 1 and "has no logs" in out and str(done.path) in out and "It is finished" in out


def test_following_logs_ends_with_the_job_and_begins_again_with_a_new_start(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "LOG_POLL_SECONDS", 0.0)
    running = job(registry)
    running.write_heartbeat(me())
    log = running.path / "7_0_log.err"
    log.write_text("first\n")
    texts = read_logs(running, None, follow=True)
    assert next(texts) == "first\n"
    with log.open("a") as file:
        file.write("second ü\n")
    assert next(texts) == "second ü\n"
    log.write_text("again\n")  # Slurm writes the log of the next start over the old one
    assert next(texts) == "again\n"
    running.write_outcome(Outcome(rank=0, status="finished"))
    assert list(texts) == []


def test_cancel_asks_the_ranks_of_a_sweep_to_stop(registry: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    running, done = job(registry), ended(registry, "finished")
    running.write_heartbeat(me(pid=process.pid))
    code, out = ksweep(registry, "cancel", "tiny")
    assert code == 0 and f"cancelled: {running.id}" in out and done.id not in out and "1 job had already ended" in out
    assert process.wait(240) == -signal.SIGTERM and running.cancel_requested() and not done.cancel_requested()
    code, out = ksweep(registry, "cancel", "tiny")
    assert (code, out) == (0, "no job of tiny is live: 2 jobs had already ended\n")


def test_cancel_of_a_job_that_has_ended_says_how(registry: Path) -> None:
    done = ended(registry, "failed", kind="bug", message="x")
    assert ksweep(registry, "cancel", done.id) == (0, f"nothing to cancel: {done.id} has failed (bug: x)\n")
    assert json.loads(ksweep(registry, "cancel", done.id, "--json")[1]) == {
        "job": done.id, "cancelled": False, "state": "failed", "reason": "bug: x", "slurm": None,
    }  # fmt: skip


def test_cancel_of_a_local_job_on_another_machine_exits_with_one_and_names_it(registry: Path) -> None:
    far = job(registry)
    far.write_heartbeat(me().__class__(rank=0, pid=1, host="elsewhere", process_started=1.0))
    code, out = ksweep(registry, "cancel", far.id)
    assert code == 1 and "not cancelled" in out and "elsewhere" in out


def script(tmp_path: Path) -> dict[str, object]:
    """Where a job of this sweep came from: a command that says what it was called with."""
    text = "import sys, pathlib; pathlib.Path('said').write_text(' '.join(sys.argv[1:])); print('hello'); sys.exit(3)\n"
    (tmp_path / "experiment.py").write_text(text)
    return {"argv": ["experiment.py", "sampling.seed=1"], "directory": str(tmp_path)}


def test_retry_of_a_sweep_runs_its_own_command_with_retry(registry: Path, tmp_path: Path) -> None:
    job(registry, origin=script(tmp_path))
    assert ksweep(registry, "retry", "tiny")[0] == 3
    assert (tmp_path / "said").read_text() == "sampling.seed=1 --retry"
    os.unlink(tmp_path / "experiment.py")
    code, out = ksweep(registry, "retry", "tiny")
    assert code == 1 and "no longer exists" in out


def test_retry_does_not_run_a_command_whose_tokens_were_not_recorded(registry: Path, tmp_path: Path) -> None:
    origin = script(tmp_path) | {"argv": ["experiment.py", "text=https://***@example.com/a"]}
    job(registry, origin=origin)
    code, out = ksweep(registry, "retry", "tiny")
    assert code == 1 and "in place of ***" in out and "experiment.py text=https://***@example.com/a --retry" in out
    assert not (tmp_path / "said").exists()


def test_logs_have_each_state_of_a_progress_bar_in_a_line(registry: Path) -> None:
    failed = failed_job(registry)
    (failed.path / "7_1_log.err").write_bytes(b"1/3\r2/3\r3/3\r\nend\n")
    assert ksweep(registry, "logs", failed.id, "--rank", "1")[1] == "1/3\n2/3\n3/3\nend\n"


def test_retry_of_a_job_or_a_cell_names_its_cells(registry: Path, tmp_path: Path) -> None:
    failed = job(registry, "tiny", "a", "b", origin=script(tmp_path))
    failed.write_heartbeat(me())
    failed.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    ksweep(registry, "retry", failed.id)
    assert (tmp_path / "said").read_text() == "sampling.seed=1 --retry-cell=key of a --retry-cell=key of b"
    ksweep(registry, "retry", "key of b")
    assert (tmp_path / "said").read_text() == "sampling.seed=1 --retry-cell=key of b"


def test_retry_as_json_prints_one_object_and_nothing_of_the_command(
    registry: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the descriptors of this process, which the sweep's command inherits."""
    job(registry, origin=script(tmp_path))
    retry = plan_retry(select_jobs(registry, "tiny"))
    print(json.dumps(run_retry(retry, as_json=True)))
    out, err = capfd.readouterr()
    assert "hello" in err and (json.loads(out)["exit_code"], json.loads(out)["command"][-1]) == (3, "--retry")


@pytest.mark.parametrize(("status", "words"), [("finished", "has finished"), (None, "is still running")])
def test_retry_of_one_job_that_has_not_failed_says_so(registry: Path, tmp_path: Path, status: str | None, words: str) -> None:
    one = job(registry, origin=script(tmp_path))
    one.write_heartbeat(me())
    if status:
        one.write_outcome(Outcome(rank=0, status=status))
    code, out = ksweep(registry, "retry", one.id)
    assert code == 1 and words in out and not (tmp_path / "said").exists()


@pytest.mark.slow
def test_names_of_two_thousand_jobs_are_told_apart_within_two_seconds(registry: Path) -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(2000):
        folder = registry.parent / "logs" / f"{began + timedelta(minutes=number):%Y%m%d-%H%M%S}-{number:06x}"
        folder.mkdir(parents=True)
        cells = [{"key": f"{number:032x}", "label": "a"}]
        argument = {"sweep": f"s{number // 100:02d}", "padding": "x" * 4000}
        (folder / "job.json").write_text(json.dumps({"argument": argument, "cells": cells, "num_ranks": 1}))
        (folder / "settled.json").write_text('{"state": "finished", "reason": "every rank finished"}')
        os.utime(folder / "settled.json", (1, 1))
    ksweep(registry, "ls")  # builds the database
    for words in (["ls"], ["watch", "--once"], ["watch", "s07", "--once"], ["why", "0007cf"], ["cancel", "s19"]):
        clock = time.process_time()  # other work on the machine does not count
        code, out = ksweep(registry, *words)
        assert code == 0 and time.process_time() - clock < 2, (words, time.process_time() - clock, out)
