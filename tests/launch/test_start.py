"""The process that srun starts: which job it runs, and which it no longer does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ksweep.launch.job import create_job
from ksweep.launch.worker import main, start


def test_an_element_runs_its_own_job_unless_that_was_finalized_or_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(main, "run_rank", ran.append)
    jobs = [create_job(tmp_path, "a:b", {}, 1, cluster="slurm") for _ in range(3)]
    (tmp_path / "jobs.json").write_text(json.dumps([str(job.path) for job in jobs]))
    jobs[1].write_note("settled", {"state": "stopped", "reason": "lost", "kind": "lost"})
    jobs[2].request_cancel()
    for index in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index))
        start.run_array_element(tmp_path)
    assert ran == [str(jobs[0].path)]
    said = capsys.readouterr().err
    assert "was finalized (lost)" in said and "was cancelled before it started" in said
