"""Resources as a batch script: what Slurm is asked for, line by line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ksweep.config.resources import Resources
from ksweep.config.spec import Activations, Autoencoder, Cell
from ksweep.config.sweep import Sweep
from ksweep.launch import status
from ksweep.launch.job import Job, all_jobs, create_job
from ksweep.launch.slurm import commands, sbatch
from ksweep.utils.errors import SpecError
from tests.config.helpers import overridden


@pytest.fixture(autouse=True)
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit looks whether there is an srun, and no more."""
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def script(num_jobs: int = 1, after: str | None = None, code: Path | None = None, **changes: Any) -> list[str]:
    resources = Resources(cluster="slurm", **({"gpus": 0} | changes))
    text = sbatch.batch_script(Path("/logs/x"), resources, "tiny", num_jobs=num_jobs, tag="ksweep:x", after=after, code=code)
    return text.splitlines()


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"gpus": 4, "nodes": 2}, ["nodes=2", "ntasks-per-node=4", "gpus-per-node=4"]),
        ({"tasks": 3, "cpus_per_task": 2}, ["ntasks-per-node=3", "cpus-per-task=2"]),
        ({"gpus": 2, "cpus_per_gpu": 6}, ["cpus-per-task=6"]),
        ({"gpus": 8, "gpus_per_model": 2, "cpus_per_gpu": 6}, ["ntasks-per-node=4", "gpus-per-node=8", "cpus-per-task=12"]),
        ({"gpus": 4, "gpus_per_model": 4}, ["ntasks-per-node=1", "gpus-per-node=4"]),
        ({"mem_gb": 1.5}, ["mem=1536MB"]),
        ({"time": "2-12:30"}, ["time=3630"]),
        ({"time": 1}, ["time=1", "signal=USR2@30"]),
        ({"time": 600}, ["signal=USR2@120"]),
        ({"partition": "h100", "account": "lab", "qos": "low", "constraint": "ib"},
         ["partition=h100", "account=lab", "qos=low", "constraint=ib"]),
        ({"nice": True}, ["nice=10000", "requeue"]),
        ({"nice": 7}, ["nice=7"]),
        ({}, ["requeue", "comment=ksweep:x", "job-name=tiny", "open-mode=append"]),
        ({"job_name": "mine"}, ["job-name=mine"]),
        ({"gpus": 8}, ["exclusive", "mem=0"]),
        ({"gpus": 8, "mem_gb": 100}, ["exclusive", "mem=102400MB"]),
        ({"exclusive": True}, ["exclusive"]),
        ({"extra": {"mail_type": "END", "reservation": "night"}}, ["mail-type=END", "reservation=night"]),
    ],
)  # fmt: skip
def test_each_resource_is_its_sbatch_option(changes: dict[str, Any], lines: list[str]) -> None:
    there = script(**changes)
    for line in lines:
        assert f"#SBATCH --{line}" in there, (line, there)


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"gpus": 8, "exclusive": False}, "exclusive"), ({"gpus": 4}, "exclusive"), ({}, "nice"), ({}, "mem=")],
)
def test_what_is_not_asked_for_is_not_in_the_script(changes: dict[str, Any], option: str) -> None:
    assert not [line for line in script(**changes) if line.startswith(f"#SBATCH --{option}")]


def test_a_failing_rank_ends_the_job_and_one_that_is_done_does_not() -> None:
    [command] = [line for line in script() if line.startswith("srun")]
    assert "--kill-on-bad-exit=1" in command and "--wait=0" in command
    assert command.endswith("-u -P -m ksweep.launch.worker.start /logs/x")


def test_the_users_lines_come_before_the_code_as_submitted() -> None:
    there = script(setup=("module load cuda", "export PYTHONPATH=/mine"), code=Path("/logs/code/abc"))
    first, mine = there.index("module load cuda"), there.index("export PYTHONPATH=/mine")
    own = next(i for i, line in enumerate(there) if line.startswith("export PYTHONPATH=/logs/code/abc"))
    assert first < mine < own < next(i for i, line in enumerate(there) if line.startswith("srun"))


