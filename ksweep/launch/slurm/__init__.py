"""Jobs on Slurm: their scripts, their submission, their state."""
