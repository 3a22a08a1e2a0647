"""Jobs on a real Slurm: shapes, arrays, and everything that ends a job before its time."""

from __future__ import annotations

import getpass
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ksweep.errors import SpecError
from ksweep.launch import slurm as commands
from ksweep.launch import states, submission
from ksweep.launch.job import Job, create
from ksweep.spec import Resources
from tests.slurm.bed import Bed, slurm, until

PLAIN = Resources(cluster="slurm", gpus=0, mem_gb=1, time=60)


def start(place: Path, entry: str, resources: Resources = PLAIN, count: int = 1, **argument: Any) -> list[Job]:
    ranks = (resources.gpus or resources.tasks) * resources.nodes
    created = [
        create(place / "logs", f"tests.slurm.entries:{entry}", argument, ranks, cluster="slurm", cells=[(f"cell-{i}", f"n={i}")])
        for i in range(count)
    ]
    submission.submit(place / "logs", created, resources, "test")
    return created


def ended(job: Job, seconds: float = 120) -> states.Verdict:
    def look() -> states.Verdict | None:
        found = states.verdict(job)
        return found if found.state not in states.LIVE else None

    return until(f"an end of job {job.slurm_id()}", look, seconds)  # type: ignore[no-any-return]


def results(job: Job) -> list[dict[str, Any]]:
    return [e.result for e in sorted(job.endings(), key=lambda e: e.rank)]


def queued(job: Job) -> str:
    number = job.slurm_id()
    assert number is not None
    return next((entry.state for entry in commands.queue([number])), "")


def running(job: Job, phase: str = "units") -> bool:
    return any(h.phase == phase for h in job.heartbeats())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module", autouse=True)
def slow_ones(bed: Bed, shared: Path) -> Iterator[dict[str, Job]]:
    """Jobs that need minutes run while the other tests do."""
    (shared / "limit").mkdir()
    short = replace(PLAIN, time=1, extra={"nodelist": "gpu1"})
    [limit] = start(shared, "units", short, folder=str(shared / "limit"), total=80, seconds=1.0)
    (shared / "node").mkdir()
    there = replace(PLAIN, extra={"exclude": "gpu1,gpu2"})
    [split] = start(shared, "units", there, folder=str(shared / "node"), total=60, seconds=1.0)
    (shared / "deaf").mkdir()
    low = replace(PLAIN, qos="preemptable", extra={"nodelist": "gpu4", "exclusive": True})
    [deaf] = start(shared, "deaf", low, folder=str(shared / "deaf"))
    until("its first start", lambda: (shared / "deaf" / "begun-0").exists())
    start(shared, "where", replace(PLAIN, qos="urgent", extra={"nodelist": "gpu4", "exclusive": True}))
    until("a job on gpu3", lambda: running(split), 60)
    assert split.heartbeats()[0].host == "gpu3"
    bed.script("kill-slurmd", "gpu3")
    yield {"limit": limit, "split": split, "deaf": deaf}
    bed.script("boot", "gpu3")


def test_one_gpu_and_four_tasks_are_what_they_are_asked_for(shared: Path) -> None:
    [gpu] = start(shared, "where", replace(PLAIN, gpus=1, cpus_per_gpu=3, job_name="probe", setup="export FROM_SETUP=yes"))
    [four] = start(shared, "where", replace(PLAIN, tasks=4))
    assert ended(gpu).state == "finished"
    [told] = results(gpu)
    assert (told["world_size"], told["setup"], told["name"], told["cpus"]) == (1, "yes", "probe", "3")
    assert len(told["gpus"].split(",")) == 1
    assert ended(four).state == "finished"
    assert [(r["rank"], r["world_size"]) for r in results(four)] == [(i, 4) for i in range(4)]


def test_every_rank_of_a_job_on_four_gpus_of_two_nodes_sees_those_of_its_node(shared: Path) -> None:
    # gpus=0 for the rank: the declared GPUs have nothing behind them, so torch must not be asked for them.
    [job] = start(shared, "where", replace(PLAIN, gpus=2, nodes=2))
    assert ended(job).state == "finished"
    told = results(job)
    assert [r["world_size"] for r in told] == [4] * 4 and len({r["host"] for r in told}) == 2
    assert [len(r["gpus"].split(",")) for r in told] == [2] * 4


