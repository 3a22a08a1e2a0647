"""From a plan to running ranks: missing cells, jobs, submission, progress, status."""