def test_arrays_keep_to_the_cap() -> None:
    assert "#SBATCH --array=0-11%3" in script(12, max_parallel_jobs=3)
    assert "#SBATCH --array=0-11%12" in script(12)
    assert "#SBATCH --dependency=afterany:99" in script(3, after="99")
    assert not [line for line in script(1) if "--array" in line]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": 8}, "8 GPUs"),
        ({"gpus": 8, "gpus_per_model": 2, "nodes": 2}, "2 nodes x 8 GPUs (2 per model)"),
        ({"gpus": 0, "tasks": 2}, "2 CPU ranks"),
    ],
)
def test_the_shape_of_a_job_is_said_in_words(changes: dict[str, Any], words: str) -> None:
    assert sbatch.job_shape_text(Resources(cluster="slurm", exclusive=False, **changes)) == f"{words}, 24:00:00"


def sweep_with(*arguments: str) -> Resources:
    cell = Cell(autoencoder=Autoencoder(av="a", ar="b"), activations=Activations(model="m", text="t"))
    return overridden(Sweep(name="s", cell=cell), arguments).resources


@pytest.mark.parametrize("text", ["time=24:00:00", 'time="24:00:00"', "resources.time=1440", "time=1-0"])
def test_a_time_limit_on_the_command_line_is_a_time(text: str) -> None:
    assert sweep_with(text).minutes == 1440


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["time=0"], "resources.time=0"),
        (["time=86400"], "D-HH:MM:SS"),
        (["time=soon"], "not a Slurm time limit"),
        (["nice=-5"], "resources.nice=-5"),
        (["mem_gb=0"], "resources.mem_gb"),
        (["gpus_per_model=0"], "resources.gpus_per_model=0"),
        (["gpus_per_model=2"], "gpus=None: set resources.gpus.* e.g. 2"),
        (["gpus=0", "gpus_per_model=2"], "gpus=0: set resources.gpus"),
        (["gpus=6", "gpus_per_model=4"], "gpus=6: set resources.gpus.* multiple of it, e.g. 8"),
        (["gpus=0", "cpus_per_gpu=2"], "set resources.cpus_per_task"),
        (["gpus=2", "cpus_per_task=2"], "set resources.cpus_per_gpu"),
        (["max_parallel_jobs=0"], "resources.max_parallel_jobs"),
        (['extra={comment: "for the bill"}'], "extra has comment"),
        (["extra={open_mode: truncate, reservation: night}"], "extra has open_mode: ksweep sets --open-mode itself"),
        (["extra={array: 0-3}"], "set resources.cells_per_job or max_parallel_jobs"),
        (["extra={no_requeue: true}"], "would not be requeued"),
        (["extra={signal: USR1@10}"], "could not be told to stop"),
        (["extra={gpus_per_node: 4}"], "set resources.gpus, tasks or nodes"),
        (["extra={clusters: other}"], "log in to the other one"),
        (["extra={qos: high}"], "set resources.qos"),
        # sbatch takes --outp for --output.
        (["extra={outp: x}"], "ksweep sets --output itself"),
        (["cluster=slrum"], "auto, slurm, local, inprocess"),
    ],
)
def test_a_resource_that_cannot_be_meant_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        sweep_with(*arguments)


@pytest.fixture
def nodes_of_64_cpus(tmp_path: Path) -> None:
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'main*|4|gpu:h100:8|64|512000|7-00:00:00|(null)'\n")
    (tmp_path / "sinfo").chmod(0o755)