def test_an_array_of_twelve_runs_three_at_a_time_in_two_arrays(shared: Path) -> None:
    made = start(shared, "where", replace(PLAIN, max_parallel_jobs=3), count=12, seconds=1.0)
    numbers = [job.slurm_id() or "" for job in made]
    assert [n.partition("_")[2] for n in numbers] == [str(i) for i in (*range(9), *range(3))]  # MaxArraySize is 9
    assert [ended(job).state for job in made] == ["finished"] * 12
    moments = [(r["begun"], r["ended"]) for job in made for r in results(job)]
    most = max(sum(begun <= t < end for begun, end in moments) for t, _ in moments)
    assert most <= 3


def test_a_rank_that_is_shot_ends_its_job_at_once_and_the_reason_is_known(shared: Path) -> None:
    [job] = start(shared, "one_rank_is_killed", replace(PLAIN, tasks=2))
    until("both ranks", lambda: len(job.heartbeats()) == 2)
    begun = time.monotonic()
    found = ended(job)
    assert (found.state, found.kind) == ("failed", "dead rank")
    until("an empty queue", lambda: queued(job) == "", 20)
    assert time.monotonic() - begun < 60


def test_a_job_killed_for_its_memory_is_known_as_such(bed: Bed, shared: Path) -> None:
    if bed.options["CGROUP"] != "1":
        pytest.skip("memory limits need cgroups: KSWEEP_SLURM_CGROUP=1 (cgroup v1)")
    [job] = start(shared, "fills_memory", replace(PLAIN, mem_gb=0.5))
    assert (ended(job).state, ended(job).kind) == ("failed", "out of memory")


def test_every_rank_that_fails_leaves_its_own_traceback(shared: Path) -> None:
    [job] = start(shared, "two_ranks_raise", replace(PLAIN, tasks=2))
    assert ended(job).kind == "bug"
    until("both records", lambda: len(job.endings()) == 2, 10)
    assert sorted(e.message for e in job.endings()) == [f"ValueError: what only rank {r} knows" for r in (0, 1)]
    assert all("two_ranks_raise" in e.traceback for e in job.endings())


def test_a_cancelled_job_and_a_cancelled_waiting_element_come_to_an_end(shared: Path) -> None:
    (shared / "cancel").mkdir()
    made = start(
        shared, "units", replace(PLAIN, max_parallel_jobs=1), count=2, folder=str(shared / "cancel"), total=100, seconds=0.5
    )
    first, second = made
    until("the first element", lambda: running(first))
    assert queued(second) == "PENDING"
    slurm("scancel", str(second.slurm_id()))
    slurm("scancel", str(first.slurm_id()))
    for job in made:
        found = ended(job)
        assert found.state == "stopped", found
    assert {e.status for e in first.endings()} == {"stopped"}
    assert first.noted("requeued", 0) is None and queued(first) == ""


def test_a_job_put_back_by_hand_goes_on_where_it_was(shared: Path) -> None:
    folder = shared / "by-hand"
    folder.mkdir()
    [job] = start(shared, "units", folder=str(folder), total=12, seconds=0.5)
    until("a few units", lambda: len(list(folder.iterdir())) > 3)
    slurm("scontrol", "requeue", str(job.slurm_id()))
    assert ended(job).state == "finished"
    assert job.attempt() == 1
    done_by = [path.read_text().split() for path in sorted(folder.iterdir())]
    assert len(done_by) == 12 and sum(map(len, done_by)) <= 13, done_by  # at most the unit at hand is done twice
    assert ["0"] in done_by and ["1"] in done_by


def test_preemption_with_and_without_a_user_signal_resumes(bed: Bed, shared: Path) -> None:
    for name, signal in (("signalled", "SlurmctldParameters=preempt_send_user_signal"), ("terminated", "SlurmctldParameters=")):
        bed.script("set", signal)
        folder = shared / name
        folder.mkdir()
        low = replace(PLAIN, qos="preemptable", extra={"nodelist": "gpu2", "exclusive": True})
        [job] = start(shared, "units", low, folder=str(folder), total=16, seconds=0.5)
        until("a few units", lambda folder=folder: len(list(folder.iterdir())) > 3)
        [high] = start(shared, "where", replace(PLAIN, qos="urgent", extra={"nodelist": "gpu2", "exclusive": True}), seconds=1.0)
        assert ended(high).state == "finished"
        assert ended(job).state == "finished", name
        assert job.attempt() == 1 and (job.noted("requeued", 0) or {}).get("why") == "preempted"
        done_by = [path.read_text().split() for path in sorted(folder.iterdir())]
        assert len(done_by) == 16 and ["0"] in done_by and ["1"] in done_by, done_by
    bed.script("set", "SlurmctldParameters=preempt_send_user_signal")


