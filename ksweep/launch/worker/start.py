"""The program that srun starts for each rank: python -m ksweep.launch.worker.start SUBMISSION."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ksweep.utils.console import remark


def run_array_element(folder: Path) -> None:
    """Run a rank of the job of this element of the array, unless that job was finalized or cancelled."""
    from ksweep.launch.job import Job
    from ksweep.launch.worker.main import run_rank

    jobs = json.loads((folder / "jobs.json").read_text())
    job = Job(Path(jobs[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]))
    if (final := job.final_status()) is not None:
        remark(f"job {job.id} was finalized ({final.get('reason')}), its cells belong to another by now")
        return
    if job.cancel_requested():
        remark(f"job {job.id} was cancelled before it started")
        return
    run_rank(str(job.path))


if __name__ == "__main__":
    run_array_element(Path(sys.argv[1]))
