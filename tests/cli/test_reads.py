"""Commands that read decide nothing: they change no file but the index, also while a killed job waits to be finalized."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import ksweep as package
from ksweep.launch import survey as survey_module
from ksweep.launch.job import Job, create_job
from ksweep.launch.rank_records import Outcome
from tests.cli.conftest import Command
from tests.job_directories import job, me
from tests.registry.real_runs import Real

Tree = dict[str, tuple[int, int, bytes]]


@pytest.fixture(scope="module")
def copied(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, and jobs that ended while nobody waited: killed at a cell, failed, silent on Slurm, interrupted at sbatch."""
    root = tmp_path_factory.mktemp("copied") / "registry"
    shutil.copytree(real.root, root)
    killed = job(root, "killed", "x")
    killed.write_heartbeat(replace(me(cell="key of x", phase="drawing"), pid=2**22 + 1, process_started=1.0))
    failed = job(root, "failed", "y")
    failed.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    silent = create_job(
        root.parent / "logs", "a:b", {"sweep": "far", "registry": str(root)}, 1, cluster="slurm", cells=[("k", "z")]
    )
    silent.write_note("slurm", {"id": "7", "folder": str(root), "tag": "ksweep:mine"})
    for number in range(3):  # enough for the index of finalized jobs
        job(root, f"old{number}", "o").write_note("settled", {"state": "finished", "reason": "", "kind": ""})
    return root


@pytest.fixture
def no_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Slurm whose queue and accounting are empty, and an index of finalized jobs that is due."""
    for name in ("squeue", "sacct", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(survey_module, "INDEX_AFTER", 1)


def tree(root: Path) -> Tree:
    """Every file and directory beside and below a registry but the index: size, time of change, content."""
    found = {}
    for path in sorted(root.parent.rglob("*")):
        if not path.name.startswith("ksweep.duckdb"):
            state = path.stat()
            of_file = (state.st_size, state.st_mtime_ns, path.read_bytes()) if path.is_file() else (0, 0, b"")
            found[str(path.relative_to(root.parent))] = of_file
    return found


def newest_job(root: Path, sweep: str) -> Job:
    [found] = [
        Job(path.parent) for path in root.parent.glob("logs/*/job.json") if Job(path.parent).spec()["argument"]["sweep"] == sweep
    ]
    return found


READS: dict[str, Callable[[Real, Path], list[str]]] = {
    "ls": lambda real, root: ["ls"],
    "ls --json": lambda real, root: ["ls", "--json"],
    "watch --once": lambda real, root: ["watch", "--once"],
    "watch of a job": lambda real, root: ["watch", newest_job(root, "killed").id, "--once"],
    "why of a killed job": lambda real, root: ["why", newest_job(root, "killed").id],
    "why of a silent job": lambda real, root: ["why", newest_job(root, "far").id],
    "why of a run": lambda real, root: ["why", real.runs[0.5]],
    "logs": lambda real, root: ["logs", newest_job(root, "failed").id],
    "sql": lambda real, root: ["sql", "from attempts"],
    "sql by name": lambda real, root: ["sql", "@growth_with_k"],
    "sql over draws": lambda real, root: ["sql", "select count(*) from draws"],
    "show": lambda real, root: ["show", real.runs[0.5]],
    "diff": lambda real, root: ["diff", real.runs[0.5], real.runs[0.7]],
    "export": lambda real, root: ["export", real.runs[0.5]],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READS)
@pytest.mark.usefixtures("no_slurm_job")
def test_a_command_that_reads_changes_no_file_but_the_index(real: Real, copied: Path, command: Command, name: str) -> None:
    before = tree(copied)
    code, _, error = command(*READS[name](real, copied), "--registry", str(copied))
    assert code == (1 if name == "logs" else 0), error
    after = tree(copied)
    assert {path for path in before | after if before.get(path) != after.get(path)} == set()


@pytest.mark.usefixtures("no_slurm_job")
def test_compare_and_results_in_python_change_no_file_but_the_index(copied: Path) -> None:
    before = tree(copied)
    with package.connect(copied) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (5,)
    results = package.results("tiny", registry=copied)
    assert results.curves.num_rows and results.compare().num_rows
    assert tree(copied) == before


@pytest.mark.usefixtures("no_slurm_job")
def test_ls_and_why_say_what_finalize_will_record(copied: Path, command: Command) -> None:
    _, out, _ = command("ls", "--json", "--registry", str(copied))
    assert '"state": "failed"' in out and "dead rank: rank 0 of 1 is gone" in out
    _, out, _ = command("why", newest_job(copied, "killed").id, "--registry", str(copied))
    assert "failed" in out and "dead rank" in out
