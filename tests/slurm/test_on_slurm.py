"""Sweeps on a real Slurm: what a user sees, what the registry says, and that the draws are those of an undisturbed run."""

from __future__ import annotations

import getpass
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ksweep import Cell, Resources, Sweep
from ksweep.keys import cell_keys
from ksweep.launch import slurm as commands
from ksweep.launch import states, submission
from ksweep.launch.job import create
from ksweep.reconcile import book_ended
from ksweep.sweep import sweep_main
from tests.slurm.bed import ROOT, ask, command, jobs, run, slurm, texts, until

PARTS = "part-0*.parquet"


ALONE: dict[Cell, list[tuple[object, ...]]] = {}


def undisturbed(sweep: Sweep, tmp_path: Path) -> list[tuple[object, ...]]:
    """The draws of the same cell, taken in this process in another registry; once for all tests that ask."""
    if sweep.cell not in ALONE:
        other = replace(sweep, registry=str(tmp_path / "alone" / "registry"), resources=Resources(cluster="inprocess", gpus=0))
        with pytest.raises(SystemExit) as end:
            sweep_main(other, ["--no-charts"])
        assert end.value.code == 0
        ALONE[sweep.cell] = texts(other)
    return ALONE[sweep.cell]


def ksweep(sweep: Sweep, *words: str) -> str:
    """What the command of that name prints."""
    code = "from ksweep.cli import main; main()"
    command = [sys.executable, "-c", code, *words, "--registry", sweep.registry]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    return done.stdout + done.stderr


def parts(sweep: Sweep) -> int:
    return len(list(Path(sweep.registry).glob(f"draws/*/{PARTS}")))


@pytest.fixture
def long(sweep: Sweep) -> Sweep:
    """Eight units of draws, together about a quarter of a minute on one rank."""
    cell = replace(
        sweep.cell, sampling=replace(sweep.cell.sampling, num_draws=32),
        activations=replace(sweep.cell.activations, num_activations=128),
    )  # fmt: skip
    return replace(sweep, cell=cell, resources=replace(sweep.resources, batch_size=64))