@pytest.mark.usefixtures("nodes_of_64_cpus")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mem_gb": 501}, r"resources.mem_gb=501, but partition main has 500 on a node"),
        ({"gpus": 8, "cpus_per_gpu": 9}, r"resources.gpus x cpus_per_gpu=72, but partition main has 64 on a node"),
        ({"gpus": 0, "tasks": 65}, r"resources.tasks x cpus_per_task=65, but partition main has 64 on a node"),
    ],
)
def test_more_memory_or_cpus_than_a_node_has_are_refused_with_what_it_has(changes: dict[str, Any], words: str) -> None:
    sbatch.validate_slurm_resources(Resources(cluster="slurm", gpus=8, cpus_per_gpu=8, mem_gb=500))
    with pytest.raises(SpecError, match=words):
        sbatch.validate_slurm_resources(Resources(cluster="slurm", **changes))


def says(folder: Path, name: str, text: str | None) -> None:
    """A command of Slurm's that prints this, or fails."""
    (folder / name).write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n" if text is not None else "#!/bin/sh\nexit 1\n")
    (folder / name).chmod(0o755)
    commands._config.cache_clear()


ENFORCED = "AccountingStorageEnforce = associations,limits,qos\nClusterName             = testbed"
# As `sacctmgr -n -P show assoc where user=ann format=account,partition,qos` of Slurm 22.05 printed it.
ANN = "other||preemptable\nlab|main|normal\nlab|h100|normal,urgent"


@pytest.mark.usefixtures("nodes_of_64_cpus")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"account": "secret"}, r"resources.account='secret' is not one of lab, other \(yours on this cluster\)"),
        ({"qos": "urgent"}, r"resources.qos='urgent' is not one of normal, preemptable \(yours\)"),
        ({"account": "lab", "qos": "preemptable"}, r"is not one of normal \(yours with account lab\)"),
        ({"account": "lab", "qos": "normal"}, None),
        ({"account": "other", "qos": "preemptable"}, None),
        ({}, None),
    ],
)
def test_accounts_and_qos_of_others_are_refused_with_ones_own(tmp_path: Path, changes: dict[str, Any], words: str | None) -> None:
    says(tmp_path, "scontrol", ENFORCED)
    says(tmp_path, "sacctmgr", ANN)
    wanted = Resources(cluster="slurm", gpus=0, partition="main", **changes)
    if words is None:
        sbatch.validate_slurm_resources(wanted)
    else:
        with pytest.raises(SpecError, match=words):
            sbatch.validate_slurm_resources(wanted)


@pytest.mark.usefixtures("nodes_of_64_cpus")
@pytest.mark.parametrize(
    ("config", "mine"),
    [(ENFORCED, None), (ENFORCED, ""), ("AccountingStorageEnforce = none\nClusterName = testbed", ANN), (None, None)],
)
def test_where_accounting_says_nothing_of_a_user_it_is_left_to_sbatch(
    tmp_path: Path, config: str | None, mine: str | None
) -> None:
    says(tmp_path, "scontrol", config)
    says(tmp_path, "sacctmgr", mine)
    sbatch.validate_slurm_resources(Resources(cluster="slurm", gpus=0, account="any", qos="any"))


def test_a_dependency_of_the_users_holds_beside_that_of_the_cap() -> None:
    there = script(3, after="98:99", extra={"dependency": "afterok:7", "wckey": "w", "nodelist": "gpu1", "time_min": 10})
    for line in ("dependency=afterany:98:99,afterok:7", "wckey=w", "nodelist=gpu1", "time-min=10"):
        assert f"#SBATCH --{line}" in there


TAKES_TWO = """#!/bin/sh
case "$*" in *--test-only*) exit 0;; esac
echo "$2" >>{folder}/handed-over
n=$(wc -l <{folder}/handed-over)
[ "$n" -le {most} ] || {{ {then}; }}
echo "10$n"
"""
REFUSES = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
TIMES_OUT = f'echo "9|PENDING|Priority|billed to lab|$2" >{{folder}}/queue; {REFUSES}'


