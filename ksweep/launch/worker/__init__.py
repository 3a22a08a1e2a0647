"""What one rank of a job runs: its process group, heartbeat, requeue and outcome."""
