"""What earlier commands left: submissions are settled, ended jobs booked, jobs that are still at work seen through."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from ksweep.config.sweep import Sweep
from ksweep.evaluation.identity import CellKeys
from ksweep.launch import status
from ksweep.launch.job import read
from ksweep.launch.job_spec import logs_of
from ksweep.launch.progress import Watch
from ksweep.launch.reconcile import book_ended
from ksweep.launch.slurm import sbatch

POLL_SECONDS = 0.3
SLURM_POLL_SECONDS = 2.0


def reconcile(sweep: Sweep, keys: Sequence[CellKeys], *, wait: bool) -> status.Survey:
    """What earlier commands left: submissions are settled, ended jobs booked, and what is still at work is known.

    With `wait` (on this machine) a job that is at work on these cells is seen through, instead of computing twice.
    """
    logs, wanted = logs_of(sweep), {key.cell for key in keys}
    for line in sbatch.settle(logs):
        print(line, file=sys.stderr)
    told: set[str] = set()
    with Watch() as watch:
        while True:
            survey = book_ended(logs)
            ours = {job.id: job for key, job in survey.at_work.items() if key in wanted}
            patient = [i for i in ours if survey.verdicts[i].look_again or (wait and survey.verdicts[i].state != "unknown")]
            if not patient:
                return survey
            for name in patient:
                if name not in told:
                    told.add(name)
                    what = (
                        "seems to be gone: making sure"
                        if survey.verdicts[name].look_again
                        else "is still at work on this sweep: waiting"
                    )
                    print(f"job {name} of an earlier command {what} ({survey.verdicts[name].reason})", file=sys.stderr)
                watch.show_ranks(read(ours[name].heartbeats, []))
            time.sleep(POLL_SECONDS if wait else SLURM_POLL_SECONDS)
