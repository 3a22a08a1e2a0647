"""Sweeps on a real Slurm: what a user sees, what the registry says, and that the draws are those of an undisturbed run."""

from __future__ import annotations

import getpass
import os
import re
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from ksweep.evaluation.identity import cell_keys
from ksweep.launch import status
from ksweep.launch.job import create_job
from ksweep.launch.reconcile import finalize_ended_jobs
from ksweep.launch.slurm import commands, sbatch
from tests.slurm.bed import Place, ended, only, process_of, slurm, until

pytestmark = [pytest.mark.beside, pytest.mark.timeout(600)]  # on a machine that is busy with other things as well


def test_a_time_limit_reached_twice_ends_in_a_third_start(place: Place) -> None:
    """A time limit reached twice, finished on the third start"""
    # A start is told to stop 60 s before the limit of 120 s; Slurm looks twice a minute, so that comes after 54 to 67 s. (With a
    # limit of one minute it comes after 24 to 37 s, and on a busy machine the models are not loaded by then.) Two starts manage
    # at most 44 units of 3 s, the third has only seconds to go.
    sweep = place.long(50, 3.0, starts=2, time=2)
    assert place.run(sweep).code == 0
    until("its end", lambda: status.job_status(place.jobs()[0]).state == "finished", 560)
    done = place.run(sweep)
    assert done.code == 0 and "computed 0 of 1 cells" in done.out
    [job] = place.jobs()
    assert job.attempt() >= 2
    assert [(job.read_note("requeued", n) or {}).get("why") for n in range(job.attempt())] == ["time limit"] * job.attempt()
    [(run_status, sampled, reused)] = place.ask("SELECT status, num_draws_sampled, num_draws_reused FROM runs")
    assert run_status == "finished" and reused > 0 and sampled + reused == 50 * 64
    assert place.texts() == place.undisturbed(sweep)


def test_a_job_whose_nodes_daemon_died_runs_once_elsewhere_and_the_old_start_ends_itself(place: Place) -> None:
    """The slurmd of a node killed: its processes live on, Slurm starts the job again elsewhere"""
    sweep = place.long(50, 1.0, extra=only("gpu[3,7]"))
    assert place.run(sweep).code == 0
    until("a unit", lambda: place.parts() >= 1)
    [job] = place.jobs()
    assert job.heartbeats()[0].host == "gpu3"
    try:
        place.daemons("kill-slurmd", "gpu3")
        until("its end", lambda: status.job_status(job).state == "finished", 230)
    finally:
        place.bed.script("boot", "gpu3")
    done = place.run(sweep)
    assert done.code == 0 and job.attempt() == 1
    assert [h.host for h in job.heartbeats(0)] == ["gpu3"] and job.heartbeats(1)[0].host == "gpu7"
    # Its process lived on without slurmd; it has seen the newer start, and said nothing about an end of the job.
    assert not job.outcomes(0) and job.heartbeats(0)[0].time < job.outcomes(1)[0].time
    assert place.ask("SELECT status, host, num_draws_reused > 64 FROM runs") == [("finished", "gpu7", True)]
    assert place.texts() == place.undisturbed(sweep)


def test_an_array_of_twelve_runs_three_at_a_time_in_two_arrays(place: Place) -> None:
    """An array of 12 cells with max_parallel_jobs=3"""
    sweep = place.with_(cells_per_job=1, max_parallel_jobs=3)
    done = place.run(
        sweep,
        f"sampling.seed={list(range(12))}".replace(" ", ""),
        "sampling.num_draws=2",
        "activations.num_activations=4",
        "scoring.baseline=distance_from_mean",  # these four are of one document
        "--wait",
    )
    assert done.code == 0, done.err
    numbers = [job.slurm_id() or "" for job in place.jobs()]
    found = sorted(int(n.partition("_")[2]) for n in numbers)
    assert found == sorted([*range(9), *range(3)]) and len({n.partition("_")[0] for n in numbers}) == 2  # MaxArraySize is 9
    moments = place.ask("SELECT started, finished FROM runs WHERE status = 'finished'")
    assert len(moments) == 12
    assert max(sum(begun <= t < end for begun, end in moments) for t, _ in moments) <= 3


