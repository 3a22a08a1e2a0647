"""Job directories of somebody else: shown, but not run, not obeyed, and nothing is written because of them.

Root gives files away for real; another user is told by a patched user id that they are somebody else's.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ksweep.launch import code_snapshot, ownership, run_sweep, status
from ksweep.launch.job import Job, create_job
from ksweep.launch.ownership import is_own, owner_of
from ksweep.launch.rank_records import Heartbeat, Outcome, process_record
from ksweep.launch.reconcile import finalize_all, finalize_ended_jobs, finalize_if_ended
from ksweep.launch.slurm import sbatch
from ksweep.launch.status import job_status
from ksweep.utils.files import locked, publish
from tests.cli.test_job_commands import script
from tests.cli.test_reads import tree
from tests.job_directories import job, ksweep, me

NOBODY = 65534
GiveAway = Callable[[Path], None]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    path = tmp_path / "project" / "registry"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> GiveAway:
    """Make a file somebody else's; without root, every file that exists."""

    def give(path: Path) -> None:
        if os.getuid() == 0:
            os.chown(path, NOBODY, -1)
            monkeypatch.setattr(os, "geteuid", lambda: 1000)  # root's files, and so those of the test, count as this user's
        else:
            real = os.getuid()
            monkeypatch.setattr(os, "geteuid", lambda: real + 1)
            monkeypatch.setattr(ownership, "_uid_of_new_files", lambda _: real + 1)

    return give


def test_retry_shows_the_command_of_another_users_job_and_does_not_run_it(
    registry: Path, tmp_path: Path, give_away: GiveAway
) -> None:
    origin = script(tmp_path) | {"argv": ["experiment.py", "sampling.seed=1", "name=a b; touch x"]}
    made = job(registry, origin=origin)
    give_away(made.path / "job.json")
    code, out = ksweep(registry, "retry", "tiny")
    assert code == 1 and not (tmp_path / "said").exists()
    assert f"job {made.id} belongs to {owner_of(made.path / 'job.json')}, so its command is shown and not run" in out
    typed = out.partition("run it yourself: ")[2]
    assert shlex.split(typed) == ["cd", str(tmp_path), "&&", "python", *origin["argv"], "--retry"]


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_retry_does_not_run_a_command_that_others_can_change(registry: Path, tmp_path: Path, mode: int) -> None:
    made = job(registry, origin=script(tmp_path))
    (made.path / "job.json").chmod(mode)
    code, out = ksweep(registry, "retry", "tiny")
    assert code == 1 and f"can be changed by others (job.json has mode {mode:o})" in out and not (tmp_path / "said").exists()


