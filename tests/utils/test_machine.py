"""Ranks and threads: how many a job on CPUs gets, and what the process of a rank starts with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ksweep import Resources, Sweep
from ksweep.launch import hardware, run_locally
from ksweep.launch import local_executor as launch
from ksweep.launch.job import create_job
from ksweep.utils import machine
from tests.launch.test_jobs import ROOT, end
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
GB = 10**9


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(machine, "num_cores", lambda: 16)
    monkeypatch.setattr(machine, "free_memory", lambda: 1000 * GB)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({}, 8),  # 16 cores, 8 at most
        ({"cores": 4}, 4),
        ({"cores": 1}, 1),
        ({"cores": 4, "cpus_per_rank": 2}, 2),
        ({"cores": 4, "OMP_NUM_THREADS": "2"}, 2),
        ({"cores": 4, "OMP_NUM_THREADS": "4,2"}, 1),
        ({"cores": 4, "OMP_NUM_THREADS": "1", "cpus_per_rank": 4}, 1),
        ({"cores": 4, "OMP_NUM_THREADS": "many"}, 4),
        ({"cores": 2, "cpus_per_rank": 8}, 1),
        ({"num_draws": 3 * machine.DRAWS_PER_RANK}, 3),
        ({"num_draws": 5}, 1),
        ({"num_draws": 0}, 1),
        ({"memory": 24 * GB, "model_bytes": int(4.5 * GB)}, 4),  # 6 GB a rank
        ({"memory": 2 * GB, "model_bytes": 16 * GB}, 1),
        ({"memory": None}, 8),
    ],
)
def test_ranks_are_one_a_core_as_far_as_memory_and_work_allow(
    given: dict[str, object], ranks: int, cores: pytest.MonkeyPatch
) -> None:
    for name in SETTINGS:
        if name in given:
            cores.setenv(name, str(given[name]))
    if "cores" in given:
        cores.setattr(machine, "num_cores", lambda: given["cores"])
    if "memory" in given:
        cores.setattr(machine, "free_memory", lambda: given["memory"])
    asked = {"num_draws": 10**6, "model_bytes": 0, "cpus_per_rank": None} | given
    assert machine.num_cpu_ranks(asked["num_draws"], asked["model_bytes"], asked["cpus_per_rank"]) == ranks


@pytest.fixture
def control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directory of this process's control group, under a root of its own."""
    own = next((x[3:].strip() for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::")), None)
    if own is None:
        pytest.skip("no unified control groups")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    group = tmp_path / own.lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    return group


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000", 1), ("50000 100000", 1), ("300000 100000", 3), ("max 100000", 4), ("", 4)]
)
def test_cores_of_a_container_are_those_of_its_quota(
    quota: str, expected: int, control_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    (control_group / "cpu.max").write_text(quota)
    assert machine.num_cores() == expected


@pytest.mark.parametrize(
    ("current", "stat", "left"),
    [
        (60, None, 40),
        (60, "anon 10\ninactive_file 45\nactive_file 5\n", 85),  # weights that were just read
        (60, "anon 60\n", 40),
        (60, "inactive_file 70\n", 100),  # the two files are read at different moments
        (110, "inactive_file 0\n", 0),
    ],
)
def test_memory_of_a_container_is_its_limit_less_what_is_used_without_idle_pages_of_files(
    current: int, stat: str | None, left: int, control_group: Path
) -> None:
    megabyte = 10**6
    (control_group / "memory.max").write_text(f"{100 * megabyte}\n")
    (control_group / "memory.current").write_text(f"{current * megabyte}\n")
    if stat is not None:
        (control_group / "memory.stat").write_text(re.sub(r"(\d+)", r"\g<1>000000", stat))
    assert machine.free_memory() == left * megabyte


@pytest.mark.parametrize(
    ("user", "ranks", "cpus", "expected"),
    [
        ({}, 16, None, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}),
        ({}, 3, None, {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "PASSIVE"}),
        ({}, 40, None, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}),
        ({}, 2, 3, {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_NUM_THREADS": "7"}, 2, 3, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 16, None, {"OMP_NUM_THREADS": "1"}),
        ({"GOMP_SPINCOUNT": "3000"}, 16, None, {"OMP_NUM_THREADS": "1"}),
        ({"KMP_BLOCKTIME": "200", "OMP_NUM_THREADS": "2"}, 16, None, {}),
        ({"OMP_NUM_THREADS": "", "OMP_WAIT_POLICY": ""}, 16, None, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_a_rank_starts_with_its_share_of_the_cores_unless_the_user_has_said_otherwise(
    user: dict[str, str], ranks: int, cpus: int | None, expected: dict[str, str], cores: pytest.MonkeyPatch
) -> None:
    for name, value in user.items():
        cores.setenv(name, value)
    assert machine.rank_environment(ranks, cpus) == expected


@pytest.mark.parametrize(
    ("slurm", "ranks", "expected"),
    [
        ({}, 1, ("1", "PASSIVE")),
        ({"SLURM_CPUS_ON_NODE": "8"}, 2, ("4", "PASSIVE")),
        ({"SLURM_CPUS_ON_NODE": "64"}, 8, ("8", "PASSIVE")),
        ({"SLURM_CPUS_ON_NODE": "1"}, 4, ("1", "PASSIVE")),
        ({"SLURM_CPUS_ON_NODE": "5"}, 4, ("1", "PASSIVE")),
        ({"SLURM_CPUS_ON_NODE": "11"}, 4, ("2", "PASSIVE")),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "3"}, 2, ("3", "PASSIVE")),
        ({"SLURM_CPUS_ON_NODE": "8", "OMP_NUM_THREADS": "5"}, 2, ("5", "PASSIVE")),
        ({"SLURM_CPUS_ON_NODE": "8", "GOMP_SPINCOUNT": "100"}, 2, ("4", "")),
        ({"SLURM_CPUS_ON_NODE": "8", "OMP_WAIT_POLICY": "ACTIVE"}, 2, ("4", "ACTIVE")),
    ],
)
def test_a_batch_script_gives_its_ranks_the_same(slurm: dict[str, str], ranks: int, expected: tuple[str, str]) -> None:
    script = "\n".join([*machine.rank_environment_lines(ranks), 'echo "$OMP_NUM_THREADS,${OMP_WAIT_POLICY:-}"'])
    environment = {"PATH": os.environ["PATH"], **slurm}
    done = subprocess.run(["bash", "-eu", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().split(",") == list(expected), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("user", "ranks", "threads", "policy"),
    [({}, 2, 1, "PASSIVE"), ({}, 1, 2, "PASSIVE"), ({"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"}, 2, 2, "ACTIVE")],
)
def test_torch_and_its_openmp_runtime_start_with_what_the_rank_was_given(
    user: dict[str, str], ranks: int, threads: int, policy: str, tmp_path: Path, cores: pytest.MonkeyPatch
) -> None:
    cores.setattr(machine, "num_cores", lambda: 2)
    for name, value in {**user, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "true"}.items():
        cores.setenv(name, value)
    before = dict(os.environ)
    job = create_job(tmp_path / "logs", "tests.launch.entries:threads", {}, ranks)
    submitted = launch.start_local_job(job, Resources(cluster="local", gpus=0, tasks=ranks, time=5), "test")
    assert os.environ == before, "what ranks start with is not left to the launcher"
    assert end(submitted, ranks).state == "finished"
    in_use = {"threads": str(min(threads, os.cpu_count() or 1)), "omp_wait_policy": policy}  # torch has none beyond the cores
    assert [e.result for e in job.outcomes()] == [in_use] * ranks
    # The runtime prints what it has read when it is loaded.
    said = [path.read_text() for path in job.path.glob("*_log.err")]
    assert len(said) == ranks and all(re.search(rf"OMP_WAIT_POLICY\s*=\s*'{policy}'", text) for text in said), said


@pytest.mark.slow
@pytest.mark.usefixtures("forked_python")
@pytest.mark.parametrize(
    ("resources", "num_jobs", "threads"),
    [
        ({"gpus": 0, "tasks": 2}, 1, "8"),
        ({"gpus": 0, "tasks": 2, "max_parallel_jobs": 2}, 2, "4"),
        ({"gpus": 0, "tasks": 2, "max_parallel_jobs": 4}, 2, "4"),
        ({"gpus": 0, "tasks": 2, "max_parallel_jobs": 2, "cpus_per_task": 3}, 2, "3"),
        ({"gpus": 1}, 2, "8"),
        ({"gpus": 1, "max_parallel_jobs": 1}, 2, "16"),
        ({"gpus": 2}, 3, "4"),  # four GPUs: two jobs of two ranks at once
        ({"gpus": 1, "cpus_per_gpu": 3}, 2, "3"),
        ({"cpus_per_gpu": 3}, 2, "3"),
    ],
)
def test_jobs_side_by_side_share_the_cores(
    resources: dict[str, int], num_jobs: int, threads: str, tmp_path: Path, cores: pytest.MonkeyPatch
) -> None:
    cores.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    cores.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    cores.setenv("PYTHONPATH", str(ROOT))
    asked = Resources(cluster="local", time=5, **resources)  # type: ignore[arg-type]
    argument = {"folder": str(tmp_path), "seconds": 0.0, "beside": 1, "registry": str(tmp_path / "registry"), "sweep": "test"}
    # No GPUs for the ranks: nothing is behind these, so torch must not be asked for them.
    start_job = partial(
        create_job, tmp_path / "logs", "tests.launch.entries:holds_gpus", argument | {"cells": []}, hardware.total_ranks(asked), 0
    )
    run_locally.run_jobs([start_job] * num_jobs, asked, "test")
    told = [json.loads(path.read_text())["threads"] for path in tmp_path.glob("gpus-*.json")]
    assert told == [threads] * num_jobs * hardware.total_ranks(asked)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """80 activations x 8 draws: enough for two ranks and not for three."""
    folder = tmp_path_factory.mktemp("ranks")
    cell = tiny_cell(talking_pair(folder, 60), num_replicates=50)
    cell = replace(cell, activations=replace(cell.activations, num_activations=80))
    return Sweep(
        name="tiny", cell=cell, resources=Resources(cluster="local", gpus=0), registry="registry", vector_cache="vector_cache"
    )


def placed(sweep: Sweep, place: Path, **resources: object) -> Sweep:
    return replace(
        sweep, resources=replace(sweep.resources, **resources), registry=str(place / "registry"), vector_cache=str(place / "v")
    )  # type: ignore[arg-type]


DRAWS = "SELECT activation, draw, token_ids FROM draws ORDER BY ALL"


@pytest.mark.trials
@pytest.mark.slow
def test_a_sweep_has_a_rank_a_core_says_so_in_its_record_and_draws_the_same(
    sweep: Sweep, tmp_path: Path, cores: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cores.setattr(machine, "num_cores", lambda: 2)
    many, alone = placed(sweep, tmp_path / "many"), placed(sweep, tmp_path / "alone", tasks=1)
    assert run(many, "--dry-run") == 0 and "2 CPU ranks" in capsys.readouterr().out
    assert run(many) == run(alone) == 0
    recorded = "SELECT num_ranks, resources->>'$.tasks', engine['threads'], engine['omp_wait_policy'] FROM runs"
    assert ask(many, recorded) == [(2, "2", "1", "PASSIVE")]
    assert ask(alone, recorded) == [(1, "1", str(min(2, os.cpu_count() or 1)), "PASSIVE")], "what the user asks for decides"
    assert ask(many, DRAWS) == ask(alone, DRAWS)


@pytest.mark.trials
@pytest.mark.slow
def test_jobs_of_a_sweep_side_by_side_have_no_more_threads_than_there_are_cores(
    sweep: Sweep, tmp_path: Path, cores: pytest.MonkeyPatch
) -> None:
    cores.setattr(machine, "num_cores", lambda: 2)
    two = placed(sweep, tmp_path, cells_per_job=1, max_parallel_jobs=2)
    assert run(replace(two, axes={"sampling.temperature": (0.7, 1.3)})) == 0
    assert ask(two, "SELECT num_ranks, engine['threads'] FROM runs") == [(1, "1")] * 2


@pytest.mark.trials
@pytest.mark.slow
def test_a_run_in_the_users_own_process_lets_its_threads_sleep(sweep: Sweep, tmp_path: Path) -> None:
    own = placed(sweep, tmp_path, cluster="inprocess")
    code = "import atexit, os\natexit.register(lambda: print('left behind:', os.environ.get('OMP_WAIT_POLICY')))\n"
    code += f"from ksweep import *\nfrom ksweep.config.spec import *\nsweep_main({own!r}, ['--no-charts'])"
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {"OMP_DISPLAY_ENV": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    # The runtime prints what it has read when it is loaded.
    assert done.returncode == 0 and re.search(r"OMP_WAIT_POLICY\s*=\s*'PASSIVE'", done.stderr), done.stderr
    assert "left behind: None" in done.stdout
    assert ask(own, "SELECT num_ranks, engine['omp_wait_policy'] FROM runs") == [(1, "PASSIVE")]


@pytest.mark.slow
def test_a_run_beside_a_loaded_torch_says_nothing_of_how_its_threads_wait(sweep: Sweep, tmp_path: Path) -> None:
    assert "torch" in sys.modules
    own = placed(sweep, tmp_path, cluster="inprocess")
    before = dict(os.environ)
    assert run(own) == 0
    assert os.environ == before and ask(own, "SELECT engine['omp_wait_policy'] FROM runs") == [(None,)]


@pytest.mark.slow
def test_a_sweep_of_few_draws_has_one_rank(sweep: Sweep, tmp_path: Path, cores: pytest.MonkeyPatch) -> None:
    cell = replace(sweep.cell, activations=replace(sweep.cell.activations, num_activations=40))
    few = placed(replace(sweep, cell=cell), tmp_path)
    assert run(few) == 0
    assert ask(few, "SELECT num_ranks, resources->>'$.tasks' FROM runs") == [(1, "1")]