def test_a_preempted_sweep_comes_back_and_ends_with_the_draws_of_an_undisturbed_one(place: Place) -> None:
    """Preemption by a job of a higher QOS: requeued, resumed, identical"""
    # Ten minutes or less: submitit would take every signal of such a job for its time limit.
    sweep = place.long(16, 1.0, time=5, qos="preemptable", exclusive=True, extra=only("gpu4"))
    assert place.run(sweep).code == 0
    until("two units", lambda: place.parts() >= 2)
    place.slurm("sbatch", "--wait", "--qos=urgent", "--nodelist=gpu4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    done = place.run(sweep, "--wait")
    assert done.code == 0, done.err
    [job] = place.jobs()
    assert job.attempt() == 1 and (job.read_note("requeued", 0) or {})["why"] == "preempted"
    [(run_status, sampled, reused)] = place.ask("SELECT status, num_draws_sampled, num_draws_reused FROM runs")
    assert run_status == "finished" and reused > 0 and sampled + reused == 16 * 64
    told = place.ask("SELECT start, host, status, error_class, requeued, total > 0, began < ended FROM attempts ORDER BY start")
    assert told[0] == (0, "gpu4", "stopped", "preempted", "preempted", True, True)
    assert told[1][:5] == (1, "gpu4", "finished", None, None)
    assert place.texts() == place.undisturbed(sweep)


def test_a_sweep_preempted_for_good_is_submitted_again_by_the_next_command(place: Place) -> None:
    """Preemption in CANCEL mode: killed, and submitted again by the next plain command"""
    sweep = place.long(16, 1.0, qos="scavenger", exclusive=True, extra=only("gpu5"))
    assert place.run(sweep).code == 0
    until("two units", lambda: place.parts() >= 2)
    place.slurm("sbatch", "--wait", "--qos=urgent", "--nodelist=gpu5", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    first = place.jobs()[0]
    place.slurm("sacct", "-X", "-n", "-o", "JobID,State", "-j", str(first.slurm_id()))
    ended(first)  # until its last heartbeat is old a command takes it for running, and attaches to it
    done = place.run(sweep, "--wait")
    assert done.code == 0, done.err
    assert [job.attempt() for job in place.jobs()] == [0, 0]
    rows = place.ask("SELECT status, error_class, num_draws_reused > 0 FROM runs ORDER BY finished")
    assert rows == [("stopped", "preempted", None), ("finished", None, True)]
    assert place.texts() == place.undisturbed(sweep)


def test_a_job_on_four_tasks_is_finished_on_two(place: Place) -> None:
    """scancel of a job on 4 tasks; what is missing is done on 2"""
    four = place.long(16, 1.0, tasks=4)
    assert place.run(four).code == 0
    until("a unit", lambda: place.parts() >= 1)
    place.slurm("scancel", str(place.jobs()[0].slurm_id()))
    assert ended(place.jobs()[0]).state == "stopped"
    # Where a rank dies before it listens to signals, Slurm kills the others before they have said anything.
    assert {e.status for e in place.jobs()[0].outcomes()} <= {"stopped"}
    done = place.run(place.long(16, 1.0, tasks=2), "--wait")
    assert done.code == 0, done.err
    rows = place.ask("SELECT status, error_class, num_ranks, num_draws_reused > 0 FROM runs ORDER BY finished")
    assert rows == [("stopped", "cancelled", 4, None), ("finished", None, 2, True)]
    assert place.texts() == place.undisturbed(four)


def test_a_rank_that_is_shot_ends_its_job_at_once_and_the_reason_is_known(place: Place) -> None:
    """kill -9 of one rank of two"""
    sweep = place.long(16, 1.0, tasks=2)
    waiting = place.begin(sweep, "--wait")
    until("a unit", lambda: place.parts() >= 1)
    [job] = place.jobs()
    shot = time.time()
    process_of(job, 1).kill()
    place.story.did("# kill -9 of rank 1, in the meantime")
    failed = place.finish(waiting, sweep, "--wait")
    assert failed.code == 1 and "rank 1" in failed.err and "died without an outcome" in failed.err
    assert max(e.time for e in job.outcomes()) - shot < 20
    until("an empty queue", lambda: not commands.squeue([str(job.slurm_id())]), 20)
    [(run_status, kind, host)] = place.ask("SELECT status, error_class, host FROM runs")
    assert (run_status, kind) == ("failed", "dead rank") and host.startswith("gpu")
    again = place.run(sweep, "--retry", "--wait")
    assert again.code == 0, again.err
    assert place.ask("SELECT status, num_draws_reused > 0 FROM runs ORDER BY finished")[1:] == [("finished", True)]
    assert place.texts() == place.undisturbed(sweep)


def test_a_cancelled_job_and_a_cancelled_waiting_element_are_submitted_again(place: Place) -> None:
    """scancel of a running job and of an element of its array that still waits"""
    sweep = place.long(6, 1.0, cells_per_job=1, max_parallel_jobs=1)
    assert place.run(sweep, "sampling.seed=[0,1]").code == 0
    until("a unit", lambda: place.parts() >= 1)
    first, second = sorted(place.jobs(), key=lambda job: str(job.slurm_id()))
    assert [entry.state for entry in commands.squeue([str(second.slurm_id())])] == ["PENDING"]
    place.slurm("scancel", str(second.slurm_id()))
    place.slurm("scancel", str(first.slurm_id()))
    ended(first)
    again = place.run(sweep, "sampling.seed=[0,1]", "--wait")
    assert again.code == 0, again.err
    assert first.read_note("requeued", 0) is None
    rows = place.ask("SELECT status, count(*) FROM runs GROUP BY ALL ORDER BY ALL")
    assert rows == [("finished", 2), ("stopped", 2)] and len(place.jobs()) == 4


def test_one_gpu_and_four_tasks_finish(place: Place) -> None:
    """A job with 1 GPU, and one with 4 tasks"""
    # The declared GPUs have nothing behind them: the rank has one, and computes on the CPU.
    one = place.with_(extra=only("gpu[1-2]") | {"gres": "gpu:1"})
    done = place.run(one, "--wait")
    assert done.code == 0, done.err
    place.slurm("sacct", "-X", "-n", "-o", "JobID,State,AllocTRES%60", "-j", str(place.jobs()[0].slurm_id()))
    four = place.run(place.with_(tasks=4), "sampling.seed=1", "--wait")
    assert four.code == 0, four.err
    assert place.ask("SELECT status, num_ranks FROM runs ORDER BY finished") == [("finished", 1), ("finished", 4)]


def test_two_nodes_of_two_tasks_are_one_process_group(place: Place) -> None:
    """2 nodes x 2 tasks"""
    done = place.run(place.with_(nodes=2, tasks=2), "--wait")
    assert done.code == 0, done.err
    assert place.ask("SELECT num_ranks FROM runs") == [(4,)]
    assert len({h.host for h in place.jobs()[0].heartbeats()}) == 2
    assert place.texts() == place.undisturbed(place.sweep)


def test_a_sweep_is_submitted_left_attached_to_and_shown(place: Place) -> None:
    """Submitted twice at the same moment, left, watched, shown"""
    sweep = place.sweep
    planned = place.run(sweep, "--dry-run")
    assert "missing" in planned.out and "a job: slurm: 1 CPU rank, 1:00:00" in planned.out
    # One submits, the other finds its job.
    both = [place.begin(sweep) for _ in range(2)]
    said = [place.finish(process, sweep) for process in both]
    assert [ran.code for ran in said] == [0, 0]
    assert sorted(re.findall(r"submitted \d jobs, \d were", " ".join(ran.out for ran in said))) == [
        "submitted 0 jobs, 1 were",
        "submitted 1 jobs, 0 were",
    ]
    again = place.run(sweep)
    assert again.code == 0 and "submitted 0 jobs, 1 were there already" in again.out
    assert "running" in (dry := place.run(sweep, "--dry-run").out) or "waiting" in dry
    watched = place.ksweep("watch", sweep.name)
    assert "finished" in watched, watched
    shown = place.run(sweep)
    assert shown.code == 0 and "K=8" in shown.out and "computed 0 of 1 cells" in shown.out
    assert len(place.jobs()) == 1
    assert place.ask("SELECT status, num_ranks FROM runs") == [("finished", 1)]
    assert place.texts() == place.undisturbed(sweep)


def test_failed_cells_are_reported_and_run_again_only_when_asked(place: Place) -> None:
    """A cell that fails is run again only with --retry"""
    # The declared GPUs have nothing behind them: every start fails, and says so.
    broken = place.with_(gpus=1)
    failed = place.run(broken, "--wait")
    assert failed.code == 1 and "torch sees 0" in failed.err
    again = place.run(broken)
    assert again.code == 1 and "--retry" in again.err and len(place.jobs()) == 1
    [(kind, message, words, host)] = place.ask("SELECT error_class, error_message, tracebacks, host FROM runs")
    assert "torch sees 0" in message and any("_device" in w for w in words) and host.startswith("gpu") and kind == "failure"
    [(ranks,)] = place.ask("SELECT ranks FROM v_failures")
    assert [(r["host"], r["error_class"], "_device" in r["traceback"]) for r in ranks] == [(host, "failure", True)]
    assert place.run(place.sweep, "--retry", "--wait").code == 0
    assert place.ask("SELECT status FROM runs ORDER BY finished") == [("failed",), ("finished",)]
    ends = "SELECT r.status, a.status FROM runs AS r JOIN attempts AS a USING (job, start) ORDER BY r.finished"
    assert place.ask(ends) == [("failed", "failed"), ("finished", "finished")]


def test_every_rank_of_a_failed_job_is_in_the_registry_with_words_of_its_own(place: Place) -> None:
    """Two ranks on two nodes that fail, each for a reason of its own"""
    sweep = place.with_(nodes=2)
    key = cell_keys(sweep.cell).cell
    Path(sweep.registry).mkdir()
    argument = {"sweep": "tiny", "cells": [asdict(sweep.cell)], "registry": sweep.registry, "resources": {}, "origin": {}}
    job = create_job(
        place.path / "logs", "tests.slurm.entries:two_ranks_raise", argument, 2, cluster="slurm", cells=[(key, "tiny")]
    )
    sbatch.submit_arrays(place.path / "logs", [job], sweep.resources, "both")
    ended(job)
    finalize_ended_jobs(place.path / "logs")
    rows = place.ask("SELECT rank, slurm_id, host, status, error_class, message, last_log_lines, traceback FROM attempts")
    assert len({host for _, _, host, *_ in rows}) == 2
    for rank, number, host, rank_status, kind, message, lines, traceback in sorted(rows):
        assert (number, rank_status, kind) == (job.slurm_id(), "failed", "bug") and host.startswith("gpu")
        assert message == f"ValueError: what only rank {rank} knows" and message in traceback
        assert f"rank {rank} ksweep.launch.worker.main: failed" in lines and "(its traceback)" in lines
    [(words, kind)] = place.ask("SELECT tracebacks, error_class FROM runs")
    assert len(words) == 2 and kind == "bug"


WRAPPER = """#!/bin/bash
case "$*" in *--test-only*) exec {sbatch} "$@";; esac
{before}
{sbatch} "$@" >{log}
sleep 1000
"""


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_launcher_killed_around_sbatch_leaves_no_orphan(place: Place, handed_over: bool) -> None:
    """The launcher killed between its intent and the record of sbatch"""
    folder, log, sweep = place.path / "bin", place.path / "sbatch.out", place.sweep
    folder.mkdir()
    sbatch_path = slurm("which", "sbatch").strip()
    before = "" if handed_over else f"touch {log}; sleep 1000"
    (folder / "sbatch").write_text(WRAPPER.format(sbatch=sbatch_path, log=log, before=before))
    (folder / "sbatch").chmod(0o755)
    launcher = place.begin(sweep, PATH=f"{folder}:{os.environ['PATH']}")
    until("sbatch", lambda: log.exists() and (not handed_over or log.read_text()))
    os.killpg(launcher.pid, signal.SIGKILL)
    place.story.did(f"# kill -9 of the launcher {'after' if handed_over else 'before'} sbatch has handed the job over")
    place.finish(launcher, sweep)
    assert place.jobs()[0].read_note("slurm") is None
    again = place.run(sweep, "--wait")
    assert again.code == 0, again.err
    words = "found again as job" if handed_over else "Slurm knows nothing of it"
    assert words in again.err
    assert place.ask("SELECT status FROM runs") == [("finished",)]
    assert len(place.jobs()) == (1 if handed_over else 2)
    ours = {f"{sbatch.TAG}{p.name}" for p in Path(place.path).glob("logs/submissions/*")}
    assert not [e for e in commands.squeue(user=getpass.getuser()) if e.tag in ours]
