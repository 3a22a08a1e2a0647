"""Jobs on a real Slurm, of units of known length: shapes, signals, GPUs, memory, and what is refused."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ksweep.config.resources import Resources
from ksweep.launch import code_snapshot, status
from ksweep.launch.job import Job, create_job
from ksweep.launch.slurm import commands, sbatch
from ksweep.utils.errors import SpecError
from tests.slurm.bed import ANYWHERE, NODES, ROOT, Bed, ended, finished, only, slurm, until


@pytest.fixture(scope="module")
def resources(bed: Bed) -> Resources:
    return Resources(cluster="slurm", gpus=0, mem_gb=8, time=60, extra=only(ANYWHERE))


def start(place: Path, entry: str, asked: Resources, count: int = 1, **argument: Any) -> list[Job]:
    ranks = (asked.gpus or asked.tasks or 1) * asked.nodes
    created = [
        create_job(
            place / "logs", f"tests.slurm.entries:{entry}", argument, ranks, cluster="slurm", cells=[(f"cell-{i}", f"n={i}")]
        )
        for i in range(count)
    ]
    sbatch.submit_arrays(place / "logs", created, asked, "test")
    return created


def results(job: Job) -> list[dict[str, Any]]:
    return [e.result for e in sorted(job.outcomes(), key=lambda e: e.rank)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module", autouse=True)
def deaf_one(resources: Resources, shared: Path) -> Iterator[Job]:
    """A job that does not hear that it is preempted; its end takes the grace time, so it runs while the other tests do."""
    (shared / "deaf").mkdir()
    there = only("gpu6") | {"exclusive": True}
    [deaf] = start(shared, "deaf", replace(resources, qos="preemptable", extra=there), folder=str(shared / "deaf"))
    until("its first start", lambda: (shared / "deaf" / "begun-0").exists())
    start(shared, "where", replace(resources, qos="urgent", extra=there))
    yield deaf


def test_one_gpu_and_all_that_goes_with_it_are_what_was_asked_for(resources: Resources, shared: Path) -> None:
    [gpu] = start(shared, "where", replace(resources, gpus=1, cpus_per_gpu=3, job_name="probe", setup="export FROM_SETUP=yes"))
    assert finished(gpu)
    [told] = results(gpu)
    assert (told["world_size"], told["setup"], told["name"], told["cpus"]) == (1, "yes", "probe", "3")
    assert len(told["gpus"].split(",")) == 1


def test_every_rank_has_a_gpu_of_its_own_whatever_the_nodes_call_them(bed: Bed, resources: Resources, shared: Path) -> None:
    """A job beside it holds GPUs 0 to 3 of one node: without cgroups those of this job are 4,5 there and 0,1 on the other."""
    (shared / "gpus").mkdir()
    there = only("gpu8") | {"gres": "gpu:4"}
    [beside] = start(shared, "until_told", replace(resources, extra=there), folder=str(shared / "gpus"))
    until("the job beside it", lambda: (shared / "gpus" / "begun").exists())
    [job] = start(shared, "where", replace(resources, gpus=2, nodes=2, extra=only("gpu[8-9]")))
    assert finished(job)
    (shared / "gpus" / "end").touch()
    assert finished(beside)
    told, [held] = results(job), results(beside)
    assert [(r["rank"], r["world_size"]) for r in told] == [(i, 4) for i in range(4)]
    assert [r["host"] for r in told] == ["gpu8", "gpu8", "gpu9", "gpu9"] and held["host"] == "gpu8"
    shown = {r["host"]: r["gpus"] for r in told}
    if bed.options["CGROUP"] == "1":
        # They count from 0 in every job; which device that is, the cgroup says: only those of the job can be opened.
        assert set(shown.values()) == {"0,1"} and held["gpus"] == "0,1,2,3"
        assert {r["host"]: r["openable"] for r in told} == {"gpu8": [4, 5], "gpu9": [0, 1]}
        assert held["openable"] == [0, 1, 2, 3]
    else:
        assert shown == {"gpu8": "4,5", "gpu9": "0,1"} and held["gpus"] == "0,1,2,3"
    # cuda:n is the n-th of those that are shown: the rank's number on its node picks one that no other rank has.
    own = {(r["host"], r["gpus"].split(",")[int(r["local_rank"])]) for r in told}
    assert len(own) == 4


def test_a_whole_node_is_given_with_all_its_memory(resources: Resources, shared: Path) -> None:
    [job] = start(shared, "where", replace(resources, exclusive=True, mem_gb=None, extra=only("gpu9")))
    assert finished(job)
    # Slurm gives all CPUs and GPUs of an exclusive node, but of its memory only what is asked for; the bed's have 512,000 MiB.
    assert "cpu=64,mem=500G" in slurm("scontrol", "show", "job", str(job.slurm_id()))


def test_a_job_killed_for_its_memory_is_known_as_such(resources: Resources, shared: Path) -> None:
    """With cgroups by the kernel (CGROUP=1), without by Slurm, which looks once a second."""
    [job] = start(shared, "fills_memory", replace(resources, mem_gb=0.5))
    found = ended(job)
    assert (found.state, found.kind) == ("failed", "out of memory"), (found, job.log_tail())


def test_every_rank_that_fails_leaves_its_own_traceback(resources: Resources, shared: Path) -> None:
    [job] = start(shared, "two_ranks_raise", replace(resources, tasks=2))
    assert ended(job).kind == "bug"
    until("both records", lambda: len(job.outcomes()) == 2, 10)
    assert sorted(e.message for e in job.outcomes()) == [f"ValueError: what only rank {r} knows" for r in (0, 1)]
    assert all("two_ranks_raise" in e.traceback for e in job.outcomes())


def test_a_job_put_back_by_hand_goes_on_where_it_was(resources: Resources, shared: Path) -> None:
    folder = shared / "by-hand"
    folder.mkdir()
    [job] = start(shared, "units", resources, folder=str(folder), total=12, seconds=0.5)
    until("a few units", lambda: len(list(folder.iterdir())) > 3)
    slurm("scontrol", "requeue", str(job.slurm_id()))
    assert finished(job)
    assert job.attempt() == 1
    done_by = [path.read_text().split() for path in sorted(folder.iterdir())]
    assert len(done_by) == 12 and sum(map(len, done_by)) <= 13, done_by  # at most the unit at hand is done twice
    assert ["0"] in done_by and ["1"] in done_by


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partition": "mian"}, "resources.partition='mian' is not one of main, preempt"),
        ({"qos": "urgnet"}, "is not one of normal, preemptable, scavenger, urgent"),
        ({"account": "lba"}, "is not one of lab"),
        ({"gpus": 9}, "partition main has 8 on a node"),
        ({"nodes": NODES + 1}, f"partition main has {NODES}"),
        ({"time": "8-00"}, "partition main allows 10080 minutes"),
    ],
)
def test_what_the_cluster_has_not_is_refused_with_what_it_has(resources: Resources, change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        sbatch.validate_slurm_resources(replace(resources, **change))


def test_an_option_that_sbatch_refuses_leaves_nothing_in_the_queue(resources: Resources, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="rejects this job"):
        start(tmp_path, "where", replace(resources, job_name="refused", extra={"reservation": "nowhere"}))
    assert slurm("squeue", "-h", "--name=refused") == "" and not list(tmp_path.glob("logs/submissions/*"))


def test_a_job_runs_the_code_as_it_was_submitted(tmp_path: Path, resources: Resources) -> None:
    tree = tmp_path / "tree"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
    added = tree / "ksweep" / "added_later.py"
    added.write_text("def say(argument, ranks):\n    return 'as submitted'\n")
    code = code_snapshot.snapshot_code(tmp_path / "logs", tree / "ksweep")
    assert code is not None and code.new == ("ksweep/added_later.py",) and "as submitted" in (code.path / code.new[0]).read_text()
    job = create_job(tmp_path / "logs", "ksweep.added_later:say", {}, 1, cluster="slurm")
    sbatch.submit_arrays(tmp_path / "logs", [job], replace(resources, setup="sleep 3"), "code", code.path)
    added.write_text("def say(argument, ranks):\n    return 'changed since'\n")
    until("its end", lambda: status.job_status(job).state not in status.LIVE_STATES)
    assert [e.result for e in job.outcomes()] == ["as submitted"], job.log_tail()
    assert time.time() - job.submitted_at() < 100


def test_a_unit_longer_than_the_grace_time_is_killed_and_the_job_comes_back(deaf_one: Job) -> None:
    assert finished(deaf_one)
    assert deaf_one.attempt() == 1 and [e.result for e in deaf_one.outcomes()] == ["begun-1"]


def test_a_running_job_that_was_finalized_ends_itself_and_does_not_come_back(resources: Resources, shared: Path) -> None:
    (shared / "given-up").mkdir()
    [job] = start(shared, "units", replace(resources, tasks=2), folder=str(shared / "given-up"), total=1000, seconds=0.5)
    until("its ranks", lambda: any(h.phase == "units" for h in job.heartbeats()))
    job.write_note("settled", {"state": "stopped", "kind": "lost", "reason": "a test gave it up"})
    until("its end in the queue", lambda: all(e.state == "FAILED" for e in commands.squeue([str(job.slurm_id())])), 60)
    assert job.read_note("requeued", 0) is None and job.attempt() == 0
    assert any("finalized while it ran (a test gave it up)" in e.message for e in job.outcomes()), job.outcomes()
