"""One rank of a job: its process group, heartbeat, requeue and end."""