def test_a_job_of_this_user_can_be_retried_whatever_the_umask_was(registry: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = job(registry, origin=script(tmp_path))
    finally:
        os.umask(before)
    assert stat.S_IMODE((made.path / "job.json").stat().st_mode) == 0o644
    assert ksweep(registry, "retry", "tiny")[0] == 3 and (tmp_path / "said").read_text() == "sampling.seed=1 --retry"


def test_content_and_owner_are_those_of_one_file(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks somebody exchanges the file."""
    made, look = job(registry, origin=script(tmp_path)), os.fstat

    def exchange(handle: int) -> os.stat_result:
        publish(made.path / "job.json", json.dumps({"argument": {"origin": {"argv": ["/bin/evil"]}}}).encode())
        return look(handle)

    monkeypatch.setattr(ownership.os, "fstat", exchange)
    spec, doubt = ownership.spec_and_doubt(made)
    assert spec["argument"]["origin"]["argv"] == ["experiment.py", "sampling.seed=1"] and doubt == ""


def test_root_may_leave_jobs_for_others(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can leave a file of root's")
    made = job(registry, origin=script(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert is_own(made.path / "job.json") and ownership.spec_and_doubt(made)[1] == ""


def test_where_every_file_has_one_owner_own_jobs_are_not_taken_for_anothers(
    registry: Path, monkeypatch: pytest.MonkeyPatch, give_away: GiveAway
) -> None:
    """NFS with all_squash gives new files to nobody: jobs are finalized and cancelled as before, commands are not run."""
    made = job(registry)
    give_away(made.path / "job.json")
    uid = (made.path / "job.json").stat().st_uid
    assert not is_own(made.path / "job.json")
    monkeypatch.setattr(ownership, "_uid_of_new_files", lambda _: uid)
    assert is_own(made.path / "job.json") and ownership.spec_and_doubt(made)[1]


def failed_elsewhere(registry: Path, tmp_path: Path) -> Job:
    """A job that names another registry than the one beside its logs."""
    argument = {"sweep": "theirs", "cells": [], "registry": str(tmp_path / "victim" / "registry")}
    made = create_job(registry.parent / "logs", "a:b", argument, 1, cells=[("key", "n=1")])
    made.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    return made


def test_another_users_job_is_not_finalized_into_the_registry_that_it_names(
    registry: Path, tmp_path: Path, give_away: GiveAway
) -> None:
    made = failed_elsewhere(registry, tmp_path)
    give_away(made.path / "job.json")
    before = tree(registry)
    assert finalize_if_ended(made, job_status(made)), "it has ended, and a command that waited for it goes on"
    assert finalize_all(registry.parent / "logs") == [] and tree(registry) == before
    assert not (tmp_path / "victim").exists()


def silent_elsewhere(registry: Path) -> Job:
    """A job of another kernel that has been silent for five minutes: nothing proves its end."""
    made = job(registry)
    there = {"pid": 1, "host": "elsewhere", "process_started": 0.0, "boot_id": "x", "time": time.time() - 300}
    made.write_heartbeat(Heartbeat(rank=0, **there))
    return made


def test_another_users_job_that_has_ended_without_proof_is_neither_confirmed_nor_waited_for(
    registry: Path, monkeypatch: pytest.MonkeyPatch, give_away: GiveAway
) -> None:
    made = silent_elsewhere(registry)
    monkeypatch.setattr(status, "SILENCE_SECONDS", 0.0)
    give_away(made.path / "job.json")

    def refuse(_: float) -> None:
        raise AssertionError("it was waited for")

    monkeypatch.setattr(time, "sleep", refuse)
    assert [(one.id, said.recheck) for one, said in finalize_ended_jobs(registry.parent / "logs").ended] == [(made.id, "record")]
    assert finalize_all(registry.parent / "logs") == [] and made.final_status() is None


def test_looking_whose_jobs_are_leaves_them_alone_and_asks_the_directory_of_logs_once(
    registry: Path, monkeypatch: pytest.MonkeyPatch, give_away: GiveAway
) -> None:
    asked: list[Path] = []
    real, made = tempfile.TemporaryFile, [job(registry) for _ in range(3)]
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: (asked.append(dir), real(dir=dir))[1])
    if os.geteuid() != 0:
        pytest.skip("only root can make single files another user's")
    for one in made:
        give_away(one.path / "job.json")
    assert [is_own(one.path / "job.json") for one in made * 2] == [False] * 6 and asked == [registry.parent / "logs"]


def test_root_finalizes_the_jobs_of_others_into_the_registry_beside_them_alone(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root in a container, or by sudo, is the same person."""
    if os.geteuid() != 0:
        pytest.skip("only root can act for others")
    beside, astray = job(registry), failed_elsewhere(registry, tmp_path)
    beside.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    for one in (beside, astray):
        os.chown(one.path / "job.json", NOBODY, -1)
    assert [one.id for one, _ in finalize_all(registry.parent / "logs")] == [beside.id]
    assert (registry / "attempts" / f"{beside.id}.json").exists() and not (tmp_path / "victim").exists()
    assert ownership.spec_and_doubt(beside)[1].startswith("belongs to "), "its command is shown and not run"


@pytest.mark.parametrize("owner_of_process", [NOBODY, 0])
def test_root_cancels_the_job_of_another_and_signals_that_users_processes_alone(registry: Path, owner_of_process: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can act for others")
    process = subprocess.Popen(["sleep", "600"], user=owner_of_process)
    try:
        made = job(registry)
        made.write_heartbeat(Heartbeat(rank=0, **process_record(process.pid)))
        os.chown(made.path / "job.json", NOBODY, -1)
        code, out = ksweep(registry, "cancel", "tiny")
        assert (
            made.cancel_requested()
            and (code, f"not cancelled: {made.id}" in out) == ((0, False), (1, True))[not owner_of_process]
        )
        assert process.wait(60) == -signal.SIGTERM if owner_of_process else process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("words", [["ls"], ["watch", "--once"], ["why", "JOB"], ["logs", "JOB"]], ids=lambda words: words[0])
def test_reading_another_users_job_writes_nothing(registry: Path, tmp_path: Path, give_away: GiveAway, words: list[str]) -> None:
    made = failed_elsewhere(registry, tmp_path)
    (made.path / "1_0_log.err").write_text("a line\n")
    give_away(made.path / "job.json")
    assert ksweep(registry, "ls")[0] == 0  # builds the index of the registry that the user named
    before = tree(registry)
    code, out = ksweep(registry, *(made.id if word == "JOB" else word for word in words))
    assert code == 0 and ("a line" if words[0] == "logs" else "failed") in out
    assert tree(registry) == before and not (tmp_path / "victim").exists()


def test_cancel_neither_signals_nor_marks_what_another_users_job_names(
    registry: Path, monkeypatch: pytest.MonkeyPatch, give_away: GiveAway
) -> None:
    """Its heartbeat may name any process of this user."""
    sent: list[tuple[int, int]] = []
    made, mine = job(registry), job(registry)
    for one in (made, mine):
        one.write_heartbeat(me())
    give_away(made.path / "job.json")
    if os.getuid() != 0:
        monkeypatch.setattr("ksweep.cli.jobs.cancel.may_cancel", lambda job: job != made)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)) if number else None)
    code, out = ksweep(registry, "cancel", "tiny")
    assert code == 1 and f"not cancelled: {made.id}: it belongs to " in out and f"cancelled: {mine.id}" in out
    assert sent == [(os.getpid(), signal.SIGTERM)] and not made.cancel_requested() and mine.cancel_requested()