def test_a_sweep_is_submitted_left_attached_to_and_shown(sweep: Sweep, tmp_path: Path) -> None:
    planned = run(sweep, "--dry-run")
    assert "missing" in planned.out and "a job: slurm: 1 CPU rank, 1:00:00" in planned.out
    # Twice at the same moment: one submits, the other finds its job.
    both = [subprocess.Popen(command(sweep), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(re.findall(r"submitted \d jobs, \d were", " ".join(said))) == [
        "submitted 0 jobs, 1 were",
        "submitted 1 jobs, 0 were",
    ]
    again = run(sweep)
    assert again.code == 0 and "submitted 0 jobs, 1 were there already" in again.out
    assert "running" in (dry := run(sweep, "--dry-run").out) or "waiting" in dry
    watched = ksweep(sweep, "watch", sweep.name)
    assert "finished" in watched, watched
    shown = run(sweep)
    assert shown.code == 0 and "K=8" in shown.out and "computed 0 of 1 cells" in shown.out
    assert len(jobs(sweep)) == 1
    assert ask(sweep, "SELECT status, num_ranks FROM runs") == [("finished", 1)]
    assert texts(sweep) == undisturbed(sweep, tmp_path)


def test_two_nodes_of_two_tasks_are_one_process_group(sweep: Sweep, tmp_path: Path) -> None:
    done = run(replace(sweep, resources=replace(sweep.resources, nodes=2, tasks=2)), "--wait")
    assert done.code == 0, done.err
    assert ask(sweep, "SELECT num_ranks FROM runs") == [(4,)]
    assert len({h.host for h in jobs(sweep)[0].heartbeats()}) == 2
    assert texts(sweep) == undisturbed(sweep, tmp_path)


def test_a_preempted_sweep_comes_back_and_ends_with_the_draws_of_an_undisturbed_one(long: Sweep, tmp_path: Path) -> None:
    low = replace(long, resources=replace(long.resources, qos="preemptable", extra={"nodelist": "gpu3", "exclusive": True}))
    assert run(low).code == 0
    until("two units", lambda: parts(low) >= 2)
    high = ["sbatch", "--wait", "--qos=urgent", "--nodelist=gpu3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(high, check=True, capture_output=True, timeout=120)
    done = run(low, "--wait")
    assert done.code == 0, done.err
    [job] = jobs(low)
    assert job.attempt() == 1 and (job.noted("requeued", 0) or {})["why"] == "preempted"
    [(status, sampled, reused)] = ask(low, "SELECT status, num_draws_sampled, num_draws_reused FROM runs")
    assert status == "finished" and reused > 0 and sampled + reused == 128 * 32
    told = ask(low, "SELECT start, host, status, error_class, requeued, total > 0, began < ended FROM attempts ORDER BY start")
    assert told[0] == (0, "gpu3", "stopped", "preempted", "preempted", True, True)
    assert told[1][:5] == (1, "gpu3", "finished", None, None)
    assert texts(low) == undisturbed(low, tmp_path)


def test_a_job_on_four_tasks_is_finished_on_two(long: Sweep, tmp_path: Path) -> None:
    four = replace(long, resources=replace(long.resources, tasks=4))
    assert run(four).code == 0
    until("a unit", lambda: parts(four) >= 1)
    slurm("scancel", str(jobs(four)[0].slurm_id()))
    until("its end", lambda: states.verdict(jobs(four)[0]).state not in states.LIVE)
    done = run(replace(long, resources=replace(long.resources, tasks=2)), "--wait")
    assert done.code == 0, done.err
    rows = ask(long, "SELECT status, error_class, num_ranks, num_draws_reused > 0 FROM runs ORDER BY finished")
    assert rows == [("stopped", "cancelled", 4, None), ("finished", None, 2, True)]
    assert texts(long) == undisturbed(long, tmp_path)


def test_failed_cells_are_reported_and_run_again_only_when_asked(sweep: Sweep) -> None:
    # The declared GPUs have nothing behind them: every start fails, and says so.
    broken = replace(sweep, resources=replace(sweep.resources, gpus=1))
    failed = run(broken, "--wait")
    assert failed.code == 1 and "torch sees 0" in failed.err
    again = run(broken)
    assert again.code == 1 and "--retry" in again.err and len(jobs(sweep)) == 1
    [(kind, message, words, host)] = ask(sweep, "SELECT error_class, error_message, tracebacks, host FROM runs")
    assert "torch sees 0" in message and any("_device" in w for w in words) and host.startswith("gpu") and kind == "failure"
    [(ranks,)] = ask(sweep, "SELECT ranks FROM v_failures")
    assert [(r["host"], r["error_class"], "_device" in r["traceback"]) for r in ranks] == [(host, "failure", True)]
    assert run(sweep, "--retry", "--wait").code == 0
    assert ask(sweep, "SELECT status FROM runs ORDER BY finished") == [("failed",), ("finished",)]
    ends = "SELECT r.status, a.status FROM runs AS r JOIN attempts AS a USING (job, start) ORDER BY r.finished"
    assert ask(sweep, ends) == [("failed", "failed"), ("finished", "finished")]


def test_every_rank_of_a_failed_job_is_in_the_registry_with_words_of_its_own(sweep: Sweep, tmp_path: Path) -> None:
    key = cell_keys(sweep.cell).cell
    (tmp_path / "registry").mkdir()
    argument = {"sweep": "tiny", "cells": [asdict(sweep.cell)], "registry": sweep.registry, "resources": {}, "origin": {}}
    job = create(tmp_path / "logs", "tests.slurm.entries:two_ranks_raise", argument, 2, cluster="slurm", cells=[(key, "tiny")])
    submission.submit(tmp_path / "logs", [job], replace(sweep.resources, nodes=2), "both")
    until("its end", lambda: states.verdict(job).state not in states.LIVE)
    book_ended(tmp_path / "logs")
    rows = ask(sweep, "SELECT rank, slurm_id, host, status, error_class, message, last_log_lines, traceback FROM attempts")
    for rank, number, host, status, kind, message, lines, traceback in sorted(rows):
        assert (number, status, kind) == (job.slurm_id(), "failed", "bug") and host.startswith("gpu")
        assert message == f"ValueError: what only rank {rank} knows" and message in traceback
        assert f"rank {rank} ksweep.launch.worker: failed" in lines and "(its traceback)" in lines
    assert len({host for _, _, host, *_ in rows}) == 2
    [(words, kind)] = ask(sweep, "SELECT tracebacks, error_class FROM runs")
    assert len(words) == 2 and kind == "bug"


WRAPPER = """#!/bin/bash
case "$*" in *--test-only*) exec {sbatch} "$@";; esac
{before}
{sbatch} "$@" >{log}
sleep 1000
"""


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_launcher_killed_around_sbatch_leaves_no_orphan(sweep: Sweep, tmp_path: Path, handed_over: bool) -> None:
    folder, log = tmp_path / "bin", tmp_path / "sbatch.out"
    folder.mkdir()
    sbatch = slurm("which", "sbatch").strip()
    (folder / "sbatch").write_text(
        WRAPPER.format(sbatch=sbatch, log=log, before="" if handed_over else f"touch {log}; sleep 1000")
    )
    (folder / "sbatch").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    launcher = subprocess.Popen(command(sweep), env={**os.environ, "PATH": path}, start_new_session=True)
    until("sbatch", lambda: log.exists() and (not handed_over or log.read_text()))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert jobs(sweep)[0].noted("slurm") is None
    again = run(sweep, "--wait")
    assert again.code == 0, again.err
    words = "found again as job" if handed_over else "Slurm knows nothing of it"
    assert words in again.err
    assert ask(sweep, "SELECT status FROM runs") == [("finished",)]
    assert len(jobs(sweep)) == (1 if handed_over else 2)
    ours = {f"{submission.TAG}{p.name}" for p in tmp_path.glob("logs/submissions/*")}
    assert not [e for e in commands.queue(user=getpass.getuser()) if e.tag in ours]


def test_a_job_runs_the_code_as_it_was_submitted(tmp_path: Path, bed: object) -> None:
    from ksweep.launch import snapshot

    tree = tmp_path / "tree"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
    added = tree / "ksweep" / "added_later.py"
    added.write_text("def say(argument, ranks):\n    return 'as submitted'\n")
    code = snapshot.take(tmp_path / "logs", tree / "ksweep")
    assert code is not None and code.diff is not None and "as submitted" in code.diff.read_text()
    job = create(tmp_path / "logs", "ksweep.added_later:say", {}, 1, cluster="slurm")
    resources = Resources(cluster="slurm", gpus=0, mem_gb=1, time=10, setup="sleep 3")
    submission.submit(tmp_path / "logs", [job], resources, "code", code.path)
    added.write_text("def say(argument, ranks):\n    return 'changed since'\n")
    until("its end", lambda: states.verdict(job).state not in states.LIVE)
    assert [e.result for e in job.endings()] == ["as submitted"], job.log_tail()
    assert time.time() - job.started() < 100