def test_a_unit_longer_than_the_grace_time_is_killed_and_the_job_comes_back(slow_ones: dict[str, Job]) -> None:
    job = slow_ones["deaf"]
    assert ended(job).state == "finished"
    assert job.attempt() == 1 and [e.result for e in job.endings()] == ["begun-1"]


def test_without_accounting_the_queue_and_the_files_tell_the_ends(bed: Bed, shared: Path) -> None:
    bed.script("accounting", "stop")
    try:
        [good] = start(shared, "where")
        [bad] = start(shared, "is_killed")
        assert ended(good).state == "finished"
        found = ended(bad)
        assert (found.state, found.kind) == ("stopped", "lost") and "neither in the queue nor in accounting" in found.reason
    finally:
        bed.script("accounting", "start")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partition": "mian"}, "resources.partition='mian' is not one of main, preempt"),
        ({"qos": "urgnet"}, "is not one of normal, preemptable, urgent"),
        ({"account": "lba"}, "is not one of lab"),
        ({"gpus": 9}, "partition main has 8 on a node"),
        ({"nodes": 5}, "partition main has 4"),
        ({"time": "8-00"}, "partition main allows 10080 minutes"),
    ],
)
def test_what_the_cluster_has_not_is_refused_with_what_it_has(bed: Bed, change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        submission.refuse(replace(PLAIN, **change))


def test_an_option_that_sbatch_refuses_leaves_nothing_in_the_queue(shared: Path) -> None:
    before = commands.queue(user=getpass.getuser())
    with pytest.raises(SpecError, match="does not take this job"):
        start(shared, "where", replace(PLAIN, extra={"reservation": "nowhere"}))
    assert {e.id for e in commands.queue(user=getpass.getuser())} <= {e.id for e in before}


def test_a_time_limit_reached_twice_ends_in_a_third_start(shared: Path, slow_ones: dict[str, Job]) -> None:
    job = slow_ones["limit"]
    assert ended(job, 240).state == "finished"
    # A start may last 60 s and is told to stop 30 s before: 80 units of a second do not fit into two.
    assert job.attempt() >= 2
    assert [(job.noted("requeued", n) or {}).get("why") for n in range(job.attempt())] == ["time limit"] * job.attempt()
    done_by = [path.read_text().split() for path in sorted((shared / "limit").iterdir())]
    assert len(done_by) == 80 and all(len(starts) == 1 for starts in done_by), "a unit was done twice"


def test_a_job_whose_nodes_daemon_died_runs_once_elsewhere_and_the_old_start_ends_itself(slow_ones: dict[str, Job]) -> None:
    job = slow_ones["split"]
    assert ended(job, 240).state == "finished"
    assert job.attempt() == 1
    assert [h.host for h in job.heartbeats(0)] == ["gpu3"] and job.heartbeats(1)[0].host == "gpu4"
    # Its process lived on without slurmd; it has seen the newer start, and said nothing about an end of the job.
    last = job.heartbeats(0)[0].time
    assert not job.endings(0) and last < job.endings(1)[0].time


def test_a_running_job_that_somebody_has_given_up_ends_itself_and_does_not_come_back(shared: Path) -> None:
    (shared / "given-up").mkdir()
    [job] = start(shared, "units", replace(PLAIN, tasks=2), folder=str(shared / "given-up"), total=1000, seconds=0.5)
    until("its ranks", lambda: running(job))
    job.note("settled", {"state": "stopped", "kind": "lost", "reason": "a test gave it up"})
    until("its end in the queue", lambda: queued(job) in ("", "FAILED"), 60)
    assert job.noted("requeued", 0) is None and job.attempt() == 0
    assert any("given up while it ran (a test gave it up)" in e.message for e in job.endings()), job.endings()