@pytest.fixture
def cluster_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A cluster with arrays of two that takes so many submissions; what the next one meets is `then`."""
    monkeypatch.setattr(sbatch, "SBATCH_OUTLIVES_SECONDS", 0.0)
    says(tmp_path, "scontrol", "ClusterName = testbed\nMaxArraySize = 2")
    (tmp_path / "queue").write_text("")
    (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    (tmp_path / "squeue").chmod(0o755)

    def takes(most: int, then: str = REFUSES) -> None:
        (tmp_path / "sbatch").write_text(TAKES_TWO.format(folder=tmp_path, most=most, then=then.format(folder=tmp_path)))
        (tmp_path / "sbatch").chmod(0o755)

    return takes


def hand_over(tmp_path: Path, count: int, beside: Sequence[str] = (), **changes: Any) -> tuple[list[Job], sbatch.Submission]:
    jobs = [create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cluster="slurm") for _ in range(count)]
    resources = Resources(cluster="slurm", gpus=0, **changes)
    return jobs, sbatch.submit_arrays(tmp_path / "logs", jobs, resources, "tiny", beside=beside)


def test_what_slurm_does_not_take_after_a_first_array_is_left_for_the_next_command(
    tmp_path: Path, cluster_of_two: Callable[..., None]
) -> None:
    cluster_of_two(1)
    jobs, done = hand_over(tmp_path, 5)
    assert done.arrays == ["101"] and done.not_submitted == jobs[2:] and "QOSMaxSubmitJobPerUserLimit" in done.why
    assert [job.slurm_id() for job in jobs] == ["101_0", "101_1", None, None, None]
    assert [status.job_status(job).kind for job in jobs[2:]] == ["never submitted"] * 3
    assert sbatch.resolve_interrupted_submissions(tmp_path / "logs") == []


def test_an_array_that_was_taken_although_sbatch_failed_is_found_by_its_script(
    tmp_path: Path, cluster_of_two: Callable[..., None]
) -> None:
    cluster_of_two(1, TIMES_OUT)
    jobs, done = hand_over(tmp_path, 4)
    assert done.arrays == ["101", "9"] and not done.not_submitted
    assert [job.slurm_id() for job in jobs] == ["101_0", "101_1", "9_0", "9_1"]


def test_nothing_taken_is_an_error_and_forgotten(tmp_path: Path, cluster_of_two: Callable[..., None]) -> None:
    cluster_of_two(0)
    with pytest.raises(commands.SlurmError, match="QOSMaxSubmitJobPerUserLimit"):
        hand_over(tmp_path, 3)
    assert {status.job_status(job).kind for job in all_jobs(tmp_path / "logs")} == {"never submitted"}


@pytest.mark.parametrize(("cap", "chain"), [(3, ["afterany:55:77", "afterany:101"]), (None, [])])
def test_a_cap_holds_over_arrays_and_over_what_an_earlier_command_has_submitted(
    tmp_path: Path, cluster_of_two: Callable[..., None], cap: int | None, chain: list[str]
) -> None:
    cluster_of_two(9)
    hand_over(tmp_path, 3, beside=["77_1", "55", "77_0"], max_parallel_jobs=cap)
    scripts = [Path(line).read_text() for line in (tmp_path / "handed-over").read_text().split()]
    assert [line.partition("--dependency=")[2] for text in scripts for line in text.splitlines() if "--dep" in line] == chain


def test_what_the_users_shell_tells_sbatch_fills_what_the_sweep_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    monkeypatch.setenv("SBATCH_WCKEY", "project")
    monkeypatch.setenv("SBATCH_RESERVATION", "night")
    found = sbatch.with_sbatch_defaults(Resources(cluster="slurm", gpus=0, partition="h100", extra={"reservation": "day"}))
    assert (found.account, found.partition, found.qos) == ("lab", "h100", None)
    assert found.extra == {"wckey": "project", "reservation": "day"}


def test_slurms_commands_without_a_cluster_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Could not establish a configuration source' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    assert not commands.has_cluster()
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Slurmctld(primary) at head is UP'\n")
    monkeypatch.setenv("SLURM_CONF", "elsewhere")
    assert commands.has_cluster()