def test_another_users_submission_in_doubt_writes_into_no_directory_that_it_names(
    registry: Path, tmp_path: Path, give_away: GiveAway
) -> None:
    victim, folder = tmp_path / "victim", registry.parent / "logs" / "submissions" / "one"
    victim.mkdir()
    (victim / "reserve").touch()
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps([str(victim)]))
    dead = {"pid": 2**22 + 1, "host": me().host, "process_started": 0.0, "time": 0.0}
    alive = json.dumps({"tag": "ksweep:x", "launcher": process_record()})
    (folder / "intent.json").write_text(alive)
    give_away(folder / "intent.json")
    [line] = sbatch.resolve_interrupted_submissions(registry.parent / "logs")
    assert line == "submission one: another launcher is handing it over at this moment"
    (folder / "intent.json").write_text(json.dumps({"tag": "ksweep:x", "launcher": dead}))
    [line] = sbatch.resolve_interrupted_submissions(registry.parent / "logs")
    assert "only a command of " in line and [path.name for path in victim.iterdir()] == ["reserve"]
    assert not (folder / "submitted.json").exists()


def test_a_copy_of_the_code_that_another_user_has_put_there_is_not_used(tmp_path: Path, give_away: GiveAway) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make single files another user's")
    tree_of_code, logs = tmp_path / "tree", tmp_path / "logs"
    (tree_of_code / "package").mkdir(parents=True)
    (tree_of_code / "package" / "__init__.py").write_text("")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", "-C", str(tree_of_code), *words], check=True)
    first = code_snapshot.snapshot_code(logs, tree_of_code / "package")
    assert first is not None and code_snapshot.snapshot_code(logs, tree_of_code / "package") == first
    give_away(first.path)
    (first.path / "package" / "__init__.py").write_text("evil = True")
    second = code_snapshot.snapshot_code(logs, tree_of_code / "package")
    assert second is not None and second.path == first.path.with_name(f"{first.path.name}-{os.geteuid()}")
    assert (second.path / "package" / "__init__.py").read_text() == ""
    assert code_snapshot.snapshot_code(logs, tree_of_code / "package") == second


@pytest.mark.parametrize(("directory", "lock"), [(0o755, 0o644), (0o775, 0o664), (0o777, 0o666), (0o700, 0o600)])
def test_who_may_create_files_in_a_directory_may_lock_it(tmp_path: Path, directory: int, lock: int) -> None:
    shared = tmp_path / "logs"
    shared.mkdir()
    shared.chmod(directory)
    with locked(shared / "submitting", "another command") as held:
        assert held and stat.S_IMODE((shared / "submitting").stat().st_mode) == lock


def test_a_lock_that_another_user_makes_between_two_looks_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "chmod", refuse)  # as the kernel does where the file is not this user's
    with locked(tmp_path / "submitting", "another command") as held:
        assert held


def test_a_user_who_may_not_write_the_lock_of_another_takes_one_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_sweep._claims_lock(tmp_path) == tmp_path / "submitting"
    (tmp_path / "submitting").touch()
    assert run_sweep._claims_lock(tmp_path) == tmp_path / "submitting"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run_sweep._claims_lock(tmp_path) == tmp_path / f"submitting-{os.geteuid()}"
