"""What every rank of a job runs: a cell from its activations to its run record."""
