"""What a sweep's command says of its jobs on Slurm; Slurm itself is in tests/slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

import ksweep
from ksweep import Activations, Autoencoder, Cell, Resources, RunError, Sweep
from ksweep.launch import code_snapshot, run_on_slurm
from ksweep.launch.job import Job, all_jobs, create_job
from ksweep.launch.plan import Step
from ksweep.launch.slurm import sbatch
from ksweep.launch.survey import survey_jobs
from tests.tiny_sweeps import run, talking_pair, tiny_cell

COMMANDS = {
    "srun": "",
    "scontrol": """case $1 in ping) echo 'Slurmctld(primary) at head is UP';;
*) echo 'ClusterName = testbed'; echo 'MaxArraySize = 2';; esac""",
    "squeue": "",
    "sacct": "exit 1",
    "sacctmgr": "exit 1",
    "sbatch": """case "$*" in *--test-only*) exit 0;; esac
[ ! -e {folder}/full ] || {{ echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1; }}
touch {folder}/full; echo 7""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, of a cluster that takes one array of two; a file `full` says that it has."""
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash -e\n{text.format(folder=tmp_path)}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setattr(sbatch, "SBATCH_OUTLIVES_SECONDS", 0.0)
    monkeypatch.setattr(code_snapshot, "snapshot_code", lambda _: None)
    return tmp_path


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    cell = Cell(autoencoder=Autoencoder(av="a", ar="b"), activations=Activations(model="m", text="t"))
    return Sweep(name="s", cell=cell, resources=Resources(cluster="slurm", gpus=0), registry=str(tmp_path / "registry"))


def ended(tmp_path: Path, label: str, state: str, reason: str) -> Job:
    job = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cluster="slurm", cells=[(f"key-of-{label}", label)])
    job.write_note("settled", {"state": state, "reason": reason, "kind": "setup" if state == "failed" else ""})
    return job


def test_waiting_names_every_cell_that_failed(sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [
        ended(tmp_path, "t=0", "failed", "no module"),
        ended(tmp_path, "t=1", "finished", ""),
        ended(tmp_path, "t=2", "failed", "no disk"),
    ]
    with pytest.raises(RunError, match="no module"):
        run_on_slurm.wait_for_slurm_jobs(jobs, sweep)
    said = capsys.readouterr().err
    assert f"failed: t=0 @key-of-t (job {jobs[0].id})" in said and f"failed: t=2 @key-of-t (job {jobs[2].id}): no disk" in said
    assert "t=1" not in said


def missing(sweep: Sweep, count: int) -> list[tuple[Cell, Step]]:
    return [(sweep.cell, Step(f"n={i}", f"key{i}", "missing", "", 1, 1, 1, 1, None)) for i in range(count)]


def test_a_submission_that_slurm_took_in_part_says_how_much_and_what_to_do(sweep: Sweep, cluster: Path) -> None:
    one_each = ksweep.replace_at(sweep, "resources.cells_per_job", 1)
    with pytest.raises(RunError, match=r"2 of 5 jobs are submitted.*other 3 \(.*AssocMaxSubmitJobLimit\): the same command"):
        run_on_slurm.submit_missing_cells(one_each, missing(one_each, 5))
    (cluster / "full").unlink()
    assert [job.slurm_id() for job in all_jobs(cluster / "logs")].count(None) == 3
    assert set(survey_jobs(cluster / "logs").statuses) == {j.id for j in all_jobs(cluster / "logs") if j.slurm_id()}


@pytest.mark.parametrize(("where", "said"), [("submit_arrays", []), ("commands.sbatch", ["its launcher died before sbatch"])])
def test_jobs_of_an_interrupted_submission_do_not_wait_for_a_process_that_lives_on(
    sweep: Sweep, cluster: Path, monkeypatch: pytest.MonkeyPatch, where: str, said: list[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ksweep.launch.slurm.sbatch.{where}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_on_slurm.submit_missing_cells(ksweep.replace_at(sweep, "resources.cells_per_job", 1), missing(sweep, 2))
    lines = sbatch.resolve_interrupted_submissions(cluster / "logs")
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))
    assert survey_jobs(cluster / "logs").statuses == {}
    assert [(job.final_status() or {})["kind"] for job in all_jobs(cluster / "logs")] == ["never submitted"] * 2


def test_jobs_of_an_installed_package_say_what_code_they_run_and_the_command_once(
    sweep: Sweep, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on_slurm.submit_missing_cells(ksweep.replace_at(sweep, "resources.cells_per_job", 1), missing(sweep, 2))
    code = [job.code() for job in all_jobs(cluster / "logs")]
    assert code == [{"path": str(Path(ksweep.__file__).parent), "commit": f"ksweep {ksweep.__version__}", "diff": None}] * 2
    assert capsys.readouterr().err.count("jobs run the installed ksweep") == 1


@pytest.mark.slow
def test_results_are_shown_while_slurm_does_not_answer(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = talking_pair(tmp_path, num_rows=60)
    done = Sweep(
        name="tiny", cell=tiny_cell(pair, num_replicates=50), resources=Resources(cluster="inprocess", gpus=0),
        registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "vector_cache"),
    )  # fmt: skip
    assert run(done) == 0
    words = "Unable to contact slurm controller (connect failure)"
    (cluster / "sinfo").write_text(f"#!/bin/sh\necho 'slurm_load_partitions: {words}' >&2\nexit 1\n")
    (cluster / "sinfo").chmod(0o755)
    capsys.readouterr()
    assert run(done, "resources.cluster=slurm") == 0
    said = capsys.readouterr()
    assert "FVE, best of K" in said.out and "computed 0 of 1 cells" in said.out
    assert said.err.startswith("Slurm does not answer (sinfo: slurm_load_partitions: Unable to contact") and words in said.err
    assert run(done, "resources.cluster=slurm", "sampling.seed=[0,1]") == 1
    said = capsys.readouterr()
    assert "FVE, best of K" in said.out and "): 1 of 2 cells are left as they are" in said.err
    assert run(done, "resources.cluster=slurm", "sampling.seed=7") == 1 and "FVE" not in capsys.readouterr().out
