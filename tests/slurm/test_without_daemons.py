"""When a part of Slurm itself is away or goes by other rules. It is so for every job, so nothing runs beside these tests.

They come last: slurmctld is killed, and nodes may be left drained.
"""

from __future__ import annotations

import os
import time

from ksweep.launch import status
from ksweep.launch.slurm import commands
from tests.slurm.bed import Place, ended, only, process_of, slurm, until


def test_preemption_without_a_user_signal_resumes(place: Place) -> None:
    """Preemption where Slurm sends SIGTERM only (no preempt_send_user_signal)"""
    place.daemons("set", "SlurmctldParameters=")
    try:
        sweep = place.long(16, 1.0, qos="preemptable", exclusive=True, extra=only("gpu4"))
        assert place.run(sweep).code == 0
        until("two units", lambda: place.parts() >= 2)
        place.slurm("sbatch", "--wait", "--qos=urgent", "--nodelist=gpu4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        done = place.run(sweep, "--wait")
    finally:
        place.bed.script("set", "SlurmctldParameters=preempt_send_user_signal")
    assert done.code == 0, done.err
    [job] = place.jobs()
    assert job.attempt() == 1 and (job.read_note("requeued", 0) or {})["why"] == "preempted"
    assert place.ask("SELECT status, num_draws_reused > 0 FROM runs") == [("finished", True)]
    assert place.texts() == place.undisturbed(sweep)


def test_without_accounting_the_queue_and_the_files_tell_the_ends(place: Place) -> None:
    """sacct unavailable: one sweep of two jobs, of which one is killed"""
    sweep = place.long(6, 1.0, cells_per_job=1)
    seeds = "sampling.seed=[0,1]"
    place.daemons("accounting", "stop")
    try:
        waiting = place.begin(sweep, seeds, "--wait")
        until("both at work", lambda: sum(bool(job.heartbeats()) for job in place.jobs()) == 2)
        bad = place.jobs()[0]
        process_of(bad, 0).kill()
        place.story.did("# kill -9 of the only rank of one of the two, in the meantime")
        told = place.finish(waiting, sweep, seeds, "--wait")
        assert told.code == 1 and "neither in the queue nor in accounting" in told.err
        rows = place.ask("SELECT status, error_class FROM runs ORDER BY status")
        assert rows == [("finished", None), ("stopped", "lost")]
        again = place.run(sweep, seeds, "--wait")
    finally:
        place.bed.script("accounting", "start")
    assert again.code == 0, again.err
    rows = place.ask("SELECT status, count(*) FROM runs GROUP BY ALL ORDER BY ALL")
    assert rows == [("finished", 2), ("stopped", 1)]


def test_without_slurmctld_jobs_go_on_and_are_waited_for_and_commands_change_nothing(place: Place) -> None:
    """slurmctld killed while a command waits and while another starts"""
    sweep = place.long(20, 1.0)
    waiting = place.begin(sweep, "--wait")
    until("a unit", lambda: place.parts() >= 1)
    time.sleep(5)  # slurmctld saves what it knows every few seconds
    [job] = place.jobs()
    place.daemons("controller", "kill")
    try:
        refused = place.run(sweep)
        assert refused.code == 1 and "Unable to contact slurm controller" in refused.err
        until("the end of the job", lambda: len(job.outcomes()) == 1)
        assert status.job_status(job).state == "finished"
        done = place.finish(waiting, sweep, "--wait")
    finally:
        place.daemons("controller", "start")
    assert done.code == 0, done.err
    assert place.run(sweep).code == 0 and len(place.jobs()) == 1
    assert place.ask("SELECT status FROM runs") == [("finished",)]


SAVED_JUST_BEFORE = """#!/bin/bash
case "$*" in *--test-only*) exec {sbatch} "$@";; esac
{sbatch} --hold --job-name=saved --output=/dev/null --wrap=true >/dev/null
exec {sbatch} "$@"
"""
"""slurmctld saves a change at once, but the next one not before five seconds later."""


def test_a_job_that_slurmctld_forgot_is_run_again_and_one_that_has_its_number_left_alone(place: Place) -> None:
    """slurmctld killed right after a job started: job forgotten, its number given to another"""
    folder = place.path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SAVED_JUST_BEFORE.format(sbatch=slurm("which", "sbatch").strip()))
    (folder / "sbatch").chmod(0o755)
    found = None
    for attempt in range(4):  # on a busy machine five seconds may be over too soon, or srun comes when the job is forgotten
        here = Place(place.path / str(attempt), place.bed, place.plain, place.story)
        here.path.mkdir()
        # Nothing else runs on this node: Slurm drains it when a number is given again while its first job is alive there.
        sweep = here.long(8, 1.0, extra=only("gpu6"))
        time.sleep(6)
        assert here.run(sweep, PATH=f"{folder}:{os.environ['PATH']}").code == 0
        [job] = here.jobs()
        number = str(job.slurm_id())
        until("its start", lambda number=number: commands.squeue([number])[0].state == "RUNNING")
        here.daemons("controller", "kill")
        here.daemons("controller", "start")
        other = here.slurm("sbatch", "--parsable", "--hold", "--comment=another", "--output=/dev/null", "--wrap=sleep 60").strip()
        if other == number and (found := ended(job)).state == "stopped":
            break
        slurm("scancel", other, number)
    place.path = here.path
    assert found is not None, "slurmctld had saved the job each time"
    assert found.state == "stopped", found
    again = here.run(sweep, "--wait")
    assert again.code == 0, again.err
    [entry] = commands.squeue([other])
    assert (entry.state, entry.tag) == ("PENDING", "another"), "the job that has the number now is not ours to touch"
    slurm("scancel", other)
    assert len(here.jobs()) == 2 and here.jobs()[1].slurm_id() != other
    assert here.ask("SELECT status FROM runs ORDER BY finished") == [("stopped",), ("finished",)]
    assert here.texts() == here.undisturbed(sweep)
